"""Batches of samples of similar length, within a budget of rows and positions.

Shapes: B rows, S positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.runtime.collate import separate_ids

Example = Mapping[str, Any]

# Sorting needs examples at hand, pictures and all: a few hundred, not a window of them.
POOL = 256


@dataclass(frozen=True)
class Batch:
    """A collated batch. places: where its examples were in what was batched; ids: int64 [B]; inputs: with `labels`."""

    places: list[int]
    ids: Tensor
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Batching:
    """How examples become batches.

    collate: makes a batch of a list of examples without `sample_id`
    rows:    most rows of a batch
    tokens:  most positions of a batch, padding included, None for any number; a longer sample is a batch by itself
    """

    collate: Callable[[list[Any]], Mapping[str, Any]]
    rows: int
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.rows), ("max_tokens_per_batch", self.tokens)):
            if value is not None and value < 1:
                raise InvalidInput(name, f"is {value}.", "Give at least 1.")

    def batches(self, examples: Iterable[Example]) -> Iterator[Batch]:
        """All examples, those of a few hundred neighbours ordered by length. Raises `InvalidInput`, see `batch`."""
        numbered = enumerate(examples)
        while pool := list(itertools.islice(numbered, max(POOL, self.rows))):
            pool.sort(key=lambda item: _length(item[1]))
            for group in self._groups(pool):
                yield from self._within_budget(group)

    def batch(self, numbered: list[tuple[int, Example]]) -> Batch:
        """Collate examples, each with its place. Raises `InvalidInput` unless that makes labels for a row of each."""
        ids, rest = separate_ids([example for _, example in numbered])
        inputs = dict(self.collate(rest))
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise InvalidInput("labels", "the collator made no labels [B, S].", "Collate them with the rest.")
        if len(labels) != len(ids):
            raise InvalidInput(
                "collator",
                f"made {len(labels)} rows of {len(ids)} examples.",
                "Run the teacher pass on one sample a row; training may pack them.",
            )
        return Batch([place for place, _ in numbered], ids, inputs)

    def _groups(self, pool: list[tuple[int, Example]]) -> Iterator[list[tuple[int, Example]]]:
        group: list[tuple[int, Example]] = []
        for place, example in pool:
            # Ascending, so that this example is the longest so far.
            full = len(group) == self.rows or self._exceeds(len(group) + 1, example)
            if group and full:
                yield group
                group = []
            group.append((place, example))
        yield group

    def _exceeds(self, rows: int, longest: Example) -> bool:
        return self.tokens is not None and "input_ids" in longest and rows * _length(longest) > self.tokens

    def _within_budget(self, group: list[tuple[int, Example]]) -> Iterator[Batch]:
        """The group in one batch, or in halves where only collating shows that it is too large."""
        batch = self.batch(group)
        if self.tokens is None or len(group) == 1 or batch.inputs["labels"].numel() <= self.tokens:
            yield batch
            return
        for half in (group[: len(group) // 2], group[len(group) // 2 :]):
            yield from self._within_budget(half)


def _length(example: Example) -> int:
    """Tokens of an example, or the size of its text where it is tokenized in the collator."""
    ids = example.get("input_ids")
    return _characters(example) if ids is None else len(ids)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(part) for part in value.values())
    return sum(_characters(part) for part in value) if isinstance(value, list | tuple) else 0
