"""Tell before any training what gating a model would do.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor, fx, nn

from regate_fx.backend import Captured
from regate_fx.engine import GatedEngine
from regate_fx.errors import InvalidInput, LayerRefusal, NotGateable, PassFailed
from regate_fx.inputs import decoder_input, own_signature
from regate_fx.options import Options
from regate_fx.report import BatchTokens, Expectation, Report
from regate_fx.summary import all_dense, summarise
from regate_fx.untouched import untouched
from regate_fx.wrapper import ungated, wrap

IGNORED = -100


def explain(
    model: nn.Module, *, keep: float = 0.5, output_share: float | None = None, **inputs: Any
) -> Report:
    """Report which layers of `model` can be gated, and what that would save on a batch like this one.

    inputs:       one batch, by the names of the model's own forward: `input_ids` int64 [B, S] or
                  `inputs_embeds`, and whatever else it takes. The model is seen as in training, with labels
                  if its forward takes them.
    keep:         share of the labelled tokens that training is to keep, 0 < keep <= 1.
    output_share: labelled tokens among all that are no padding, 0 to 1. By default it is counted in `labels`;
                  without them every token is taken to be labelled, as in training on plain text.

    A model on the meta device, with inputs there, is explained without its weights: it is judged for CUDA, and without
    padding, which cannot be read from a mask that has no values.

    Nothing is trained, and the model is left as it was: parameters, gradients, buffers, modes, attributes and
    random state. As a rule it does not even run; where Python code breaks its graph into several, it runs
    without gradients. Unlike a gated call this does not raise `NotGateable`: the reasons are in the report.
    Raises `InvalidInput` and `Unsupported` as a gated call does.
    """
    _check_share("keep", keep, keep > 0)
    if output_share is not None:
        _check_share("output_share", output_share, output_share >= 0)
    original = ungated(model)
    inputs = {name: _alias(value) for name, value in inputs.items() if value is not None}
    mask_name, tokens = decoder_input(own_signature(original), inputs, getattr(original, "config", None))
    batch, expected = _expected(tokens, inputs.get(mask_name), inputs.get("labels"), keep, output_share)
    report = _captured(original, inputs | _labels(original, inputs, tokens), tokens, batch)
    report.expected = expected
    return report


def _check_share(name: str, share: float, above: bool) -> None:
    if not above or share > 1:
        raise InvalidInput(name, f"expected a share of at most 1, got {share}.", "Half of the tokens is 0.5.")


def _alias(value: Any) -> Any:
    """The same data in a tensor of our own: capturing marks the sizes of its inputs as dynamic."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _labels(model: nn.Module, inputs: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
    if "labels" in inputs or "labels" not in own_signature(model).parameters:
        return {}
    return {"labels": tokens.new_zeros(tokens.shape[:2], dtype=torch.int64)}


def _expected(
    tokens: Tensor, attention_mask: object, labels: object, keep: float, output_share: float | None
) -> tuple[BatchTokens, Expectation]:
    """The batch with as many active positions as selection will leave: all but the labels it drops."""
    real = torch.ones(tokens.shape[:2], dtype=torch.bool, device="cpu")
    if _has_values(attention_mask, real.shape):
        real = attention_mask.cpu() != 0
    reals = real.sum(1).tolist()
    if output_share is not None:
        labelled, origin = [output_share * count for count in reals], "as given"
    elif _has_values(labels, real.shape):
        labelled, origin = ((labels.cpu() != IGNORED) & real).sum(1).tolist(), "counted in labels"
    else:
        labelled, origin = reals, "assumed, since no labels were given"
    share = sum(labelled) / max(sum(reals), 1)
    active = [_kept(count, outputs, keep) for count, outputs in zip(reals, labelled, strict=True)]
    return BatchTokens(real.shape[1], tuple(reals), tuple(active)), Expectation(keep, share, origin)


def _has_values(tensor: object, shape: torch.Size) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and tensor.shape == shape and not tensor.is_meta


def _kept(real: int, outputs: float, keep: float) -> int:
    # Rounded first: 3 * (1 - 0.1) is a little less than 2.7, and a token more must not come of that.
    return min(real, math.ceil(round(real - outputs * (1 - keep), 6)))


@dataclass
class _CaptureOnly:
    """A Dynamo backend that runs a graph only where more of the model has to be captured."""

    engine: GatedEngine | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        assert self.engine is not None
        if any(run.context.findings["loss"] for run in self.engine.captures.runs):
            return _stop
        return functools.partial(_run, gm)


def _stop(*inputs: Any) -> NoReturn:
    raise Captured


def _run(gm: fx.GraphModule, *inputs: Any) -> Any:
    with torch.no_grad():
        return gm(*inputs)


def _captured(model: nn.Module, inputs: dict[str, Any], tokens: Tensor, batch: BatchTokens) -> Report:
    backend = _CaptureOnly()
    engine = backend.engine = GatedEngine(model, Options(backend, validate=False))
    gated = wrap(model, engine)
    everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    refusals: Sequence[LayerRefusal] = ()
    try:
        with untouched(model), torch.enable_grad(), contextlib.suppress(Captured):
            # Not called as a module: hooks are the user's own code.
            gated.forward(**inputs, token_mask=everything)
        engine.check_captures("labels" in inputs)
    except NotGateable as error:
        refusals = error.refusals
    except PassFailed as error:
        refusals = [LayerRefusal(None, "pass-failed", str(error))]
    report = summarise(engine.captures, engine.captures.runs, batch)
    return all_dense(report, refusals) if refusals else report
