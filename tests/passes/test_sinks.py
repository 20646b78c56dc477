"""A learned sink beside the keys becomes a part of the sum, and nothing else does.

Shapes: B samples, S positions, D hidden size, H heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from captured import capture, copy_graph, operators
from gating import assert_all_active_is_eager, assert_elided_ids_do_not_matter, assert_is_key_masked, gate
from small_decoder import Block, Decoder, H, batch, heads, hide, merge_heads, some_active
from torch import Tensor, fx, nn

from regate_fx.passes.base import PassContext
from regate_fx.passes.pipeline import NORMALISE, PipelineRun, run_passes

Weights = Callable[[Tensor, Tensor], Tensor]


def joined(scores: Tensor, sink: Tensor) -> Tensor:
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def kept_small(scores: Tensor, sink: Tensor) -> Tensor:
    both = torch.cat([scores, sink], dim=-1)
    return (both - both.max(dim=-1, keepdim=True).values).softmax(-1)[..., :-1]


def in_double(scores: Tensor, sink: Tensor) -> Tensor:
    return torch.cat([scores, sink], -1).softmax(-1, dtype=torch.float64)[..., :-1].float()


def in_front(scores: Tensor, sink: Tensor) -> Tensor:
    return torch.cat([sink, scores], -1).softmax(-1)[..., :-1]


def two_columns(scores: Tensor, sink: Tensor) -> Tensor:
    return torch.cat([scores, sink.expand(*sink.shape[:-1], 2)], -1).softmax(-1)[..., :-1]


def read_whole(scores: Tensor, sink: Tensor) -> Tensor:
    weights = torch.cat([scores, sink], -1).softmax(-1)
    return weights[..., :-1] * weights.amax(-1, keepdim=True)


def cut_elsewhere(scores: Tensor, sink: Tensor) -> Tensor:
    return torch.cat([scores, sink], -1).softmax(-1)[..., 1:]


class Attends(nn.Module):
    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights
        self.sink = nn.Parameter(torch.randn(H))

    def forward(self, states: Tensor) -> Tensor:
        scores = heads(states) @ heads(states).mT
        return self.weights(scores, self.sink.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1))


def outcome(module: nn.Module, found: Tensor, states: Tensor) -> list[Tensor]:
    return [found, *torch.autograd.grad(found.square().sum(), [states, *module.parameters()])]


def check(weights: Weights, dtype: torch.dtype = torch.float32) -> PipelineRun:
    """Run the normalised graph: values and gradients are as close to float64 as those of eager PyTorch."""
    module = Attends(weights).to(dtype)
    states = (2 * torch.randn(3, 7, 4 * H)).to(dtype).requires_grad_()
    seen: list[PipelineRun] = []

    def normalise(gm: fx.GraphModule) -> fx.GraphModule:
        seen.append(run_passes(fx.GraphModule(gm, copy_graph(gm)), PassContext(), NORMALISE))
        return seen[0].graph_module

    (found,) = capture(module, {"states": states}, rewrite=normalise).outputs
    ours, eager = (outcome(module, value, states) for value in (found, module(states)))
    precise, wide = copy.deepcopy(module).double(), states.detach().double().requires_grad_()
    for our, own, golden in zip(ours, eager, outcome(precise, precise(wide), wide), strict=True):
        assert our.dtype == own.dtype
        error, allowed = ((value.double() - golden).norm() for value in (our, own))
        assert error <= 2 * allowed + 1e-6 * golden.norm()
    return seen[0]


@pytest.mark.parametrize(("weights", "rewrites"), [(joined, 1), (kept_small, 2), (in_double, 1)])
def test_a_sink_becomes_part_of_the_sum(weights: Weights, rewrites: int) -> None:
    run = check(weights)
    counts = operators(run.graph_module)
    assert run.rewrites["fold_sinks"] == rewrites
    assert counts["aten.cat"] == counts["aten.softmax"] == counts["aten.max"] == counts["aten.slice"] == 0
    assert counts["aten.amax"] == counts["aten.maximum"] == counts["aten.div"] == 1


def test_half_precision_is_summed_in_float32() -> None:
    check(joined, torch.bfloat16)


@pytest.mark.parametrize("weights", [in_front, two_columns, read_whole, cut_elsewhere])
def test_other_columns_are_left_alone(weights: Weights) -> None:
    run = check(weights)
    counts = operators(run.graph_module)
    assert run.rewrites["fold_sinks"] == 0
    assert counts["aten.cat"] == counts["aten.softmax"] == 1


class WithSinks(Block):
    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (heads(project(x)) for project in (self.q, self.k, self.v))
        scores = hide(q @ k.mT, mask)
        sink = self.scale[:H].view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return self.o(merge_heads(kept_small(scores, sink) @ v))


def test_a_decoder_with_sinks_is_gated() -> None:
    model = Decoder([WithSinks(), WithSinks()])
    gated = gate(model)
    inputs, mask = batch(padded=True), some_active()
    assert_all_active_is_eager(gated, model, batch())
    assert_is_key_masked(gated, model, inputs, mask)
    assert_elided_ids_do_not_matter(gated, inputs, mask)
    assert [layer.kind for layer in gated.report.layers] == ["varlen", "varlen"]
