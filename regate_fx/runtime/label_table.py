"""Which labels a data set has, for policies that need no teacher.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import default_data_collator

from regate_fx.runtime.collate import separate_ids
from regate_fx.runtime.rules import TokenRules, assign_roles, documents
from regate_fx.runtime.samples import label_hash, labels_of
from regate_fx.runtime.store import ReferenceLosses, SampleLosses


def label_table(
    data: Dataset[Any] | Sequence[Any],
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    *,
    special_ids: Iterable[int],
    visual_ids: Iterable[int] = (),
    batch_size: int = 64,
) -> ReferenceLosses:
    """What `ReGate` has to know of a data set besides a teacher's losses: no model runs, nothing is stored.

        table = label_table(data, collator, special_ids=tokenizer.all_special_ids)
        gate = ReGate(table, policy="random", collator=collator)

    For policies that look at no teacher, such as "random" and "loss"; `ReGate` refuses others. The data is read once,
    through the collator; the table lives in memory.

    data:        examples, each a mapping with its own `sample_id`
    collator:    makes a batch of a list of examples without `sample_id`; by default transformers' own
    special_ids: labels that are always counted, such as the end of a sequence
    visual_ids:  input ids that stand for images or video; no model is here to be asked for them

    Raises `InvalidInput` for samples without id, with an id that came before, or without labels.
    """
    about = {
        "teacher": None,
        "special_ids": sorted(map(int, special_ids)),
        "visual_ids": sorted(map(int, visual_ids)),
    }
    collate = collator or default_data_collator
    loader: DataLoader[Any] = DataLoader(data, batch_size=batch_size, collate_fn=_Separate(collate))
    return ReferenceLosses.of((sample for ids, batch in loader for sample in _labels(ids, batch)), about)


def has_teacher(losses: ReferenceLosses) -> bool:
    """Whether a teacher has looked at the data: False for a `label_table`."""
    return losses.about.get("teacher", "not recorded") is not None


class _Separate:
    """Collates examples, their ids apart."""

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self._collator = collator

    def __call__(self, examples: list[Mapping[str, Any]]) -> tuple[Tensor, dict[str, Any]]:
        ids, rest = separate_ids(examples)
        return ids, dict(self._collator(rest))


def _labels(ids: Tensor, batch: Mapping[str, Any]) -> Iterator[SampleLosses]:
    labels = labels_of(batch)
    docs = documents(ids, (labels.shape[0], labels.shape[1]))
    mask = batch.get("attention_mask")
    real = mask != 0 if isinstance(mask, Tensor) and mask.shape == labels.shape else labels == labels
    label = assign_roles(TokenRules(), docs, labels, None, real).label
    counts, hashes = docs.totals(label).tolist(), label_hash(docs, label, labels).tolist()
    for sample_id, hashed, count in zip(ids.tolist(), hashes, counts, strict=True):
        yield SampleLosses(sample_id, hashed, np.zeros(count, np.float32))
