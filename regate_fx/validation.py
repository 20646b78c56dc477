"""Translation validation: compare the compiled graph with the untouched model before anyone trains on it.

Two checks on a small part of a batch, the first time that a trace runs.
All tokens active: loss and gradients are those of the untouched
eager model. Half of them active: loss and gradients are those of the dense reference, which computes every
position of the captured graph. Gradients are compared as a set first, then by value.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regate_fx.errors import ValidationFailed
from regate_fx.inputs import padding_of
from regate_fx.modes import keeping_activations
from regate_fx.plan import TokenPlan, make_plan

# Memory bound: at most this many samples and positions, or so many positions of whole samples, and one set of gradients
# at a time.
_SAMPLES, _POSITIONS = 2, 128
_WHOLE_BATCH = 4096
_PIECE = 2**20
_OWN = "the positions of the call"

# Largest relative error of a loss or gradient that rounding explains, by the dtype the model computes in. A float64
# model's is that of float32: transformers computes norms, softmax and losses in float32 there too.
_TOLERANCE = {torch.float64: 2e-3, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1.5e-1}

VALIDATED = "validated against the untouched model and the dense reference"
SUMS_PADDING = (
    "validated against the dense reference and, where no sample has padding, the untouched model: its loss has sums "
    "over padding in it"
)
NOT_RUN = "; not those traces that a small part of a batch does not run"
NOT_VALIDATED = "not validated: "
SHARDED = f"{NOT_VALIDATED}the parameters are sharded; call the gated model once before fully_shard"

Call = Callable[[TokenPlan, dict[str, Any]], Any]


@dataclass(frozen=True)
class Probe:
    """What is left of one loss and its gradients: enough to compare, too little to weigh.

    sketches: for each parameter with a gradient its norm and eight random projections, float64 [9].
    """

    loss: float
    sketches: dict[str, Tensor]


def validate(
    model: nn.Module,
    inputs: dict[str, Any],
    gated: Call,
    untouched: Call,
    reference: Call,
    own: Tensor | None = None,
    sums: Callable[[], bool] = lambda: False,
) -> str:
    """Run both checks; returns what was checked, or why nothing was.

    gated, untouched, reference: compute `model` on a plan and inputs; the last two are what the first is compared
    with, `reference` may return None where it is not available. own: bool [B, S], the batch's own active positions,
    to be compared with the dense reference too. sums: whether `gated` sums over tokens beside its loss, where the
    untouched model may take in padding, which no gated one computes. The model's gradients, buffers and the random
    state are left as they were. Raises `ValidationFailed` at the first disagreement.
    """
    batch = _part(model, inputs if own is None else inputs | {_OWN: own}, untouched)
    if batch is None:
        return NOT_VALIDATED + "the batch is large, and inputs beside tokens cannot be cut to a part of it"
    own = batch.pop(_OWN, None)
    with undisturbed(model):
        real = _everything(batch).row_of >= 0
        outcome = VALIDATED
        try:
            if not _compare_with_untouched(model, batch, gated, untouched):
                return NOT_VALIDATED + "the batch has no labels"
        except ValidationFailed:
            unpadded = _without_padding(batch, real) if sums() else None
            if unpadded is None or not _compare_with_untouched(model, unpadded, gated, untouched):
                raise
            outcome = SUMS_PADDING
        sparse = {"half of the tokens active": _half(real)}
        if own is not None and bool(own.any()):
            sparse["the batch's own tokens active"] = own
        for check, mask in sparse.items():
            part = make_plan(mask)
            masked = reference(part, batch)
            if masked is None:
                return "validated against the untouched model, all tokens active; no dense reference for this graph"
            expected = _probe(model, masked.loss)
            probe = _probe(model, gated(part, batch).loss)
            _compare(f"{check}, against the dense reference", probe, expected, _dtype(model))
    return outcome


def _everything(batch: dict[str, Any]) -> TokenPlan:
    return make_plan(torch.ones_like(batch["labels"], dtype=torch.bool), padding_of(batch))


def _compare_with_untouched(model: nn.Module, batch: dict[str, Any], gated: Call, untouched: Call) -> bool:
    """Whether there were labels to compare; raises `ValidationFailed` where the two differ, all tokens active."""
    plan = _everything(batch)
    output = gated(plan, batch)
    if not bool(output.counted.any()):
        return False
    probe = _probe(model, output.loss)
    # Labels predicted from padding count in the untouched model alone.
    labels = batch["labels"].masked_fill(~output.counted, -100)
    with keeping_activations(model):
        expected = _probe(model, untouched(plan, batch | {"labels": labels}).loss)
    _compare("all tokens active, against the untouched model", probe, expected, _dtype(model))
    return True


def _without_padding(batch: dict[str, Any], real: Tensor) -> dict[str, Any] | None:
    """The positions that are no padding in any sample; None if those are all, fewer than two, or cannot be cut out."""
    B, S = real.shape
    kept = real.all(0).nonzero().flatten()
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    if not 2 <= len(kept) < S or not all(_cuttable(value, B, S) for value in tensors):
        return None
    first, last = int(kept[0]), int(kept[-1])
    return _cut_all(batch, torch.arange(B), slice(first, last + 1)) if last - first + 1 == len(kept) else None


def is_random(model: nn.Module, inputs: dict[str, Any], untouched: Call) -> bool:
    """Whether two runs of the untouched model on the same small batch differ: dropout, or another random choice."""
    batch = _part(model, inputs, untouched)
    if batch is None:
        return False
    with undisturbed(model), torch.no_grad():
        plan = _everything(batch)
        return untouched(plan, batch).loss.item() != untouched(plan, batch).loss.item()


def _half(present: Tensor) -> Tensor:
    """About half of the `present` positions (bool [B, S], True but at padding), the same at every call.

    The first and the last present position of each sample are kept, so that none is empty, and none a prefix where it
    has three positions; samples alternate between more and fewer than half, which leaves empty slots in compact rows.
    """
    B, S = present.shape
    drawn = torch.rand(B, S, generator=torch.Generator().manual_seed(0)).to(present.device)
    length = present.sum(1, keepdim=True)
    first = present & (present.cumsum(1) == 1)
    last = present & (present.cumsum(1) == length)
    order = (drawn + 1).masked_fill(last, 3).masked_fill(first, 4).masked_fill(~present, 0)
    is_even = torch.arange(B, device=present.device)[:, None] % 2 == 0
    kept = torch.where(is_even, (5 * length + 7) // 8, 3 * length // 8)
    kept = kept.clamp(min=2).minimum(length - 1).clamp(min=1)
    rank = order.argsort(1, descending=True).argsort(1)
    return (rank < kept) & present


def _part(model: nn.Module, inputs: dict[str, Any], untouched: Call) -> dict[str, Any] | None:
    """A part of a batch that is small enough to be computed several times; None if there is no such part."""
    batch = _small_batch(inputs)
    if batch is None:
        batch = _whole_samples(inputs)
        if batch is None or not _runs(model, {k: v for k, v in batch.items() if k != _OWN}, untouched):
            return None
    return batch


def _runs(model: nn.Module, batch: dict[str, Any], untouched: Call) -> bool:
    """Whether the untouched model takes a batch: as many pictures as samples need not be one for each."""
    with undisturbed(model), torch.no_grad():
        plan = _everything(batch)
        try:
            untouched(plan, batch)
        except Exception:
            return False
    return True


def _whole_samples(inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The samples with the most labels in full, where every input has an entry for each sample."""
    labels: Tensor = inputs["labels"]
    B, S = labels.shape
    count = min(_SAMPLES, _WHOLE_BATCH // S)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    others = [value for value in inputs.values() if isinstance(value, (list, tuple, dict))]
    if not 0 < count < B or others or any(value.shape[0] != B for value in tensors):
        return None
    samples = (labels != -100).sum(1).argsort(descending=True, stable=True)[:count]
    cuts = {
        id(value): value[samples.to(value.device)].detach()
        if isinstance(value, Tensor) and value.dim()
        else value
        for value in inputs.values()
    }
    return {name: cuts[id(value)] for name, value in inputs.items()}


def _small_batch(inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The samples with the most labels, cut to a window around them; the whole batch if it cannot be cut."""
    labels: Tensor = inputs["labels"]
    B, S = labels.shape
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if not all(_cuttable(value, B, S) for value in tensors.values()):
        return dict(inputs) if B * S <= _WHOLE_BATCH else None
    counted = labels != -100
    samples = counted.sum(1).argsort(descending=True, stable=True)[:_SAMPLES]
    width = min(S, _POSITIONS)
    covered = counted[samples].any(0).cumsum(0)
    before = torch.cat([covered.new_zeros(1), covered])
    first = int((before[width:] - before[:-width]).argmax())
    window = slice(first, first + width)
    return _cut_all(inputs, samples, window)


def _cut_all(inputs: dict[str, Any], samples: Tensor, window: slice) -> dict[str, Any]:
    B, S = inputs["labels"].shape
    # One tensor under two names (ids as labels) stays one: the capture tells the two cases apart.
    cuts = {id(value): _cut(value, samples, window, B, S) for value in inputs.values()}
    return {name: cuts[id(value)] for name, value in inputs.items()}


def _cuttable(value: Tensor, batch: int, length: int) -> bool:
    return value.dim() == 0 or value.numel() == 1 or (value.dim() >= 2 and value.shape[:2] == (batch, length))


def _cut(value: Any, samples: Tensor, window: slice, batch: int, length: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[:2] != (batch, length):
        return value
    # As a batch comes: the capture tells a view, or other strides, from it.
    return value[samples][:, window].detach().clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore random state and buffers afterwards; gradients are taken without touching `.grad`."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    # Not written where it can be left alone: a step that waits for its backward may have saved it.
                    if name in buffers and not torch.equal(buffer, buffers[name]):
                        buffer.copy_(buffers[name])


def _probe(model: nn.Module, loss: Tensor) -> Probe:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        return Probe(loss.item(), {})
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    sketches = {
        name: _sketch(gradient)
        for name, gradient in zip(trained, gradients, strict=True)
        if gradient is not None
    }
    return Probe(loss.item(), sketches)


def _sketch(gradient: Tensor) -> Tensor:
    """Norm and projections on eight random sign vectors, in pieces of bounded size."""
    flat = gradient.detach().reshape(-1)
    piece = min(flat.numel(), _PIECE)
    generator = torch.Generator(device=flat.device).manual_seed(0)
    signs = torch.randint(0, 2, (piece, 8), generator=generator, device=flat.device).double() * 2 - 1
    sketch = torch.zeros(9, dtype=torch.float64, device=flat.device)
    for index, part in enumerate(flat.split(piece)):
        wide = part.double()
        sketch[0] += wide.square().sum()
        # Rolled, so that no two pieces are projected on the same vector in the same place.
        sketch[1:] += wide @ signs[: wide.numel()].roll(index, 1) * (-1) ** (index // 8)
    sketch[0] = sketch[0].sqrt()
    return sketch.cpu()


def _dtype(model: nn.Module) -> torch.dtype:
    """The coarsest dtype the model computes in."""
    device = next(model.parameters()).device.type
    dtypes = {p.dtype for p in model.parameters() if p.dtype in _TOLERANCE}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(dtypes, key=_TOLERANCE.__getitem__)


def _compare(check: str, found: Probe, expected: Probe, dtype: torch.dtype) -> None:
    tolerance = _TOLERANCE[dtype]
    if not abs(found.loss - expected.loss) <= tolerance * max(1.0, abs(expected.loss)):
        raise ValidationFailed(check, f"the loss is {found.loss:.8g}, expected {expected.loss:.8g}.")
    # Of a result that nobody reads, a compiled graph hands zeros back where eager has no gradient.
    some = {name for name, sketch in found.sketches.items() if sketch.any() or name in expected.sketches}
    differing = sorted(expected.sketches.keys() ^ some)
    if differing:
        raise ValidationFailed(
            check, f"the same parameters must have a gradient; these differ: {differing[:5]}."
        )
    total = sum(float(sketch[0]) ** 2 for sketch in expected.sketches.values()) ** 0.5
    for name, sketch in expected.sketches.items():
        # Gradients that vanish but for rounding are measured by the size of the others.
        scale = max(float(sketch[0]), 1e-3 * total, 1e-30)
        error = float((found.sketches[name] - sketch).abs().max()) / scale
        if not error <= 4 * tolerance:
            raise ValidationFailed(check, f"the gradient of {name} differs by {error:.2e} of its norm.")
