"""Reference losses on disk: Arrow shards written once by the teacher pass, read by every run after it.

A store is a folder of `shard-00000.arrow`, ... and a `manifest.json` that is written last: a folder without one is
not a store. Each row holds one sample: its id, a hash of its label tokens, and the teacher's loss on each.

Shapes: n samples, T labels of all samples together, G documents of a batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from regate_fx.errors import InvalidInput, StoreMismatch

MANIFEST = "manifest.json"
SAMPLES_PER_SHARD = 100_000

_FEATURES = datasets.Features(
    {
        "sample_id": datasets.Value("int64"),
        "label_hash": datasets.Value("int64"),
        "losses": datasets.List(datasets.Value("float32")),
    }
)


@dataclass(frozen=True)
class SampleLosses:
    """One sample of the store. losses: float32, one entry for each label other than -100, in order."""

    sample_id: int
    label_hash: int
    losses: Sequence[float] | np.ndarray


class ReferenceLosses:
    """The teacher's loss on every label of a data set (ReGATE, Eq. 1).

    ids:    int64 [n]    sample ids, ascending
    starts: int64 [n+1]  where the labels of each sample begin in `losses`
    hashes: int64 [n]    hash of each sample's label tokens
    losses: float32 [T]
    about:  what the losses were computed with, by name: teacher, placeholder, ...
    """

    def __init__(
        self, ids: Tensor, starts: Tensor, hashes: Tensor, losses: Tensor, about: Mapping[str, Any]
    ) -> None:
        self.ids = ids
        self.starts = starts
        self.hashes = hashes
        self.losses = losses
        self.about = dict(about)

    @classmethod
    def of(cls, samples: Iterable[SampleLosses], about: Mapping[str, Any] | None = None) -> Self:
        """A store in memory. Raises `InvalidInput` for a sample id that comes twice and for losses not finite."""
        ordered = sorted(samples, key=lambda sample: sample.sample_id)
        lengths = [len(sample.losses) for sample in ordered]
        losses = [np.asarray(sample.losses, dtype=np.float32) for sample in ordered]
        table = cls(
            torch.tensor([sample.sample_id for sample in ordered], dtype=torch.int64),
            torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64),
            torch.tensor([sample.label_hash for sample in ordered], dtype=torch.int64),
            torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *losses])),
            about or {},
        )
        table._check()
        return table

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Read a store. Raises `StoreMismatch` where the folder holds none."""
        manifest = read_manifest(folder)
        parts = [_read_shard(Path(folder) / name) for name in manifest["shards"]]
        ids, hashes, lengths, losses = (np.concatenate(column) for column in zip(*parts, strict=True))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        order = np.argsort(ids, kind="stable")
        if not np.array_equal(order, np.arange(len(ids))):
            losses = np.concatenate([losses[:0], *(losses[starts[i] : starts[i + 1]] for i in order)])
        table = cls(
            torch.from_numpy(ids[order]),
            torch.from_numpy(np.concatenate([[0], np.cumsum(lengths[order])])),
            torch.from_numpy(hashes[order]),
            torch.from_numpy(losses),
            manifest["about"],
        )
        table._check()
        return table

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """Hash of what the losses were computed with, and of the samples and their label tokens."""
        digest = hashlib.sha256(fingerprint(self.about).encode())
        for tensor in (self.ids, self.starts, self.hashes):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def find(self, ids: Tensor) -> Tensor:
        """int64 [G]: the row of each sample id (int64 [G], on the host).

        Raises `InvalidInput` that names the ids which the teacher never saw.
        """
        rows = torch.searchsorted(self.ids, ids).clamp(max=max(len(self) - 1, 0))
        known = self.ids[rows] == ids if len(self) else torch.zeros_like(ids, dtype=torch.bool)
        if not bool(known.all()):
            span = f"{int(self.ids[0])} to {int(self.ids[-1])}" if len(self) else "none"
            raise InvalidInput(
                "sample_id",
                f"{ids[~known][:5].tolist()} are not among the {len(self)} samples that the teacher saw "
                f"(ids {span}).",
                "Use the ids of the data set that the reference losses were computed for.",
            )
        return rows

    def _check(self) -> None:
        repeated = self.ids[1:][self.ids[1:] == self.ids[:-1]]
        if len(repeated):
            raise InvalidInput(
                "sample_id", f"{repeated[:5].tolist()} come more than once.", "Give every sample its own id."
            )
        broken = (~self.losses.isfinite()).nonzero().flatten()
        if len(broken):
            row = int(torch.searchsorted(self.starts, broken[0], right=True)) - 1
            raise InvalidInput(
                "losses",
                f"the reference losses of sample {int(self.ids[row])} are NaN or infinite.",
                "Compute them anew, in a wider dtype if need be.",
            )


class StoreWriter:
    """Writes shards as samples come, and the manifest when all have come.

        with StoreWriter(folder, about) as writer:
            writer.write(sample)

    A folder in which an error stopped the writer has no manifest. Raises `StoreMismatch` where the folder holds a
    store already.
    """

    def __init__(self, folder: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._about = dict(about)
        self._shards: list[str] = []
        self._waiting: list[SampleLosses] = []

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        if (self._folder / MANIFEST).exists():
            raise StoreMismatch(
                str(self._folder), "it holds a store already.", "Open it, or choose another folder."
            )
        return self

    def write(self, sample: SampleLosses) -> None:
        self._waiting.append(sample)
        if len(self._waiting) == SAMPLES_PER_SHARD:
            self._flush()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            return
        if self._waiting or not self._shards:
            self._flush()
        manifest = {
            "fingerprint": fingerprint(self._about),
            "about": self._about,
            "shards": self._shards,
        }
        _publish(self._folder / MANIFEST, json.dumps(manifest, indent=1).encode())

    def _flush(self) -> None:
        name = f"shard-{len(self._shards):05d}.arrow"
        unfinished = self._folder / f".{name}.unfinished"
        with ArrowWriter(path=str(unfinished), features=_FEATURES) as writer:
            for sample in self._waiting:
                losses = np.asarray(sample.losses, dtype=np.float32)
                writer.write(
                    {"sample_id": sample.sample_id, "label_hash": sample.label_hash, "losses": losses}
                )
            writer.finalize()
        os.replace(unfinished, self._folder / name)
        self._shards.append(name)
        self._waiting.clear()


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a store. Raises `StoreMismatch` where there is none, or one that disagrees with itself."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise StoreMismatch(
            str(folder),
            f"it holds no {MANIFEST}.",
            "Run the teacher pass; one that was stopped has to run again.",
        )
    manifest: dict[str, Any] = json.loads(path.read_bytes())
    if manifest["fingerprint"] != fingerprint(manifest["about"]):
        raise StoreMismatch(
            str(folder), f"{MANIFEST} was changed after it was written.", "Delete the folder."
        )
    return manifest


def fingerprint(about: Mapping[str, Any]) -> str:
    """Hash of what a store was computed with."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _publish(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _read_shard(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids, hashes, numbers of labels and losses of one shard."""
    if not path.is_file():
        raise StoreMismatch(str(path.parent), f"{path.name} is missing.", "Run the teacher pass again.")
    table = datasets.Dataset.from_file(str(path)).data
    lists = table.column("losses").combine_chunks()
    starts = lists.offsets.to_numpy()
    return (
        table.column("sample_id").to_numpy(),
        table.column("label_hash").to_numpy(),
        np.diff(starts),
        lists.flatten().to_numpy(),
    )
