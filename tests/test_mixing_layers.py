"""What cannot be gated: layers that mix tokens outside attention run in full, or the model is refused.

Shapes: B samples, S positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import Outcome, compare
from oracles import golden, observe, run_key_masked
from small_models import MODELS, Batch, build, random_batch
from tiers import tiers
from torch import Tensor, nn

import regate_fx

LLAMA = MODELS["llama"]


class RunningMean(nn.Module):
    """[B, S, D] -> [B, S, D]: every position becomes the mean of those up to it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)
        return self.inner(hidden.cumsum(1) / count[:, None])


class CausalConvolution(nn.Module):
    """[B, S, D] -> [B, S, D] in place of attention: every position sees itself and the two before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 1, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        padded = F.pad(hidden_states.mT, (2, 0))
        return F.conv1d(padded, self.weight.to(padded.dtype), groups=padded.shape[1]).mT, None


def hybrid_llama(*without_attention: int, depth: int = 4) -> Any:
    model = build("llama", num_hidden_layers=depth)
    for index in without_attention:
        model.model.layers[index].self_attn = CausalConvolution(model.config.hidden_size)
    return model


def llama_with_mixing(*layers: int, depth: int = 3) -> Any:
    model = build("llama", num_hidden_layers=depth)
    for index in layers:
        model.model.layers[index].mlp = RunningMean(model.model.layers[index].mlp)
    return model


class GatedByHand(nn.Module):
    """A decoder layer of Llama as `semantics` define it gated: elided positions pass, unseen and constant."""

    def __init__(self, layer: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.layer = layer
        self.active = batch.active
        S = batch.active.shape[1]
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        self.seen = causal & batch.active[:, None, None, :]

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        computed = self.layer(hidden, **{**kwargs, "attention_mask": self.seen})
        return torch.where(self.active[:, :, None], computed, hidden.detach())


def run_with_dense_layers(model: Any, dense: set[int], batch: Batch, dtype: torch.dtype) -> Outcome:
    """The untouched model with every layer but `dense` gated by hand."""
    layers = model.model.layers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    model.model.layers = nn.ModuleList(
        layer if index in dense else GatedByHand(layer, batch) for index, layer in enumerate(layers)
    )
    try:
        everything = replace(batch, token_mask=torch.ones_like(batch.token_mask))
        counted = run_key_masked(model, LLAMA, batch).counted
        everything = replace(everything, labels=batch.labels.masked_fill(~counted, -100))
        oracle = golden if dtype == torch.float64 else run_key_masked
        outcome = oracle(model, LLAMA, everything)
        renamed = {}
        for (_, parameter), grad in zip(model.named_parameters(), outcome.gradients.values(), strict=True):
            renamed[names[id(parameter)]] = grad
    finally:
        model.model.layers = layers
    return replace(outcome, gradients=renamed)


@pytest.mark.parametrize("mixing", tiers([0, 1, 2], 1))
def test_one_layer_that_mixes_runs_dense_among_gated_ones(mixing: int, generator: torch.Generator) -> None:
    model = llama_with_mixing(mixing)
    gated = regate_fx.compile(model, backend="aot_eager")
    for padding in ("left", "right"):
        batch = random_batch(generator, 3, 10, padding=padding, share=0.6)
        baseline = run_with_dense_layers(model, {mixing}, batch, torch.float32)
        reference = run_with_dense_layers(model, {mixing}, batch, torch.float64)
        compare(observe(gated, batch), baseline, reference, batch.active).check(f"layer {mixing} {padding}")
    kinds = ["varlen"] * 3
    kinds[mixing] = "dense"
    assert [layer.kind for layer in gated.report.layers] == kinds
    assert "cumsum" in gated.report.layers[mixing].reason
    assert gated.report.gated == 2


@pytest.mark.parametrize("mixing", tiers([(0, 2), (1, 2, 3)], (1, 2, 3)))
def test_layers_without_attention_run_dense_among_gated_ones(
    mixing: tuple[int, ...], generator: torch.Generator
) -> None:
    model = hybrid_llama(*mixing)
    gated = regate_fx.compile(model, backend="aot_eager")
    batch = random_batch(generator, 3, 10, padding="right", share=0.6)
    baseline = run_with_dense_layers(model, set(mixing), batch, torch.float32)
    reference = run_with_dense_layers(model, set(mixing), batch, torch.float64)
    compare(observe(gated, batch), baseline, reference, batch.active).check(f"layers {mixing}")
    kinds = ["dense" if index in mixing else "varlen" for index in range(4)]
    assert [layer.kind for layer in gated.report.layers] == kinds
    assert all("aten.pad" in gated.report.layers[index].reason for index in mixing)


def test_a_model_that_mixes_everywhere_is_refused_at_every_call(generator: torch.Generator) -> None:
    gated = regate_fx.compile(llama_with_mixing(0, 1, depth=2), backend="eager")
    for _ in range(3):
        batch = random_batch(generator, 2, 7)
        with pytest.raises(regate_fx.errors.NotGateable, match="cumsum") as refusal:
            observe(gated, batch)
        assert {refused.layer for refused in refusal.value.refusals} == {0, 1}
    dense = gated(**batch.model_inputs(), labels=batch.labels)
    assert torch.isfinite(dense.loss)


@pytest.mark.parametrize("S", [1, 7])
def test_a_refusal_does_not_become_a_dense_step(S: int, generator: torch.Generator) -> None:
    """The graph of a refused call stays in Dynamo's cache; a second call must not run it."""
    gated = regate_fx.compile(llama_with_mixing(0, 1, depth=2), backend="eager", validate=False)
    batch = random_batch(generator, 2, S)
    for _ in range(2):
        with pytest.raises(regate_fx.errors.NotGateable):
            observe(gated, batch)


@pytest.mark.parametrize(
    "switched_off",
    [
        lambda: torch._dynamo.config.patch(disable=True),
        lambda: torch.compiler.set_stance("force_eager"),
        lambda: torch.compiler.set_stance("eager_on_recompile"),
    ],
    ids=["disable", "force_eager", "eager_on_recompile"],
)
def test_a_compiler_switched_off_does_not_make_a_dense_step(
    switched_off: Callable[[], Any], generator: torch.Generator
) -> None:
    gated = regate_fx.compile(build("llama"), backend="eager", validate=False)
    with switched_off(), pytest.raises(regate_fx.errors.RegateError):
        observe(gated, random_batch(generator, 3, 11))
