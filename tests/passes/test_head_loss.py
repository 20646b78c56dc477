"""A head and its loss become one operator where nothing else reads the logits, and the step stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from captured import operators, run_on
from gating import assert_is_key_masked, assert_same_step, gate, step
from small_decoder import (
    Loss,
    V,
    batch,
    decoder,
    in_float32,
    shifted_labels,
    shifted_logits,
    some_active,
    unshifted,
)
from tiers import tiers
from torch import Tensor, fx

from regate_fx.passes.base import Pass
from regate_fx.passes.head_loss import FuseHeadLoss
from regate_fx.passes.pipeline import ANALYSE, CLEAN, ELIDE, NORMALISE

LossCode = Callable[[Tensor, Tensor], Tensor]
FUSED = (*NORMALISE, *ANALYSE, *ELIDE, *CLEAN, FuseHeadLoss(least_bytes=0))


def capped(logits: Tensor, labels: Tensor) -> Tensor:
    return shifted_labels(torch.tanh(logits / 5) * 5, labels)


def scaled(logits: Tensor, labels: Tensor) -> Tensor:
    return shifted_labels(logits * 3 / 2, labels)


def scaled_and_capped(logits: Tensor, labels: Tensor) -> Tensor:
    return in_float32(torch.tanh(logits * 3 / 2) * 2 / 0.7, labels)


def capped_twice(logits: Tensor, labels: Tensor) -> Tensor:
    return shifted_labels(logits.tanh().tanh(), labels)


def scaled_by_class(logits: Tensor, labels: Tensor) -> Tensor:
    return shifted_labels(logits * torch.linspace(1, 2, V), labels)


def clamped(logits: Tensor, labels: Tensor) -> Tensor:
    return shifted_labels(logits.clamp(-1, 1), labels)


CODES = [shifted_labels, shifted_logits, unshifted, in_float32, capped, scaled, scaled_and_capped]


def rewritten(code: LossCode, passes: Sequence[Pass] = FUSED) -> fx.GraphModule:
    return run_on(Loss(decoder(layers=1, loss=code)), batch(3), passes, some_active(3)).graph_module


@pytest.mark.parametrize("code", CODES)
def test_no_logits_are_left(code: LossCode) -> None:
    graph = rewritten(code)
    found = operators(graph)
    assert found["regate_fx.head_loss"] == 1
    assert not found["aten.cross_entropy_loss"]
    computed = [node.meta["val"] for node in graph.graph.nodes if node.op == "call_function"]
    assert not any(isinstance(value, Tensor) and value.shape[-1:] == (V,) for value in computed)


@pytest.mark.parametrize("code", CODES)
def test_a_loss_of_changed_logits_is_the_same(code: LossCode) -> None:
    model = decoder(layers=1, loss=code)
    fused, plain = (gate(model, fused_loss=choice) for choice in (True, False))
    inputs, active = batch(3), some_active(3)
    assert_same_step(step(fused, **inputs, token_mask=active), step(plain, **inputs, token_mask=active))


@pytest.mark.parametrize("code", [capped_twice, scaled_by_class, clamped])
def test_logits_that_are_changed_otherwise_stay(code: LossCode) -> None:
    found = operators(rewritten(code))
    assert not found["regate_fx.head_loss"]
    assert found["aten.cross_entropy_loss"] == 1


def test_small_logits_stay_by_default() -> None:
    passes = (*FUSED[:-1], FuseHeadLoss())
    assert not operators(rewritten(shifted_labels, passes))["regate_fx.head_loss"]
    large = FuseHeadLoss(least_bytes=4 * 3 * V)  # of a row for each sample, at most what is active
    found = operators(rewritten(shifted_labels, (*FUSED[:-1], large)))
    assert found["regate_fx.head_loss"] == 1


FUSED_BY = [(backend, scope) for backend in ("eager", "inductor") for scope in ("model", "layers")]


@pytest.mark.parametrize("case", tiers(FUSED_BY, ("eager", "layers"), ("inductor", "model")))
def test_a_fused_step_is_the_same_step(case: tuple[str, str]) -> None:
    backend, scope = case
    model = decoder(layers=2)
    fused = gate(model, backend, scope=scope, fused_loss=True)
    plain = gate(model, backend, scope=scope, fused_loss=False)
    inputs, active = batch(3), some_active(3)
    seen = step(fused, **inputs, token_mask=active)
    wanted = step(plain, **inputs, token_mask=active)
    assert_same_step(seen, wanted)
    torch.testing.assert_close(seen[2].token_loss, wanted[2].token_loss)
    assert seen[2].counted.equal(wanted[2].counted)
    assert_is_key_masked(fused, model, inputs, active)
    assert "by chunks of rows" in str(fused.report) and fused.report.to_dict()["fused_loss"]
    assert "by chunks of rows" not in str(plain.report)


def test_autocast_rounds_as_it_does_for_a_linear_layer() -> None:
    model = decoder(layers=1)
    fused, plain = (gate(model, "aot_eager", fused_loss=choice) for choice in (True, False))
    inputs, active = batch(3), some_active(3)
    with torch.autocast("cpu", torch.bfloat16):
        seen = step(fused, **inputs, token_mask=active)
        wanted = step(plain, **inputs, token_mask=active)
    torch.testing.assert_close(seen[0].float(), wanted[0].float(), rtol=1e-2, atol=1e-3)
    assert seen[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert F.cosine_similarity(seen[1][name].flatten(), grad.flatten(), dim=0) > 0.999, name


def test_logits_that_are_asked_for_are_there() -> None:
    model = decoder(layers=1)
    gated = gate(model, keep_logits=True, fused_loss=True)
    out = gated(**batch(3), token_mask=some_active(3))
    assert out.logits.shape[-1] == V
    assert_is_key_masked(gated, model, batch(3), some_active(3))
