"""Collate a batch and count its tokens, on the host and, where there are any, in the loader's worker processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import default_data_collator

from regate_fx.errors import InvalidInput
from regate_fx.runtime.rules import TokenRules
from regate_fx.runtime.samples import describe
from regate_fx.runtime.store import ReferenceLosses


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


def separate_ids(examples: list[Mapping[str, Any]]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
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
