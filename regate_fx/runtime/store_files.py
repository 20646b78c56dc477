"""The files of a store: how they get to disk, and how they are read without trusting them.

    plan.json                       what is being computed; written first
    shard-00000-<digest>.arrow      the losses of one window of samples
    index.arrow                     where each sample is; written when all shards are there
    manifest.json                   names and digests of all of it; written last

Every file appears by one rename, complete and synced. Every Arrow file is mapped, and its digest compared, before
Arrow is given a byte of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter

from regate_fx.errors import StoreDamaged, StoreMismatch, StoreUnwritable

FORMAT = 3
MANIFEST = "manifest.json"
PLAN = "plan.json"
INDEX = "index.arrow"
LOCKS = ".locks"

_SHARD_NAME = re.compile(r"shard-(\d{5,})-[0-9a-f]{64}\.arrow")
_AGAIN = "Delete this file and run the teacher pass again: nothing else is computed anew."
_CHECK_DISK = "Check the disk and its permissions."


def shard_name(window: int, digest: str) -> str:
    return f"shard-{window:05d}-{digest}.arrow"


def window_of(name: str) -> int | None:
    """The window whose shard has this name, None for any other file."""
    found = _SHARD_NAME.fullmatch(name)
    return int(found[1]) if found else None


def digest_of(content: Any, belonging: str) -> str:
    """SHA-256, in hexadecimal, of a file's bytes and of what it belongs to.

    belonging: plan and window, so that a whole shard of another pass or window is as wrong as a flipped bit.
    """
    digest = hashlib.sha256(belonging.encode() + b"\0")
    digest.update(content)
    return digest.hexdigest()


_GO_ON = "Make room or get permission and run the teacher pass again: it goes on where it stopped."


def publish(path: Path, content: Any, unfinished: str = "", remedy: str = _GO_ON) -> None:
    """Make a file appear complete or not at all, also through a power failure.

    unfinished: name of the file until it is complete; a name of nobody else's, and of the same content's next writer
    Raises `StoreUnwritable` where the system refuses; the folder is then as it was.
    """
    temporary = path.with_name(unfinished or f".{path.name}.unfinished")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        _discard(temporary)
        raise unwritable(path, error, remedy) from error


def unwritable(path: Path, error: OSError, remedy: str = _GO_ON) -> StoreUnwritable:
    reason = error.strerror or str(error)
    return StoreUnwritable(
        str(path),
        f"it cannot be written ({reason}).",
        remedy,
    )


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        # The folder that refused the write may refuse this too; the error of the write is the one to report.
        return


def _sync_folder(folder: Path) -> None:
    # Windows cannot open folders; its rename is as durable as the file system makes it.
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def arrow_bytes(columns: Mapping[str, tuple[Any, pa.Array]]) -> pa.Buffer:
    """An Arrow file, as `datasets` writes it, of one record batch: columns by name, each with its feature."""
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    table = pa.table({name: array for name, (_, array) in columns.items()})
    stream = pa.BufferOutputStream()
    # In one batch a column is one piece, which a reader can map.
    with ArrowWriter(features=features, stream=stream, writer_batch_size=max(table.num_rows, 1)) as writer:
        writer.write_table(table)
        writer.finalize(close_stream=False)
    return stream.getvalue()


def read_arrow(path: Path, expected: str, belonging: str) -> dict[str, pa.Array]:
    """The columns of an Arrow file, mapped. expected, belonging: see `digest_of`. Raises `StoreDamaged`."""
    content = _mapped(path)
    if digest_of(content, belonging) != expected:
        raise StoreDamaged(str(path), "its bytes are not those that were written.", _AGAIN)
    table = pa.ipc.open_stream(pa.py_buffer(content)).read_all()
    return {
        name: column.chunk(0) if column.num_chunks else pa.array([], column.type)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def _mapped(path: Path) -> np.ndarray:
    """uint8 [bytes]: a private mapping of the file; it takes no file handle and no memory of its own."""
    try:
        size = path.stat().st_size
        if not path.is_file() or not size:
            raise StoreDamaged(str(path), "it is empty or no file.", _AGAIN)
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except FileNotFoundError as error:
        raise StoreDamaged(str(path), "it is missing.", "Run the teacher pass again.") from error
    except (OSError, RuntimeError) as error:
        raise StoreDamaged(str(path), f"it cannot be read ({error}).", _CHECK_DISK) from error


def publish_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Publish JSON text that carries its own name, format and checksum."""
    named = {"file": path.name, "format": FORMAT, **content}
    publish(path, json.dumps({"checksum": checksum_of(named), **named}, indent=1).encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """What was given to `publish_sealed`. Raises `StoreDamaged`, and `StoreMismatch` for a file of another version."""
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum", None) if isinstance(content, dict) else None
        right = checksum == checksum_of(content)
    except (ValueError, RecursionError) as error:
        raise StoreDamaged(str(path), "it is no JSON text.", _AGAIN) from error
    except OSError as error:
        raise StoreDamaged(str(path), f"it cannot be read ({error.strerror}).", _CHECK_DISK) from error
    if not isinstance(content, dict):
        raise StoreDamaged(str(path), "it is not what was written.", _AGAIN)
    version = content.pop("format", None)
    if version != FORMAT:
        raise StoreMismatch(
            str(path),
            f"it is of format {version!r}, this software reads {FORMAT}.",
            "Open it with the version that wrote it, or run the teacher pass again in another folder.",
        )
    if not right or content.pop("file", None) != path.name:
        raise StoreDamaged(str(path), "it is not what was written.", _AGAIN)
    return content


def checksum_of(content: Any) -> str:
    """SHA-256, in hexadecimal, of a JSON value, whatever the order of its names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
