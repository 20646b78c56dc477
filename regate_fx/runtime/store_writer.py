"""Write a store window by window, in any number of processes and any number of starts.

Shapes: n samples, T labels of all samples together.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import filelock
import numpy as np
import pyarrow as pa

from regate_fx.errors import InvalidInput, StoreDamaged, StoreMismatch, StoreUnwritable
from regate_fx.runtime import store_files as files
from regate_fx.runtime.store import (
    LossType,
    SampleLosses,
    check_finite,
    check_unique,
    index_belonging,
    label_fingerprint,
    missing_files,
    read_manifest,
    shard_belonging,
)
from regate_fx.runtime.store_plan import SAMPLES_PER_SHARD, Plan, check_about, check_samples

__all__ = ["SAMPLES_PER_SHARD", "Plan", "StoreWriter", "is_finished"]

_INTEGER = datasets.Value("int64")


class StoreWriter:
    """One process's hand in a pass over a data set.

        writer = StoreWriter(folder, plan)
        for window in ...:
            if not writer.has(window):
                with writer.claim(window) as mine:
                    if mine and not writer.has(window):
                        writer.write(window, samples)
        writer.publish(windows)

    Windows are claimed by locks that the system releases with the process that holds them, so that a killed process
    leaves nothing behind but an unfinished file under a hidden name, which the next writer of that window overwrites.
    All processes must see the same folder, on a file system with working locks.
    """

    def __init__(self, folder: str | os.PathLike[str], plan: Plan) -> None:
        """Raises `StoreMismatch` where the folder belongs to another plan, `StoreUnwritable` where it cannot be
        written."""
        self._folder = Path(folder)
        self._plan = plan.content()
        self._digest = files.checksum_of(self._plan)
        self._losses = plan.losses
        try:
            (self._folder / files.LOCKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.unwritable(self._folder, error) from error
        with self._locked("plan"):
            self._agree()

    def _agree(self) -> None:
        path = self._folder / files.PLAN
        if not path.exists():
            files.publish_sealed(path, self._plan)
            return
        found = files.read_sealed(path)
        if found != self._plan:
            check_about(self._folder, found["about"], self._plan["about"])
            check_samples(self._folder, found["samples"], self._plan["samples"], finished=False)
            differing = [name for name in self._plan if found.get(name) != self._plan[name]]
            raise StoreMismatch(
                str(self._folder),
                f"the pass that was begun there has another {', '.join(differing)}: "
                + "; ".join(f"{name} {found.get(name)!r}, now {self._plan[name]!r}" for name in differing)
                + ".",
                "Go on with the settings it was begun with, or choose another folder.",
            )

    def shards(self) -> dict[int, str]:
        """The name of each window's shard, of all that are published. Raises `StoreMismatch` for a window with two."""
        found: dict[int, str] = {}
        for name in sorted(os.listdir(self._folder)):
            window = files.window_of(name)
            if window is None:
                continue
            if window in found:
                raise StoreMismatch(
                    str(self._folder / name),
                    f"the window has another shard, {found[window]}.",
                    "Delete the one that does not belong to this store, or both: they are computed anew.",
                )
            found[window] = name
        return found

    def has(self, window: int) -> bool:
        """Whether the window's shard is published."""
        return window in self.shards()

    @contextlib.contextmanager
    def claim(self, window: int) -> Iterator[bool]:
        """Whether nobody else is at work on the window; if so, nobody will be while the context lasts."""
        with self._locked(f"{window:05d}", wait=False) as mine:
            yield mine

    def write(self, window: int, samples: Sequence[SampleLosses]) -> None:
        """Publish the shard of a claimed window, its samples in the order of the data.

        Raises `InvalidInput` for a sample id that comes twice in it and for losses that cannot be stored,
        `StoreUnwritable` where the folder refuses it.
        """
        content = files.arrow_bytes(_columns(samples, self._losses))
        name = files.shard_name(window, files.digest_of(content, shard_belonging(self._digest, window)))
        files.publish(self._folder / name, content, unfinished=f".shard-{window:05d}.unfinished")

    def read(self, window: int) -> dict[str, pa.Array]:
        """The columns of a published shard. Raises `StoreDamaged`."""
        name = self.shards()[window]
        digest = name.removesuffix(".arrow").rpartition("-")[2]
        return files.read_arrow(self._folder / name, digest, shard_belonging(self._digest, window))

    def publish(self, windows: int) -> None:
        """Make a store of the shards of all `windows`, unless another process has done so.

        Raises `InvalidInput` for a sample id that comes twice, `StoreDamaged` for a shard that is missing or damaged,
        `StoreMismatch` for one too many.
        """
        with self._locked("manifest"):
            if not is_finished(self._folder):
                self._publish(windows)

    def _publish(self, windows: int) -> None:
        shards = self.shards()
        for window in range(windows):
            if window not in shards:
                raise StoreDamaged(
                    str(self._folder),
                    f"the shard of window {window} is missing.",
                    "Run the teacher pass again.",
                )
        for window, name in shards.items():
            if window >= windows:
                raise StoreMismatch(
                    str(self._folder / name),
                    f"the data set has only {windows} windows of {self._plan['samples_per_shard']} samples.",
                    "Run the pass over the data set that it was begun with, or choose another folder.",
                )
        index, fingerprint = _index([self.read(window) for window in range(windows)], self._plan)
        content = files.arrow_bytes({name: (_INTEGER, column) for name, column in index.items()})
        files.publish(self._folder / files.INDEX, content)
        manifest = {
            "about": self._plan["about"],
            "fingerprint": fingerprint,
            "losses": self._losses,
            "samples": len(index["sample_id"]) - 1,
            "plan": self._digest,
            "shards": [shards[window] for window in range(windows)],
            "index": files.digest_of(content, index_belonging(self._digest)),
        }
        files.publish_sealed(self._folder / files.MANIFEST, manifest)

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        path = self._folder / files.LOCKS / f"{name}.lock"
        lock = filelock.FileLock(path)
        try:
            lock.acquire(blocking=wait)
        except filelock.Timeout:
            yield False
            return
        except NotImplementedError as error:
            raise StoreUnwritable(
                str(path), "the file system has no locks.", "Choose a folder on another one."
            ) from error
        except OSError as error:
            raise files.unwritable(path, error) from error
        try:
            yield True
        finally:
            lock.release()


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a manifest and all that it names. Raises `StoreDamaged` for a changed manifest."""
    if not (folder / files.MANIFEST).exists():
        return False
    return not missing_files(folder, read_manifest(folder)["shards"])


def _columns(samples: Sequence[SampleLosses], losses: LossType) -> dict[str, tuple[Any, pa.Array]]:
    ids = np.fromiter((sample.sample_id for sample in samples), np.int64, len(samples))
    check_unique(np.sort(ids))
    lengths = np.fromiter((len(sample.losses) for sample in samples), np.int64, len(samples))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    exact = [np.asarray(sample.losses, dtype=np.float32) for sample in samples]
    stored = _stored(np.concatenate([np.zeros(0, np.float32), *exact]), losses, ids, offsets)
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(stored))
    return {
        "sample_id": (_INTEGER, pa.array(ids)),
        "label_hash": (_INTEGER, _integers(sample.label_hash for sample in samples)),
        "text_hash": (_INTEGER, _integers(sample.text_hash for sample in samples)),
        "losses": (datasets.LargeList(datasets.Value(losses)), lists),
    }


def _integers(values: Iterator[int]) -> pa.Array:
    return pa.array(values, pa.int64())


def _stored(losses: np.ndarray, kind: LossType, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Losses float32 [T] as they are stored. Raises `InvalidInput` where that has no room for one."""
    check_finite(ids, starts, losses)
    with np.errstate(over="ignore"):
        stored = losses.astype(kind)
    beyond = np.flatnonzero(~np.isfinite(stored))
    if len(beyond):
        sample = int(ids[np.searchsorted(starts, beyond[0], side="right") - 1])
        raise InvalidInput(
            "losses_dtype",
            f"is {kind}, which has no room for a reference loss of {losses[beyond[0]]:g} (sample {sample}).",
            "Store float32.",
        )
    return stored


def _index(
    shards: Sequence[Mapping[str, pa.Array]], plan: Mapping[str, Any]
) -> tuple[dict[str, pa.Array], str]:
    """Where each sample is, by ascending id; and the fingerprint of the store.

    One row more than samples: in the last, `start` is where the labels of the last sample end.
    """

    def of_all(column: str) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(shard[column].to_numpy() for shard in shards)])

    ids = of_all("sample_id")
    offsets = [shard["losses"].offsets.to_numpy() for shard in shards]
    order = np.argsort(ids, kind="stable")
    check_unique(ids[order])
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(offset) for offset in offsets)])[order]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    hashes, texts = of_all("label_hash")[order], of_all("text_hash")[order]
    numbers = np.repeat(np.arange(len(shards)), [len(shard["sample_id"]) for shard in shards])
    places = np.concatenate([np.zeros(0, np.int64), *(offset[:-1] for offset in offsets)])
    columns = {
        "sample_id": ids[order],
        "label_hash": hashes,
        "text_hash": texts,
        "start": starts[:-1],
        "shard": numbers[order],
        "offset": places[order],
    }
    last = {"start": starts[-1]}
    index = {name: pa.array(np.append(column, last.get(name, 0))) for name, column in columns.items()}
    return index, label_fingerprint(plan["about"], ids[order], starts, hashes, texts)
