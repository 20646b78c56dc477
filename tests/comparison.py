"""How close to the golden run is close enough, and what to say when it is not.

Shapes: B samples, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

BASELINE_FACTOR = 2.0
RELATIVE_SLACK = 1e-6
# A gradient that sums to little (key biases under softmax) carries the rounding of what cancelled in it.
CANCELLATION_SLACK = 1e-8
ROUNDING_ONLY = 1e-10


@dataclass(frozen=True)
class Outcome:
    """What one step gave.

    loss:       float []
    token_loss: float [B, S], the NLL of label t at index t, 0 where not counted
    counted:    bool  [B, S]
    gradients:  by parameter name, None where the backward pass left none
    logits:     float [B, S, V], defined at active positions only, or None
    """

    loss: Tensor
    token_loss: Tensor
    counted: Tensor
    gradients: dict[str, Tensor | None]
    logits: Tensor | None = None


@dataclass(frozen=True)
class Deviation:
    """How far one quantity is from the golden run, in the Euclidean norm, and how far it may be.

    baseline: the untouched model's own error; size: what the error is relative to; overall: the norm of all
    gradients together, 0 for anything else.
    """

    quantity: str
    error: float
    baseline: float
    size: float
    overall: float

    @property
    def allowed(self) -> float:
        slack = RELATIVE_SLACK * self.size + CANCELLATION_SLACK * self.overall
        return BASELINE_FACTOR * self.baseline + slack

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN as well

    def __str__(self) -> str:
        return (
            f"{self.quantity}: error {self.error:.2e} > allowed {self.allowed:.2e} "
            f"(untouched model {self.baseline:.2e}, size {self.size:.2e})"
        )


@dataclass
class Comparison:
    """Everything two runs disagree on. `check` raises an AssertionError that lists it."""

    deviations: list[Deviation] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return self.mismatches + [str(deviation) for deviation in self.deviations if not deviation.ok]

    @property
    def ok(self) -> bool:
        return not self.failures

    def with_rounding_of(self, other: Comparison) -> Comparison:
        """The same, allowing also for the relative error of another run of the untouched model."""
        others = {deviation.quantity: deviation for deviation in other.deviations}
        widened = []
        for deviation in self.deviations:
            twin = others.get(deviation.quantity)
            if twin is not None and twin.size > 0:
                own = twin.error / twin.size * deviation.size
                deviation = replace(deviation, baseline=max(deviation.baseline, own))
            widened.append(deviation)
        return Comparison(widened, list(self.mismatches))

    def check(self, context: str = "") -> None:
        if not self.ok:
            raise AssertionError("\n  ".join([f"{context or 'comparison'} differs:", *self.failures]))


def check_no_bit_differs(before: Outcome, after: Outcome, active: Tensor | None = None) -> None:
    """Assert that two runs gave the very same losses and gradients, and logits at the positions `active`, if any."""
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.token_loss, after.token_loss)
    assert (before.logits is None) == (after.logits is None)
    if active is not None and before.logits is not None and after.logits is not None:
        assert torch.equal(before.logits[active], after.logits[active])
    for name, grad in before.gradients.items():
        other = after.gradients[name]
        assert (grad is None) == (other is None), name
        assert grad is None or torch.equal(grad, other), name


def compare(
    seen: Outcome, baseline: Outcome, reference: Outcome, active: Tensor, *, with_logits: bool = False
) -> Comparison:
    """Compare a run with the golden one, allowing twice the error that the untouched model itself makes.

    baseline: the untouched model at the precision of `seen`; active: bool [B, S], where logits are defined;
    with_logits: that there are none is a failure. Where there are some, they are compared in any case.
    """
    comparison = Comparison()
    note = comparison.mismatches.append
    if not torch.equal(seen.counted, reference.counted):
        note(f"counted labels differ at {_places(seen.counted != reference.counted)}")
    if seen.token_loss.shape != reference.token_loss.shape:
        note(f"token_loss has shape {list(seen.token_loss.shape)}, not {list(reference.token_loss.shape)}")
        return comparison
    if seen.token_loss[~reference.counted].any():
        note(f"token_loss is not 0 at uncounted {_places((seen.token_loss != 0) & ~reference.counted)}")

    pairs = [("loss", seen.loss, baseline.loss, reference.loss)]
    pairs.append(("token_loss", seen.token_loss, baseline.token_loss, reference.token_loss))
    if seen.logits is None:
        if with_logits:
            note("no logits, which were asked for")
    elif baseline.logits is None or reference.logits is None:
        note("no logits to compare those of the run with")
    else:
        pairs.append(("logits", seen.logits[active], baseline.logits[active], reference.logits[active]))
    comparison.deviations += [_deviation(*pair) for pair in pairs]
    _compare_gradients(comparison, seen.gradients, baseline.gradients, reference.gradients)
    return comparison


def _compare_gradients(
    comparison: Comparison,
    seen: Mapping[str, Tensor | None],
    baseline: Mapping[str, Tensor | None],
    reference: Mapping[str, Tensor | None],
) -> None:
    with_seen, with_reference = (
        {name for name, grad in gradients.items() if grad is not None} for gradients in (seen, reference)
    )
    if seen.keys() != reference.keys():
        comparison.mismatches.append(f"parameters differ: {sorted(seen.keys() ^ reference.keys())}")
    for name in sorted(with_reference - with_seen):
        comparison.mismatches.append(f"no gradient for {name}")
    for name in sorted(with_seen - with_reference):
        comparison.mismatches.append(f"a gradient for {name}, which has none in the original")
    overall = sum(float(reference[name].norm()) ** 2 for name in with_reference) ** 0.5
    for name in sorted(with_seen & with_reference):
        grads = seen[name], baseline[name], reference[name]
        comparison.deviations.append(_deviation(f"gradient of {name}", *grads, overall=overall))


def _deviation(
    quantity: str, seen: Tensor, baseline: Tensor, reference: Tensor, overall: float = 0.0
) -> Deviation:
    scale = float(reference.norm())
    error, own = (float((value.double() - reference).norm()) for value in (seen, baseline))
    # What is zero in exact arithmetic consists of rounding alone, in proportion to everything else.
    size = overall if scale < ROUNDING_ONLY * overall else scale
    return Deviation(quantity, error, own, size, overall)


def _places(mask: Tensor) -> str:
    places = [tuple(place) for place in mask.nonzero().tolist()]
    return f"(sample, position) {places[:8]}{' and more' if len(places) > 8 else ''}"
