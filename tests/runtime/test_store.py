"""Reference losses on disk and in memory, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from stores import ABOUT, assert_same, random_samples, write_store

from regate_fx.errors import InvalidInput, StoreMismatch
from regate_fx.runtime import ReferenceLosses, SampleLosses
from regate_fx.runtime.rules import TokenRules, documents
from regate_fx.runtime.samples import describe, label_hash
from regate_fx.runtime.store_files import MANIFEST

SAMPLES = [
    SampleLosses(7, 70, [0.5, 1.5]),
    SampleLosses(-3, 30, []),
    SampleLosses(2**40, 10, [4.0]),
    SampleLosses(5, -50, [1.0, 2.0, 3.0]),
]


@pytest.mark.parametrize("per_shard", [1, 2, 3, 100])
def test_what_was_written_is_read(tmp_path: Path, per_shard: int) -> None:
    folder = tmp_path / "new" / "store"
    for losses in (write_store(folder, SAMPLES, per_shard), ReferenceLosses.of(SAMPLES, ABOUT)):
        assert losses.ids.tolist() == [-3, 5, 7, 2**40]
        assert losses.starts.tolist() == [0, 0, 3, 5, 6]
        assert losses.hashes.tolist() == [30, -50, 70, 10]
        assert losses.losses.tolist() == [1.0, 2.0, 3.0, 0.5, 1.5, 4.0]
        assert losses.labels == 6
        assert losses.about == ABOUT
    assert len(list(folder.glob("shard-*.arrow"))) == -(-len(SAMPLES) // per_shard)


def test_losses_of_some_labels_from_several_shards(tmp_path: Path) -> None:
    samples = random_samples(200)
    mapped, in_memory = write_store(tmp_path, samples, 30), ReferenceLosses.of(samples, ABOUT)
    assert_same(mapped, samples)
    rows = torch.repeat_interleave(torch.arange(200), in_memory.starts.diff())
    chosen = torch.randint(mapped.labels, (500,))
    found = mapped.at(rows[chosen], chosen)
    assert torch.equal(found, in_memory.at(rows[chosen], chosen))
    assert torch.equal(found, in_memory.losses[chosen])
    for row in range(0, 200, 7):
        own = in_memory.losses[in_memory.starts[row] : in_memory.starts[row + 1]]
        assert torch.equal(mapped.of_row(row), own)
        assert torch.equal(in_memory.of_row(row), own)


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_is_looked_up_in_mapped_shards_as_in_memory(tmp_path: Path, packed: bool) -> None:
    S = 6
    labels = torch.randint(3, 97, (40, S)).masked_fill(torch.rand(40, S) < 0.3, -100)
    hashes = label_hash(documents(torch.arange(40), (40, S)), labels != -100, labels).tolist()
    samples = [
        SampleLosses(number, hashes[number], torch.rand(int((row != -100).sum())).tolist())
        for number, row in enumerate(labels)
    ]
    mapped, in_memory = write_store(tmp_path, samples, 7), ReferenceLosses.of(samples)
    for _ in range(20):
        ids = torch.randperm(40)[:8]
        batch = {"labels": labels[ids], "sample_id": ids}
        if packed:
            batch = {"labels": labels[ids].view(2, -1), "sample_id": ids.repeat_interleave(S).view(2, -1)}
        found, expected = (describe(batch, TokenRules(), losses) for losses in (mapped, in_memory))
        assert torch.equal(found.reference, expected.reference)
        assert torch.equal(found.slot, expected.slot)
        has_label = batch["labels"] != -100
        assert torch.equal(found.reference[has_label], in_memory.losses[found.slot[has_label]])


def test_an_empty_store(tmp_path: Path) -> None:
    found = write_store(tmp_path, [])
    assert len(found) == found.labels == 0
    assert found.losses.tolist() == []
    with pytest.raises(InvalidInput, match="not among the 0 samples"):
        found.find(torch.tensor([1]))


def test_finding_samples(tmp_path: Path) -> None:
    found = write_store(tmp_path, SAMPLES)
    assert found.find(torch.tensor([2**40, -3, 7, 7])).tolist() == [3, 0, 2, 2]
    with pytest.raises(
        InvalidInput, match=r"sample_id: \[6, 2\] are not among the 4 .* grown since, run"
    ) as caught:
        found.find(torch.tensor([5, 6, 2]))
    assert caught.value.argument == "sample_id"


def test_the_fingerprint_tells_stores_apart() -> None:
    base = ReferenceLosses.of(SAMPLES, ABOUT).fingerprint
    assert base != ReferenceLosses.of(SAMPLES, {"teacher": "u"}).fingerprint
    assert base != ReferenceLosses.of(SAMPLES[:-1], ABOUT).fingerprint
    read_another_prompt = SampleLosses(5, -50, [1.0, 2.0, 3.0], text_hash=1)
    assert base != ReferenceLosses.of([*SAMPLES[:-1], read_another_prompt], ABOUT).fingerprint
    assert base == ReferenceLosses.of(SAMPLES[::-1], ABOUT).fingerprint


def test_a_sample_that_comes_twice(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"sample_id: \[7\] come more than once"):
        ReferenceLosses.of([*SAMPLES, SAMPLES[0]])
    for name, per_shard in (("one shard", 5), ("two shards", 4)):
        with pytest.raises(InvalidInput, match=r"sample_id: \[7\] come more than once.*new folder"):
            write_store(tmp_path / name, [*SAMPLES, SAMPLES[0]], per_shard)
        with pytest.raises(StoreMismatch, match=MANIFEST):
            ReferenceLosses.open(tmp_path / name)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_losses_that_are_not_finite(tmp_path: Path, broken: float) -> None:
    samples = [SampleLosses(9, 0, [1.0]), SampleLosses(7, 0, [1.0, broken]), SampleLosses(3, 0, [])]
    with pytest.raises(InvalidInput, match="reference losses of sample 7 are NaN or infinite"):
        ReferenceLosses.of(samples)
    with pytest.raises(InvalidInput, match="reference losses of sample 7 are NaN or infinite"):
        write_store(tmp_path, samples)


def test_losses_are_float32(tmp_path: Path) -> None:
    assert write_store(tmp_path, [SampleLosses(0, 0, [0.1])]).losses[0] == np.float32(0.1)


def test_losses_as_float16_are_off_by_no_more_than_said(tmp_path: Path) -> None:
    exact = torch.cat([torch.logspace(-12, 4.8, 4000, dtype=torch.float64), torch.tensor([0.0, 65504.0])])
    found = write_store(
        tmp_path / "half", [SampleLosses(0, 0, exact.float().tolist())], losses="float16"
    ).losses
    assert found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= (exact / 2048).clamp(min=2**-25)).all())
    with pytest.raises(
        InvalidInput, match=r"losses_dtype: is float16, .* loss of 70000 \(sample 4\)\. Store float32"
    ):
        write_store(
            tmp_path / "more",
            [SampleLosses(3, 0, [1.0]), SampleLosses(4, 0, [7e4])],
            losses="float16",
        )


def test_a_shard_is_a_data_set(tmp_path: Path) -> None:
    write_store(tmp_path, SAMPLES, 2)
    shard = datasets.Dataset.from_file(str(sorted(tmp_path.glob("shard-00001-*"))[0]))
    assert shard["sample_id"][:] == [2**40, 5]
    assert shard["losses"][:] == [[4.0], [1.0, 2.0, 3.0]]


def test_a_copy_is_the_same_store(tmp_path: Path) -> None:
    samples = random_samples(20)
    found = write_store(tmp_path, samples)
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    for losses in (
        pickle.loads(sent),
        copy.deepcopy(found),
        copy.deepcopy(ReferenceLosses.of(samples, ABOUT)),
    ):
        assert_same(losses, samples)
    for file in tmp_path.iterdir():
        if file.is_file():
            file.unlink()
    write_store(tmp_path, samples[:-1])
    with pytest.raises(StoreMismatch, match="another store than before"):
        pickle.loads(sent)


def test_a_mapped_store_can_be_written_to_without_harm(tmp_path: Path) -> None:
    samples = random_samples(20)
    found = write_store(tmp_path, samples)
    found.ids.add_(1)
    assert_same(ReferenceLosses.open(tmp_path), samples)
