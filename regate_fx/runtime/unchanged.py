"""Whether the data are those that a teacher pass saw: compared by ids and by hashes of tokens, without the teacher.

Shapes: B rows, S positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from regate_fx.errors import StoreMismatch
from regate_fx.runtime.batches import Batch, Batching, Example
from regate_fx.runtime.rules import NO_LABEL, documents
from regate_fx.runtime.store import ReferenceLosses, SampleLosses, check_unique
from regate_fx.runtime.store_writer import StoreWriter
from regate_fx.runtime.token_hashes import NOT_KNOWN, label_hash, text_hash
from regate_fx.runtime.windows import Windows

_LOOKED_AT = 16
_REMEDY = "Go on with the same data, tokenizer and collator, or choose another folder."


def identified(batch: Batch, losses: Tensor) -> Iterator[SampleLosses]:
    """The samples of a batch with their losses, float32 [B, S]."""
    labels: Tensor = batch.inputs["labels"]
    docs = documents(batch.ids, (labels.shape[0], labels.shape[1]))
    real = is_real(batch.inputs)
    label = (labels != NO_LABEL) & real
    ids = batch.inputs.get("input_ids")
    hashes = label_hash(docs, label, labels)
    texts = text_hash(docs, label, real, ids if isinstance(ids, Tensor) else None)
    for row, sample_id in enumerate(batch.ids.tolist()):
        yield SampleLosses(sample_id, int(hashes[row]), losses[row, label[row]].numpy(), int(texts[row]))


def is_real(inputs: Mapping[str, Any]) -> Tensor:
    """bool [B, S]: the positions that are no padding."""
    mask, labels = inputs.get("attention_mask"), inputs["labels"]
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        return mask != 0
    return torch.ones_like(labels, dtype=torch.bool)


def _identity(batching: Batching, example: Example) -> SampleLosses:
    """What is known of an example without asking the teacher."""
    batch = batching.batch([(0, example)])
    (sample,) = identified(batch, torch.zeros(batch.inputs["labels"].shape))
    return sample


class UnchangedWindows:
    """Compares a window that was computed at an earlier start with the data as they are now."""

    def __init__(self, writer: StoreWriter, windows: Windows, batching: Batching, folder: Path) -> None:
        self._writer = writer
        self._windows = windows
        self._batching = batching
        self._folder = folder

    def __call__(self, window: int, examples: Iterator[Example]) -> None:
        stored = self._writer.read(window)
        now = _identity(self._batching, next(examples))
        before = {name: stored[name][0].as_py() for name in ("sample_id", "label_hash", "text_hash")}
        differing = [name for name in ("sample_id", "label_hash") if getattr(now, name) != before[name]]
        differing += ["text_hash"] if _texts_differ(now.text_hash, before["text_hash"]) else []
        if differing:
            raise StoreMismatch(
                str(self._folder),
                f"the data set is not the one that the pass was begun with: sample {before['sample_id']} came first "
                f"in window {window}, now sample {now.sample_id} does, and {', '.join(differing)} differs.",
                _REMEDY,
            )
        if self._windows.samples is None:
            count = 1 + sum(1 for _ in examples)
            if count != len(stored["sample_id"]):
                raise StoreMismatch(
                    str(self._folder),
                    f"window {window} of the data set had {len(stored['sample_id'])} samples when the pass was begun, "
                    f"it now has {count}.",
                    "Go on with the data set as it was, or choose another folder.",
                )


def check_some(losses: ReferenceLosses, data: Any, samples: int | None, batching: Batching) -> None:
    """Compare a finished store with a few samples of the data, spread over all of it, of a stream the first.

    Every sample is compared when a batch of it is collated; this finds another tokenizer, prompt or collator before
    training begins. Raises `StoreMismatch`.
    """
    for example in _some(data, samples):
        now = _identity(batching, example)
        row = int(losses.find(torch.tensor([now.sample_id])))
        labels_differ = now.label_hash != int(losses.hashes[row])
        if labels_differ or _texts_differ(now.text_hash, int(losses.texts[row])):
            what = "label tokens" if labels_differ else "tokens before its labels"
            raise StoreMismatch(
                str(losses.folder),
                f"its teacher pass was over other data: sample {now.sample_id} has other {what} now.",
                _REMEDY,
            )


def _texts_differ(one: int, other: int) -> bool:
    return one != other and NOT_KNOWN not in (one, other)


def _some(data: Any, samples: int | None) -> Iterator[Example]:
    if samples is None:
        return itertools.islice(iter(data), _LOOKED_AT)
    return (data[row] for row in range(0, samples, -(-samples // _LOOKED_AT) or 1))


def check_ids(data: Any) -> None:
    """Raises `InvalidInput` for ids that come twice, where a data set has them in a column: before hours of work."""
    if isinstance(data, datasets.Dataset) and "sample_id" in data.column_names:
        check_unique(np.sort(data.with_format("numpy")["sample_id"][:]))
