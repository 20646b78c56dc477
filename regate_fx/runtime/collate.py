"""Collate a batch and count its tokens, on the host and, where there are any, in the loader's worker processes; and
recognise it when it comes to the gate.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import default_data_collator

from regate_fx.errors import InvalidInput
from regate_fx.runtime.late import LateChecks
from regate_fx.runtime.rules import TokenRules
from regate_fx.runtime.samples import Samples, describe, labels_of
from regate_fx.runtime.store import ReferenceLosses

_COLLATE_LAST = "Change, sort and cut batches before `gate.collate` sees them, or pass plain ids."


@dataclass(frozen=True)
class Collator:
    """A `collate_fn`: takes `sample_id` out of the examples, collates the rest, and adds `Samples` under that name.

    Raises `InvalidInput` where an example has no `sample_id`, and as `describe` does.
    """

    rules: TokenRules
    losses: ReferenceLosses
    inner: Callable[[list[Any]], Mapping[str, Any]] | None = None

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        ids, rest = separate_ids(examples)
        batch = dict((self.inner or default_data_collator)(rest))
        return batch | {"sample_id": describe(batch | {"sample_id": ids}, self.rules, self.losses)}


def separate_ids(examples: list[Mapping[str, Any]]) -> tuple[Tensor, list[dict[str, Any]]]:
    """The sample ids of a list of examples, int64 [B], and the examples without them. Raises `InvalidInput`."""
    for example in examples:
        if "sample_id" not in example:
            raise InvalidInput(
                "sample_id",
                f"is missing from an example with {sorted(example)}.",
                "Give every example of the data set its own integer; trainers may need "
                "remove_unused_columns=False to keep it.",
            )
    ids = torch.tensor([int(example["sample_id"]) for example in examples])
    return ids, [
        {name: value for name, value in example.items() if name != "sample_id"} for example in examples
    ]


def samples_of(
    batch: Mapping[str, Any], rules: TokenRules, losses: ReferenceLosses, late: LateChecks
) -> Samples:
    """The samples of a batch, on the device of its labels: those that were collated with it, or worked out now.

    Raises `InvalidInput`, see `describe`, and where rows of the batch are others than those that were collated: by
    `late`, so that such rows are not observed on an accelerator, whose error comes with a later batch.
    """
    labels = labels_of(batch)
    samples = batch.get("sample_id")
    if not isinstance(samples, Samples):
        return _on(labels.device, describe(batch, rules, losses))
    if labels.shape != samples.slot.shape:
        raise InvalidInput(
            "sample_id",
            f"was collated for labels {list(samples.slot.shape)}, these are {list(labels.shape)}.",
            _COLLATE_LAST,
        )
    samples = _on(labels.device, samples)
    other, ids = samples.other_rows(batch), samples.ids
    late.check(other, lambda found: _other_rows(found, ids))
    return samples if labels.device.type == "cpu" else samples.without(other)


def _on(device: torch.device, samples: Samples) -> Samples:
    return samples if samples.slot.device == device else samples.to(device, non_blocking=True)


def _other_rows(other: Tensor, ids: Tensor) -> InvalidInput:
    """other: bool [B], rows with other tokens than were collated; ids: int64 [B, S]; both on the host."""
    row = int(other.nonzero()[0])
    return InvalidInput(
        "sample_id",
        f"row {row} of the batch holds other tokens than when it was collated for sample {int(ids[row, 0])} "
        f"({int(other.sum())} such rows): what is known of one sample would be used for another. No difficulty was "
        "changed.",
        _COLLATE_LAST,
    )
