"""Reference losses on disk and in memory, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from regate_fx.errors import InvalidInput, StoreMismatch
from regate_fx.runtime import ReferenceLosses, SampleLosses, store
from regate_fx.runtime.store import MANIFEST, StoreWriter

SAMPLES = [
    SampleLosses(7, 70, [0.5, 1.5]),
    SampleLosses(-3, 30, []),
    SampleLosses(2**40, 10, [4.0]),
    SampleLosses(5, -50, [1.0, 2.0, 3.0]),
]


def written(folder: Path, samples: Iterable[SampleLosses]) -> ReferenceLosses:
    with StoreWriter(folder, {"teacher": "t"}) as writer:
        for sample in samples:
            writer.write(sample)
    return ReferenceLosses.open(folder)


@pytest.mark.parametrize("per_shard", [1, 2, 3, 100])
def test_what_was_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_shard: int) -> None:
    monkeypatch.setattr(store, "SAMPLES_PER_SHARD", per_shard)
    found = written(tmp_path / "new" / "store", SAMPLES)
    in_memory = ReferenceLosses.of(SAMPLES, {"teacher": "t"})
    for losses in (found, in_memory):
        assert losses.ids.tolist() == [-3, 5, 7, 2**40]
        assert losses.starts.tolist() == [0, 0, 3, 5, 6]
        assert losses.hashes.tolist() == [30, -50, 70, 10]
        assert losses.losses.tolist() == [1.0, 2.0, 3.0, 0.5, 1.5, 4.0]
        assert losses.about == {"teacher": "t"}
    assert found.fingerprint == in_memory.fingerprint
    assert len(list((tmp_path / "new" / "store").glob("*.arrow"))) == -(-len(SAMPLES) // per_shard)


def test_an_empty_store(tmp_path: Path) -> None:
    found = written(tmp_path, [])
    assert len(found) == 0
    with pytest.raises(InvalidInput, match="not among the 0 samples"):
        found.find(torch.tensor([1]))


def test_finding_samples(tmp_path: Path) -> None:
    found = written(tmp_path, SAMPLES)
    assert found.find(torch.tensor([2**40, -3, 7, 7])).tolist() == [3, 0, 2, 2]
    with pytest.raises(InvalidInput, match=r"sample_id: \[6, 2\] are not among the 4 samples") as caught:
        found.find(torch.tensor([5, 6, 2]))
    assert caught.value.argument == "sample_id"


def test_the_fingerprint_tells_stores_apart() -> None:
    base = ReferenceLosses.of(SAMPLES, {"teacher": "t"}).fingerprint
    assert base != ReferenceLosses.of(SAMPLES, {"teacher": "u"}).fingerprint
    assert base != ReferenceLosses.of(SAMPLES[:-1], {"teacher": "t"}).fingerprint
    assert base == ReferenceLosses.of(SAMPLES[::-1], {"teacher": "t"}).fingerprint


def test_a_sample_that_comes_twice() -> None:
    with pytest.raises(InvalidInput, match=r"sample_id: \[7\] come more than once"):
        ReferenceLosses.of([*SAMPLES, SAMPLES[0]])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_losses_that_are_not_finite(broken: float) -> None:
    with pytest.raises(InvalidInput, match="reference losses of sample 7 are NaN or infinite"):
        ReferenceLosses.of([SAMPLES[0], SampleLosses(9, 0, [1.0]), SampleLosses(7, 0, [1.0, broken])][1:])


def test_a_folder_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreMismatch, match=MANIFEST):
        ReferenceLosses.open(tmp_path)


def test_a_pass_that_was_stopped_leaves_no_store(tmp_path: Path) -> None:
    def samples() -> Iterator[SampleLosses]:
        yield SAMPLES[0]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        written(tmp_path, samples())
    with pytest.raises(StoreMismatch, match="stopped has to run again"):
        ReferenceLosses.open(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    written(tmp_path, SAMPLES)
    next(tmp_path.glob("*.arrow")).unlink()
    with pytest.raises(StoreMismatch, match=r"shard-00000\.arrow is missing"):
        ReferenceLosses.open(tmp_path)


def test_a_changed_manifest(tmp_path: Path) -> None:
    written(tmp_path, SAMPLES)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["about"]["teacher"] = "another"
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StoreMismatch, match="was changed"):
        ReferenceLosses.open(tmp_path)


def test_a_store_is_not_written_over(tmp_path: Path) -> None:
    written(tmp_path, SAMPLES)
    with pytest.raises(StoreMismatch, match="holds a store already"), StoreWriter(tmp_path, {}):
        pass
    assert len(ReferenceLosses.open(tmp_path)) == len(SAMPLES)


def test_losses_are_float32(tmp_path: Path) -> None:
    exact = np.float32(0.1)
    assert written(tmp_path, [SampleLosses(0, 0, [0.1])]).losses[0] == exact
