"""Data cut into windows and batches, and windows shared between processes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stores import ABOUT, assert_same, random_samples, write_store

from regate_fx.errors import InvalidInput
from regate_fx.runtime import ReferenceLosses, SampleLosses
from regate_fx.runtime.batches import Batching
from regate_fx.runtime.store_writer import Plan, StoreWriter
from regate_fx.runtime.windows import Windows, fill


class Stream:
    """An iterable that counts how often it was read, and how far."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            self.read += 1
            yield item


@pytest.mark.parametrize("count", [0, 1, 5, 6])
def test_a_stream_has_the_windows_of_a_sequence(count: int) -> None:
    items = list(range(count))
    of_sequence = {window: list(examples) for window, examples in Windows(items, 3).sweep(1)}
    assert dict(sorted(of_sequence.items())) == {
        begin // 3: items[begin : begin + 3] for begin in range(0, count, 3)
    }
    assert {window: list(examples) for window, examples in Windows(Stream(items), 3).sweep(1)} == of_sequence
    untouched = [window for window, _ in Windows(Stream(items), 3).sweep()]
    assert untouched == sorted(of_sequence)


def test_a_sequence_is_read_from_any_window_and_only_where_asked() -> None:
    read: list[int] = []

    class Counted(list[int]):
        def __getitem__(self, row: Any) -> Any:
            read.append(row)
            return super().__getitem__(row)

    data = Counted(range(8))
    for window, examples in Windows(data, 3).sweep(2):
        if window == 1:
            assert list(examples) == [3, 4, 5]
    assert read == [3, 4, 5]
    assert [window for window, _ in Windows(data, 3).sweep(2)] == [2, 0, 1]


def test_what_can_be_read_once_is_refused() -> None:
    with pytest.raises(InvalidInput, match="data: is an iterator"):
        Windows(iter([1, 2]), 3)
    with pytest.raises(InvalidInput, match="samples_per_shard: is 0"):
        Windows([1, 2], 0)


@pytest.mark.parametrize(
    ("samples", "size", "count"),
    [
        (0, 500, 0),
        (500, 500, 1),
        (4_000, 500, 8),
        (128_001, 501, 256),
        (1_000_000, 3_907, 256),
        (10_000_000, 20_000, 500),
    ],
)
def test_windows_are_small_enough_to_share_and_few_enough_to_list(
    samples: int, size: int, count: int
) -> None:
    windows = Windows(range(samples))
    assert (windows.size, windows.count) == (size, count)
    assert Windows(Stream(range(samples))).size == 5_000


def test_data_sets_are_told_from_streams() -> None:
    rows = datasets.Dataset.from_dict({"x": [1, 2, 3, 4]})
    assert Windows(rows, 3).samples == 4
    assert Windows(rows.to_iterable_dataset(), 3).samples is None

    class OfTorch(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(4)

        def __len__(self) -> int:
            return 4

    assert [list(examples) for _, examples in Windows(OfTorch(), 3).sweep()] == [[0, 1, 2], [3]]


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    samples = random_samples(11)
    writer = StoreWriter(tmp_path, Plan(ABOUT, None, 3))
    for window in (0, 2):
        writer.write(window, samples[3 * window : 3 * window + 3])
    scored: list[SampleLosses] = []
    checked: list[tuple[int, int]] = []
    passed: list[int] = []

    def score(examples: Iterator[SampleLosses]) -> list[SampleLosses]:
        found = list(examples)
        scored.extend(found)
        return found

    count = fill(
        writer,
        Windows(Stream(samples), 3),
        score,
        lambda window, examples: checked.append((window, len(list(examples)))),
        passed=passed.append,
    )
    writer.publish(count)
    assert count == 4
    assert scored == [*samples[3:6], *samples[9:]]
    assert checked == [(0, 3), (2, 3)]
    assert passed == [0, 2]
    assert_same(ReferenceLosses.open(tmp_path), samples)


def test_ranks_start_apart_and_check_what_is_theirs(tmp_path: Path) -> None:
    samples = random_samples(12)
    first: list[SampleLosses] = []
    for rank in range(3):
        folder = tmp_path / str(rank)
        writer = StoreWriter(folder, Plan(ABOUT, 12, 2))
        order: list[int] = []

        def score(examples: Iterator[SampleLosses], order: list[int] = order) -> list[SampleLosses]:
            found = list(examples)
            order.append(samples.index(found[0]) // 2)
            return found

        fill(writer, Windows(samples, 2), score, rank=rank, ranks=3)
        assert sorted(order) == list(range(6))
        first.append(samples[2 * order[0]])
        checked: list[int] = []
        fill(
            writer,
            Windows(samples, 2),
            score,
            lambda window, _, checked=checked: checked.append(window),
            rank=rank,
            ranks=3,
        )
        assert sorted(checked) == [rank, rank + 3]
    assert first == [samples[0], samples[4], samples[8]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", [list, Stream])
def test_two_processes_share_the_work(tmp_path: Path, kind: Any) -> None:
    samples = random_samples(40)
    children = []
    for number in range(2):
        child = os.fork()
        if not child:
            status = 1
            try:
                compute_with_another(tmp_path, number, kind(samples))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    computed = [[int(line) for line in (tmp_path / f"log-{n}").read_text().split()] for n in range(2)]
    assert all(computed)
    assert sorted(computed[0] + computed[1]) == [
        sample.sample_id for sample in sorted(samples[::4], key=lambda sample: sample.sample_id)
    ]
    assert_same(ReferenceLosses.open(tmp_path / "store"), samples)


def compute_with_another(folder: Path, number: int, data: Any) -> None:
    """Be at work on a window while the other process is on another, then on."""
    log, other = folder / f"log-{number}", folder / f"log-{1 - number}"
    writer = StoreWriter(folder / "store", Plan(ABOUT, None, 4))

    def score(examples: Iterator[SampleLosses]) -> list[SampleLosses]:
        found = list(examples)
        with open(log, "a") as file:
            file.write(f"{found[0].sample_id}\n")
        while not other.exists():
            time.sleep(0.001)
        return found

    writer.publish(fill(writer, Windows(data, 4), score))


def test_a_window_that_someone_else_holds_is_waited_for(tmp_path: Path) -> None:
    samples = random_samples(9)
    theirs = StoreWriter(tmp_path, Plan(ABOUT, 9, 3))
    with theirs.claim(1) as mine:
        assert mine
        with StoreWriter(tmp_path, Plan(ABOUT, 9, 3)).claim(1) as second:
            assert not second
    assert_same(write_store(tmp_path, samples), samples)


def test_a_window_published_between_the_look_and_the_lock_is_not_computed(tmp_path: Path) -> None:
    samples = random_samples(6)

    class Overtaken(StoreWriter):
        @contextlib.contextmanager
        def claim(self, window: int) -> Iterator[bool]:
            StoreWriter(tmp_path, Plan(ABOUT, 6, 3)).write(window, samples[3 * window : 3 * window + 3])
            with super().claim(window) as mine:
                yield mine

    def score(examples: Iterator[SampleLosses]) -> list[SampleLosses]:
        raise AssertionError("computed again")

    writer = Overtaken(tmp_path, Plan(ABOUT, 6, 3))
    writer.publish(fill(writer, Windows(samples, 3), score))
    assert_same(ReferenceLosses.open(tmp_path), samples)


def collate(examples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    S = max(len(example["input_ids"]) for example in examples)
    rows = [example["input_ids"] + [0] * (S - len(example["input_ids"])) for example in examples]
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 6),
    st.none() | st.integers(1, 90),
    st.booleans(),
)
def test_batches_keep_to_the_budget_and_lose_nothing(
    lengths: list[int], rows: int, tokens: int | None, tokenized: bool
) -> None:
    """Whether the lengths are known beforehand or only from what the collator makes."""
    examples = [
        {"sample_id": 5 * n, **({"input_ids": [n + 1] * size} if tokenized else {"text": "w " * size})}
        for n, size in enumerate(lengths)
    ]

    def tokenize(given: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return collate([{"input_ids": e.get("input_ids") or [1] * (len(e["text"]) // 2)} for e in given])

    batches = list(Batching(tokenize, rows, tokens).batches(examples))
    places = [place for batch in batches for place in batch.places]
    assert sorted(places) == list(range(len(lengths)))
    for batch in batches:
        B, S = batch.inputs["labels"].shape
        assert batch.ids.tolist() == [5 * place for place in batch.places]
        assert max(lengths[place] for place in batch.places) == S
        assert rows >= B
        assert tokens is None or B == 1 or tokens >= B * S
    assert [lengths[place] for place in places] == sorted(lengths)


def test_batches_that_cannot_be_scored_are_refused() -> None:
    examples = [{"sample_id": n, "input_ids": [1, 2]} for n in range(4)]

    def packed(given: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return {"labels": torch.ones(1, 2 * len(given), dtype=torch.int64)}

    with pytest.raises(InvalidInput, match="collator: made 1 rows of 4 examples"):
        list(Batching(packed, 8).batches(examples))
    with pytest.raises(InvalidInput, match="labels: the collator made no labels"):
        list(Batching(lambda given: {}, 8).batches(examples))
    for name, arguments in {"batch_size": (0,), "max_tokens_per_batch": (1, 0)}.items():
        with pytest.raises(InvalidInput, match=f"{name}: is 0"):
            Batching(collate, *arguments)
