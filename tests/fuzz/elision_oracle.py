"""What a gated step of a program must compute, found without the compiler: its own model, run in full, elided keys
hidden from the attentions of gated layers and what went into those layers held, as a constant, at elided positions.

Shapes: B samples, S positions, K positions of a memory, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from comparison import Outcome
from decoder import IGNORED, VOCABULARY, Decoder, Elision
from program import Program
from small_models import Batch
from torch import Tensor, nn

PAD = 0


@dataclass(frozen=True)
class MemoryBatch(Batch):
    """A batch with something to read beside the tokens.

    memory: int64 [B, K], or float64 [B, K, D]. memory_mask: int64 [B, K].
    """

    memory: Tensor | None = None
    memory_mask: Tensor | None = None

    def model_inputs(self) -> dict[str, Tensor]:
        assert self.memory is not None and self.memory_mask is not None
        return super().model_inputs() | {"memory": self.memory, "memory_mask": self.memory_mask}


def batches(program: Program) -> list[Batch]:
    """Two batches of other sizes; the second is padded on the left."""
    generator = torch.Generator().manual_seed(program.seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    B, S = number(2, 3), number(5, 9)
    others = [size for size in range(4, 11) if size != S]
    found = [
        _batch(generator, B, S, program.padding),
        _batch(generator, 5 - B, others[number(0, len(others) - 1)], "left"),
    ]
    if program.crosses:
        found = [_with_memory(generator, batch, program) for batch in found]
    found[1] = _edged(found[1], program.second)
    if program.labels_are_ids:
        found = [replace(batch, labels=batch.input_ids) for batch in found]
    return found


def _edged(batch: Batch, kind: str) -> Batch:
    """The batch, or one with sizes of one, for which there are traces of their own."""
    if kind == "one_sample":
        return replace(batch, **{name: value[:1] for name, value in vars(batch).items() if value is not None})
    mask = torch.zeros_like(batch.token_mask)
    if kind == "all":
        mask[:] = True
    elif kind == "one_each":
        mask[:, -2] = True
    elif kind == "one":
        mask[0, -2] = True
    return batch if kind == "some" else replace(batch, token_mask=mask)


def _batch(generator: torch.Generator, B: int, S: int, padding: str) -> Batch:
    index = torch.arange(S).expand(B, S)
    lengths = torch.randint(S // 2 + 1, S + 1, (B, 1), generator=generator)
    lengths[0] = S
    real = index < lengths if padding == "right" else index >= S - lengths
    if padding == "none":
        real = torch.ones(B, S, dtype=torch.bool)
    ids = torch.randint(1, VOCABULARY, (B, S), generator=generator)
    labels = torch.randint(1, VOCABULARY, (B, S), generator=generator)
    labels = labels.masked_fill((torch.rand(B, S, generator=generator) < 0.2) | ~real, IGNORED)
    mask = torch.rand(B, S, generator=generator) < 0.6
    if torch.rand((), generator=generator) < 0.1:
        mask[-1] = False  # a sample of which nothing is computed
    mask[0, S - 2 :] = True
    labels[0, S - 2 :] = 3
    return Batch(
        input_ids=ids.masked_fill(~real, PAD),
        attention_mask=None if padding == "none" else real.long(),
        labels=labels,
        token_mask=mask,
    )


def _with_memory(generator: torch.Generator, batch: Batch, program: Program) -> Batch:
    """The batch with a memory, which is as long as the sequence one time in three."""
    B, S = batch.input_ids.shape
    kind, other = torch.randint(3, (), generator=generator), torch.randint(2, 12, (), generator=generator)
    K = S if kind == 0 else int(other)
    memory = torch.randint(VOCABULARY, (B, K), generator=generator)
    if program.memory_by == "caller":
        memory = torch.randn(B, K, program.width, generator=generator, dtype=torch.float64)
    real = torch.rand(B, K, generator=generator) < 0.7
    real[:, 0] = True
    return MemoryBatch(**vars(batch), memory=memory, memory_mask=real.long())


def run_oracle(model: Decoder, batch: Batch, gated: frozenset[int], hides: bool = True) -> Outcome:
    """A step of a copy of `model`. gated: numbers of those layers; hides: False hides no keys, wrongly."""
    model = copy.deepcopy(model)
    seen = batch.active if hides else torch.ones_like(batch.active)
    model.elision = Elision(seen, gated)
    counted = counted_labels(model.program, batch)
    labels = batch.labels.masked_fill(~counted, IGNORED)
    out = model(**batch.model_inputs(), labels=labels)
    out.loss.backward()
    logits = out.logits.detach()
    return Outcome(
        out.loss.detach(), _token_losses(model.program, logits, labels), counted, gradients(model), logits
    )


def counted_labels(program: Program, batch: Batch) -> Tensor:
    """bool [B, S]: the labels whose predictor is active, without those that the program itself leaves out."""
    predictor = F.pad(batch.active[:, :-1], (1, 0)) if program.shifted else batch.active
    if program.loss == "padding_ignored":
        predictor = predictor & batch.real
    return predictor & (batch.labels != IGNORED)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad.clone() if p.grad is not None else None for name, p in model.named_parameters()}


def other_ids(batch: Batch) -> Batch:
    """The same batch with other ids at elided positions that are no padding."""
    changed = batch.input_ids % (VOCABULARY - 1) + 1
    return replace(batch, input_ids=torch.where(batch.active | ~batch.real, batch.input_ids, changed))


def _token_losses(program: Program, logits: Tensor, labels: Tensor) -> Tensor:
    rows, targets = (logits[:, :-1], labels[:, 1:]) if program.shifted else (logits, labels)
    losses = F.cross_entropy(rows.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return F.pad(losses, (1, 0)) if program.shifted else losses
