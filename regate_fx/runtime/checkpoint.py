"""A gate's state as a file: complete or not there, and what was written or refused.

Shapes: T labels in the data set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from regate_fx.errors import StoreDamaged, StoreMismatch
from regate_fx.runtime.store_files import publish

STATE = "regate.safetensors"
"""The file's name in a checkpoint's folder."""

FORMAT = 1
_HEADER = "regate"
_REMEDY = "Resume from an older checkpoint."


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what `ReGate.state_dict` returned, as one safetensors file that appears by one rename.

    Raises `StoreUnwritable` where the system refuses; what was there before stays.
    """
    tensors = {
        "ema": state["ema"].contiguous(),
        "pending": torch.frombuffer(bytearray(state["pending"]), dtype=torch.uint8),
    }
    about = {"format": FORMAT} | {name: state[name] for name in ("global_step", "fingerprint", "settings")}
    header = {_HEADER: json.dumps(about), "digest": _digest(json.dumps(about), tensors)}
    publish(
        path,
        safetensors.torch.save(tensors, metadata=header),
        remedy="Make room or get permission: training cannot be resumed from here without this file.",
    )


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_state` wrote. Raises `StoreMismatch` where there is none, `StoreDamaged` where it is not that."""
    path = Path(path)
    if not path.is_file():
        raise StoreMismatch(
            str(path),
            "there is no state of a gate.",
            "Resume from a checkpoint that was saved while the gate was in use; to begin ReGATE with weights "
            "trained before, load these into the model instead of resuming.",
        )
    try:
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])["__metadata__"]
        about = json.loads(header[_HEADER])
        right = header["digest"] == _digest(header[_HEADER], tensors)
    except OSError as error:
        raise StoreDamaged(str(path), f"it cannot be read ({error.strerror}).", _REMEDY) from error
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise StoreDamaged(str(path), "it is no state of a gate.", _REMEDY) from error
    if not right:
        raise StoreDamaged(str(path), "its bytes are not those that were written.", _REMEDY)
    if about.pop("format") != FORMAT:
        raise StoreMismatch(str(path), "another version wrote it.", "Resume with the version that did.")
    return about | {"ema": tensors["ema"], "pending": tensors["pending"].numpy().tobytes()}


def _digest(about: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
