"""Reference losses: what the teacher said about every label, in memory or mapped from a folder.

Shapes: n samples, T labels of all samples together, G documents of a batch, K labels of a batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from regate_fx.errors import InvalidInput, StoreDamaged, StoreMismatch
from regate_fx.runtime import store_files as files

LossType = Literal["float32", "float16"]


@dataclass(frozen=True)
class SampleLosses:
    """One sample of the store.

    label_hash, text_hash: of its label tokens, and of the tokens that the teacher read up to the last of them, 0 where
                           these are not known
    losses:                float32, one entry for each label other than -100, in order
    """

    sample_id: int
    label_hash: int
    losses: Sequence[float] | np.ndarray
    text_hash: int = 0


class Values(Protocol):
    """Where the losses themselves are."""

    def at(self, rows: Tensor, slots: Tensor) -> Tensor: ...


class ReferenceLosses:
    """The teacher's loss on every label of a data set (ReGATE, Eq. 1).

    ids:         int64 [n]    sample ids, ascending
    starts:      int64 [n+1]  number of each sample's first label among all labels, by ascending id; last, T
    hashes:      int64 [n]    hash of each sample's label tokens
    texts:       int64 [n]    hash of what the teacher read of each sample, up to its last label; 0 where not known
    about:       what the losses were computed with, by name: teacher, placeholder, ...
    folder:      where the store lies, None in memory
    fingerprint: hash of `about`, of the samples, of their label tokens and of what the teacher read

    An opened store is mapped: it takes no memory in proportion to its size, is shared by all processes of a machine,
    and must not be changed while it is in use. Pickled, it is a path.
    """

    def __init__(
        self,
        ids: Tensor,
        starts: Tensor,
        hashes: Tensor,
        texts: Tensor,
        values: Values,
        about: Mapping[str, Any],
        fingerprint: str,
        folder: Path | None = None,
    ) -> None:
        self.ids = ids
        self.starts = starts
        self.hashes = hashes
        self.texts = texts
        self.about = dict(about)
        self.fingerprint = fingerprint
        self._values = values
        self.folder = folder

    @classmethod
    def of(cls, samples: Iterable[SampleLosses], about: Mapping[str, Any] | None = None) -> Self:
        """A store in memory. Raises `InvalidInput` for a sample id that comes twice and for losses not finite."""
        ordered = sorted(samples, key=lambda sample: sample.sample_id)
        lengths = [len(sample.losses) for sample in ordered]
        losses = [np.asarray(sample.losses, dtype=np.float32) for sample in ordered]
        ids = np.array([sample.sample_id for sample in ordered], np.int64)
        starts = np.array([0, *np.cumsum(lengths)], np.int64)
        hashes = np.array([sample.label_hash for sample in ordered], np.int64)
        texts = np.array([sample.text_hash for sample in ordered], np.int64)
        values = np.concatenate([np.zeros(0, np.float32), *losses])
        check_unique(ids)
        check_finite(ids, starts, values)
        return cls(
            torch.from_numpy(ids),
            torch.from_numpy(starts),
            torch.from_numpy(hashes),
            torch.from_numpy(texts),
            _InMemory(torch.from_numpy(values)),
            about or {},
            label_fingerprint(about or {}, ids, starts, hashes, texts),
        )

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Map a store. The index is checked now, each shard when its losses are first asked for, by each process.

        Raises `StoreMismatch` where the folder holds none, or a file that does not belong to it, and `StoreDamaged`,
        also in `at`, for a file that is not what was written.
        """
        folder = Path(folder).absolute()
        manifest = read_manifest(folder)
        _check_files(folder, manifest["shards"])
        plan = manifest["plan"]
        index = {
            name: torch.from_dlpack(column)
            for name, column in files.read_arrow(
                folder / files.INDEX, manifest["index"], index_belonging(plan)
            ).items()
        }
        starts = index["start"]
        values = _InShards(folder, plan, manifest["shards"], index["shard"], index["offset"], starts)
        return cls(
            index["sample_id"][:-1],
            starts,
            index["label_hash"][:-1],
            index["text_hash"][:-1],
            values,
            manifest["about"],
            manifest["fingerprint"],
            folder,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.folder is None:
            return super().__reduce_ex__(protocol)
        return _reopen, (type(self), self.folder, self.fingerprint)

    @property
    def labels(self) -> int:
        """T."""
        return int(self.starts[-1])

    @property
    def losses(self) -> Tensor:
        """float32 [T]: all losses, read into memory."""
        rows = torch.repeat_interleave(torch.arange(len(self)), self.starts.diff())
        return self.at(rows, torch.arange(self.labels))

    def at(self, rows: Tensor, slots: Tensor) -> Tensor:
        """float32 [K]: the losses of some labels.

        slots: int64 [K], the number of each label among all; rows: int64 [K], the row of its sample, from `find`.
        Raises `StoreDamaged`.
        """
        return self._values.at(rows, slots)

    def of_row(self, row: int) -> Tensor:
        """float32 [labels of the sample]: the losses of the sample in a row. Raises `StoreDamaged`."""
        slots = torch.arange(int(self.starts[row]), int(self.starts[row + 1]))
        return self.at(torch.full_like(slots, row), slots)

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
                "Use the data set, and its ids, that the reference losses were computed for; if it has grown since, "
                "run the teacher pass over all of it in another folder.",
            )
        return rows


@dataclass(frozen=True)
class _InMemory:
    """losses: float32 [T]."""

    losses: Tensor

    def at(self, rows: Tensor, slots: Tensor) -> Tensor:
        return self.losses[slots]


class _InShards:
    """Losses in mapped shards: `shard` and `offset`, int64 [n+1], say in which one and where a sample's begin."""

    def __init__(
        self, folder: Path, plan: str, names: Sequence[str], shard: Tensor, offset: Tensor, starts: Tensor
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._names = names
        self._shard = shard.numpy()
        self._offset = offset.numpy()
        self._starts = starts.numpy()
        self._open: dict[int, np.ndarray] = {}

    def at(self, rows: Tensor, slots: Tensor) -> Tensor:
        row = rows.numpy()
        place = self._offset[row] + (slots.numpy() - self._starts[row])
        shard = self._shard[row]
        found = np.empty(len(row), np.float32)
        for number in np.unique(shard).tolist():
            chosen = np.flatnonzero(shard == number)
            found[chosen] = self._losses(number)[place[chosen]]
        return torch.from_numpy(found)

    def _losses(self, number: int) -> np.ndarray:
        """[labels of the shard], as they are stored."""
        if number not in self._open:
            name = self._names[number]
            digest = name.removesuffix(".arrow").rpartition("-")[2]
            columns = files.read_arrow(self._folder / name, digest, shard_belonging(self._plan, number))
            self._open[number] = columns["losses"].values.to_numpy()
        return self._open[number]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store. Raises `StoreMismatch` where there is none, `StoreDamaged` for a changed one."""
    path = folder / files.MANIFEST
    if not path.is_file():
        raise StoreMismatch(
            str(folder),
            f"it holds no {files.MANIFEST}.",
            "Run the teacher pass; one that was stopped goes on where it was.",
        )
    return files.read_sealed(path)


def missing_files(folder: Path, shards: Iterable[str]) -> list[str]:
    """The names of a store's files that are not there."""
    return sorted({files.INDEX, *shards} - set(os.listdir(folder)))


def shard_belonging(plan: str, window: int) -> str:
    """What the digest of a shard vouches for besides its bytes. plan: digest of the plan."""
    return f"{plan} shard {window}"


def index_belonging(plan: str) -> str:
    """What the digest of an index vouches for besides its bytes."""
    return f"{plan} index"


def label_fingerprint(about: Mapping[str, Any], *columns: np.ndarray) -> str:
    """Hash of what losses were computed with, and of columns int64 [n] of their samples."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for column in columns:
        digest.update(np.ascontiguousarray(column, np.int64).data)
    return digest.hexdigest()


def _check_files(folder: Path, shards: Sequence[str]) -> None:
    for name in missing_files(folder, shards):
        raise StoreDamaged(
            str(folder / name), "it is missing.", "Run the teacher pass again: it computes what is missing."
        )
    own = {files.MANIFEST, files.PLAN, files.INDEX, *shards}
    for name in sorted(os.listdir(folder)):
        if name not in own and not name.startswith("."):
            raise StoreMismatch(
                str(folder / name), "it does not belong to the store in this folder.", "Move it elsewhere."
            )


def check_unique(ids: np.ndarray) -> None:
    """ids: int64 [n], ascending. Raises `InvalidInput` that names those that come twice."""
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if len(repeated):
        raise InvalidInput(
            "sample_id",
            f"{np.unique(repeated)[:5].tolist()} come more than once.",
            "Give every sample its own id; a store is then computed in a new folder.",
        )


def check_finite(ids: np.ndarray, starts: np.ndarray, losses: np.ndarray) -> None:
    """ids: int64 [n]; starts: int64 [n+1]; losses: float [T]. Raises `InvalidInput` that names the sample."""
    broken = np.flatnonzero(~np.isfinite(losses))
    if len(broken):
        row = int(np.searchsorted(starts, broken[0], side="right")) - 1
        raise InvalidInput(
            "losses",
            f"the reference losses of sample {int(ids[row])} are NaN or infinite.",
            "Compute them anew, in a wider dtype if need be.",
        )


def _reopen(kind: type[ReferenceLosses], folder: Path, fingerprint: str) -> ReferenceLosses:
    losses = kind.open(folder)
    if losses.fingerprint != fingerprint:
        raise StoreMismatch(str(folder), "it is another store than before.", "Start again with the new one.")
    return losses
