"""The teacher pass: one look of the frozen, text-only model at every sample, before training (ReGATE, Eq. 1).

Shapes: B rows, S positions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import default_data_collator

from regate_fx.runtime import identity, ranks
from regate_fx.runtime.batches import POOL, Batch, Batching, Example
from regate_fx.runtime.progress import PassProgress
from regate_fx.runtime.store import LossType, ReferenceLosses, SampleLosses, read_manifest
from regate_fx.runtime.store_files import MANIFEST
from regate_fx.runtime.store_plan import Plan, check_about, check_samples
from regate_fx.runtime.store_writer import StoreWriter, is_finished
from regate_fx.runtime.text_only import TextOnly, visual_token_ids
from regate_fx.runtime.unchanged import UnchangedWindows, check_ids, check_some, identified, is_real
from regate_fx.runtime.windows import Windows, fill

_ROWS = 8


def teacher_losses(
    model: nn.Module,
    data: Iterable[Any],
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    teacher: nn.Module | None = None,
    teacher_tokenizer: Any = None,
    special_ids: Sequence[int] | None = None,
    visual_ids: Sequence[int] | None = None,
    placeholder_id: int | None = None,
    shifted: bool = True,
    batch_size: int | None = None,
    max_tokens_per_batch: int | None = None,
    samples_per_shard: int | None = None,
    dtype: torch.dtype | None = None,
    losses_dtype: LossType = "float32",
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ReferenceLosses:
    """The teacher's loss on every label of `data`, read from `folder` or computed and stored there.

    A pass that was stopped, however, goes on where it was: a finished shard is not computed again. Before losses that
    are there are used, a few samples of `data` are compared with those that the teacher read. Any number of
    processes may call this with the same arguments and folder (the ranks of `accelerate launch`, or several starts by
    hand); each takes shards that nobody has, and all return when all are done. They must see the same folder, on a
    file system with locks; each needs the whole model. The model stays on the device where it is.

    model:         the student as it will be trained; without `teacher` its own backbone, frozen as it is now, is the
                   teacher: the same sequence and positions, visual tokens replaced by the placeholder
    data:          examples, each a mapping with its own `sample_id`: a sequence or data set of known length, or an
                   iterable one that gives the same examples in the same order each time it is read
    tokenizer:     or processor; tells special ids and the placeholder (padding, else end of sequence); else the config
    collator:      makes a batch of a list of examples without `sample_id`, a row of each; by default transformers' own
    teacher:       another causal model, with `teacher_tokenizer`, of the student's vocabulary
    special_ids:   labels that are always counted; visual_ids: input ids that stand for pictures; both recorded
    shifted:       the teacher predicts label t at position t - 1
    batch_size:    most rows of a batch, 8 by default; with `max_tokens_per_batch`, most positions of a batch, padding
                   included, which is what decides memory, 256
    samples_per_shard: the unit of work, and what a process loses at most when it is killed; by default 1/256 of the
                   data, at least 500 and at most 20,000, or 5,000 of a stream
    dtype:         run under autocast to this dtype, such as torch.bfloat16
    losses_dtype:  "float32", or "float16" for half the space: a loss x is then off by at most
                   max(x / 2048, 2 ** -25), and one above 65504 is refused
    settings:      what else decides the tokens, such as the length to which the collator truncates; recorded, compared

    Raises `InvalidInput` for samples without id or with an id that comes twice, and for a teacher of another
    vocabulary; `StoreMismatch` where the folder holds losses of another teacher, data set or settings;
    `StoreDamaged` for files that are not what was written; `StoreUnwritable`.
    """
    tokenizer, teacher_tokenizer = (getattr(it, "tokenizer", it) for it in (tokenizer, teacher_tokenizer))
    if teacher is not None:
        identity.check_vocabulary(model, teacher, tokenizer, teacher_tokenizer)
    chosen = model if teacher is None else teacher
    visual = tuple(visual_token_ids(identity.config_of(model)) if visual_ids is None else visual_ids)
    placeholder = identity.placeholder_of(model, tokenizer) if placeholder_id is None else placeholder_id
    about = identity.what_decides(
        chosen,
        tokenizer,
        special_ids=identity.special_ids_of(model, tokenizer) if special_ids is None else special_ids,
        visual_ids=visual,
        placeholder=placeholder,
        shifted=shifted,
        dtype=dtype,
        settings=settings,
        losses=losses_dtype,
    )
    windows = Windows(data, samples_per_shard)
    most = _ROWS if max_tokens_per_batch is None else POOL
    rows = most if batch_size is None else batch_size
    batching = Batching(collator or default_data_collator, rows, max_tokens_per_batch)
    batches = {"batch_size": rows, "max_tokens_per_batch": max_tokens_per_batch}
    plan = Plan(about, windows.samples, windows.size, losses_dtype, batches)
    if _is_computed(Path(folder), plan):
        losses = ReferenceLosses.open(folder)
        check_some(losses, data, windows.samples, batching)
        return losses
    check_ids(data)
    text_only = TextOnly(chosen, model, visual, placeholder)
    writer = StoreWriter(folder, plan)
    found = writer.shards()
    with PassProgress(windows.samples, shown=progress and ranks.rank() == 0) as bar:
        scorer = Scorer(text_only, chosen, batching, shifted, dtype, bar)
        check = UnchangedWindows(writer, windows, batching, Path(folder))
        count = fill(
            writer,
            windows,
            scorer.score,
            check,
            rank=ranks.rank(),
            ranks=ranks.count(),
            passed=lambda window: bar.passed(windows.length(window), earlier=window in found),
        )
    writer.publish(count)
    return ReferenceLosses.open(folder)


class Scorer:
    """The teacher with all that it needs to make losses of examples."""

    def __init__(
        self,
        text_only: TextOnly,
        teacher: nn.Module,
        batching: Batching,
        shifted: bool,
        dtype: torch.dtype | None,
        progress: PassProgress,
    ) -> None:
        self._text_only = text_only
        self._device = next(teacher.parameters()).device
        self._batching = batching
        self._shifted = shifted
        self._dtype = dtype
        self._progress = progress

    def score(self, examples: Iterable[Example]) -> list[SampleLosses]:
        """The losses of all examples, in their order."""
        found: dict[int, SampleLosses] = {}
        for batch in self._batching.batches(examples):
            found.update(zip(batch.places, self._score(batch), strict=True))
        return [found[place] for place in range(len(found))]

    def _score(self, batch: Batch) -> Iterator[SampleLosses]:
        moved = {name: self._moved(value) for name, value in batch.inputs.items()}
        with self._autocast():
            losses = self._text_only.token_loss(moved, self._shifted).cpu()
        self._progress.computed(len(batch.ids), int(is_real(batch.inputs).sum()))
        return identified(batch, losses)

    def _moved(self, value: Any) -> Any:
        return value.to(self._device) if isinstance(value, Tensor) else value

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)


def _is_computed(folder: Path, plan: Plan) -> bool:
    """Whether the folder holds the losses. Raises `StoreMismatch` where it holds those of something else."""
    if not (folder / MANIFEST).exists():
        return False
    stored, wanted = read_manifest(folder), plan.content()
    check_about(folder, stored["about"], wanted["about"])
    check_samples(folder, stored["samples"], plan.samples, finished=True)
    return is_finished(folder)
