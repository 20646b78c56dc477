"""Compile one program, run it, compare it with its oracle, and say what came of it.

Shapes: B samples, S positions, V vocabulary.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from comparison import Outcome
from decoder import Decoder, build
from elision_oracle import batches, gradients, other_ids, run_oracle
from program import Program
from small_models import Batch
from torch import Tensor

import regate_fx
from regate_fx.errors import NotGateable, RegateError

EXACT, SINGLE = 1e-9, 2e-4  # relative errors allowed in float64, and where part of a program is in float32
CANCELLATION = 1e-2  # a gradient that cancels carries the rounding of what cancelled in it
STATUSES = ("equal", "equal, some dense", "unmatched", "unchecked", "refused", "failed", "broken")


class Different(Exception):
    """The gated model is not what its oracle says. `what` names the first quantity."""

    def __init__(self, what: str, how: str) -> None:
        self.what = what
        super().__init__(f"{what}: {how}")


@dataclass
class Verdict:
    """What came of a program.

    status: "equal" to its oracle; "equal, some dense": so with layers that the report calls dense; "unmatched": the
    report's layers are not the program's, equal to the dense reference; "unchecked": so, and there is no reference;
    "refused" by a typed error; "failed": anything else; "broken": the program cannot be run itself. code: of a refusal,
    or what a failure is about. kinds: how many layers are varlen, compact and dense.
    """

    program: dict[str, Any]
    status: str = "broken"
    code: str = ""
    reason: str = ""
    kinds: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(program: Program, hides: bool = True) -> Verdict:
    """Raises nothing. hides: False gives the oracle no keys to hide, which is to be noticed."""
    verdict = Verdict(program.to_json())
    started = time.perf_counter()
    torch._dynamo.reset()
    torch.manual_seed(0)
    try:
        model = build(program)
        given = batches(program)
        for batch in given:
            model(**batch.model_inputs(), labels=batch.labels).loss.backward()
        verdict.status = "failed"
        _judge(model, given, verdict, hides)
    except NotGateable as error:
        first = error.refusals[0]
        verdict.status, verdict.code = "refused", first.code
        verdict.reason = " | ".join(dict.fromkeys(str(refusal) for refusal in error.refusals))
    except RegateError as error:
        verdict.status, verdict.code = "refused", type(error).__name__
        verdict.reason = str(error)
    except Different as error:
        verdict.status = "failed"
        verdict.code, verdict.reason = error.what, str(error)
    except Exception as error:
        verdict.status = "broken" if verdict.status == "broken" else "failed"
        place = traceback.extract_tb(error.__traceback__)[-1]
        verdict.code = type(error).__name__
        verdict.reason = (
            f"{type(error).__name__}: {str(error)[:400]} ({Path(place.filename).name}:{place.lineno})"
        )
    if verdict.code in ("PassFailed", "pass-failed"):
        verdict.status = "failed"
    verdict.seconds = round(time.perf_counter() - started, 2)
    return verdict


def _judge(model: Decoder, given: list[Batch], verdict: Verdict, hides: bool) -> None:
    program = model.program
    gated = regate_fx.compile(
        model, backend="eager", validate=False, keep_logits=program.keep_logits, scope=program.scope,
        bucket=program.bucket or None,
    )  # fmt: skip
    tolerance = SINGLE if program.float32 else EXACT
    for number, batch in enumerate(given):
        seen = _observe(gated, batch)
        layers = gated.report.layers
        verdict.kinds = dict(Counter(layer.kind for layer in layers))
        verdict.reason = " | ".join(dict.fromkeys(layer.reason for layer in layers if layer.kind == "dense"))
        numbers = gated_layers(program, [layer.kind for layer in layers])
        if numbers is None:
            verdict.status = _compare_with_reference(model, batch, seen, tolerance)
            continue
        wanted = run_oracle(model, batch, numbers, hides)
        if not program.passes_unchanged:
            seen, wanted = _at_active(seen, batch), _at_active(wanted, batch)
        compare(seen, wanted, tolerance, f"batch {number}")
        verdict.status = "equal, some dense" if "dense" in verdict.kinds else "equal"
        if "dense" not in verdict.kinds and not program.sees_ids:
            _check_elided_unseen(gated, batch, seen)


def gated_layers(program: Program, kinds: list[str]) -> frozenset[int] | None:
    """Numbers of the gated ones among the layers as they run; None where the report's are others."""
    count = len(program.layers) * program.loops
    if "dense" not in kinds:
        return frozenset(range(count))
    if len(kinds) != count or not program.passes_unchanged:
        return None
    return frozenset(index for index, kind in enumerate(kinds) if kind != "dense")


def _observe(gated: Any, batch: Batch) -> Outcome:
    gated.zero_grad(set_to_none=True)
    out = gated(**batch.model_inputs(), labels=batch.labels, token_mask=batch.token_mask)
    out.loss.backward()
    logits = None if out.logits is None else out.logits.detach()
    return Outcome(out.loss.detach(), out.token_loss.detach(), out.counted, gradients(gated), logits)


def _at_active(outcome: Outcome, batch: Batch) -> Outcome:
    return replace(outcome, logits=None if outcome.logits is None else outcome.logits[batch.active])


def _compare_with_reference(model: Decoder, batch: Batch, seen: Outcome, tolerance: float) -> str:
    reference = regate_fx.compile(model, backend="eager", validate=False, reference=True)
    model.zero_grad(set_to_none=True)
    try:
        out = reference(**batch.model_inputs(), labels=batch.labels, token_mask=batch.token_mask)
    except RegateError:
        return "unchecked"
    out.loss.backward()
    _compare_value("loss", seen.loss, out.loss.detach(), tolerance)
    _compare_gradients(seen.gradients, gradients(model), tolerance)
    return "unmatched"


def _check_elided_unseen(gated: Any, batch: Batch, seen: Outcome) -> None:
    changed = _observe(gated, other_ids(batch))
    if not torch.equal(seen.token_loss, changed.token_loss) or not torch.equal(seen.loss, changed.loss):
        raise Different("elided ids", "others change the losses of active positions")


def compare(seen: Outcome, wanted: Outcome, tolerance: float, context: str) -> None:
    """Raise `Different` with the first difference."""
    if not torch.equal(seen.counted, wanted.counted):
        raise Different("counted", f"{seen.counted.tolist()} is not {wanted.counted.tolist()}, {context}")
    _compare_value("token_loss", seen.token_loss.double(), wanted.token_loss, max(tolerance, 1e-6), context)
    _compare_value("loss", seen.loss, wanted.loss, tolerance, context)
    if seen.logits is not None and wanted.logits is not None:
        _compare_value("logits", seen.logits, wanted.logits, tolerance, context)
    _compare_gradients(seen.gradients, wanted.gradients, tolerance, context)


def _compare_value(
    what: str, seen: Tensor, wanted: Tensor, tolerance: float, context: str = "", size: float | None = None
) -> None:
    if seen.shape != wanted.shape:
        raise Different(what, f"shape {list(seen.shape)} is not {list(wanted.shape)}, {context}")
    scale = float(wanted.norm()) if size is None else size
    error = float((seen - wanted).norm())
    if not error <= tolerance * scale:
        raise Different(what, f"error {error:.1e} of {scale:.1e}, {context}")


def _compare_gradients(
    seen: dict[str, Tensor | None], wanted: dict[str, Tensor | None], tolerance: float, context: str = ""
) -> None:
    has, should = ({name for name, grad in all_.items() if grad is not None} for all_ in (seen, wanted))
    if has != should:
        raise Different("set of gradients", f"{sorted(should - has)} missing, {sorted(has - should)} added")
    overall = sum(float(grad.norm()) ** 2 for grad in wanted.values() if grad is not None) ** 0.5
    for name in sorted(should):
        a, b = seen[name], wanted[name]
        assert a is not None and b is not None
        size = float(b.norm()) + CANCELLATION * overall
        _compare_value("gradient", a, b, tolerance, f"{name}, {context}", size)
