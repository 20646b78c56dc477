"""A rewritten graph cut at the ends of its layers computes the same, part by part."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from captured import capture, copy_graph, operators
from small_decoder import Loss, batch, decoder, some_active
from torch import Tensor, fx, nn

from regate_fx.layerwise import LayerwiseGraph, compile_parts, signature
from regate_fx.passes.base import PassContext, Refused
from regate_fx.passes.pipeline import LAYERWISE, PIPELINE, run_passes
from regate_fx.passes.split_layers import SplitGraph, split_layers


def split(model: nn.Module, inputs: dict[str, Tensor], active: Tensor) -> tuple[SplitGraph, tuple[Any, ...]]:
    """The parts of the captured model, and what they compute one after the other."""
    made: list[LayerwiseGraph] = []

    def compiler(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        run = run_passes(fx.GraphModule(gm, copy_graph(gm)), PassContext(), LAYERWISE)
        parts = split_layers(run.graph_module)
        made.append(compile_parts(parts, lambda part, _: part.forward, lambda _: None))
        return made[0]

    outputs = capture(model, inputs, active, compiler=compiler).outputs
    return made[0].split, outputs


def whole(model: nn.Module, inputs: dict[str, Tensor], active: Tensor) -> tuple[Any, ...]:
    def compiler(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        return run_passes(fx.GraphModule(gm, copy_graph(gm)), PassContext(), PIPELINE).graph_module.forward

    return capture(model, inputs, active, compiler=compiler).outputs


@pytest.mark.parametrize("padded", [False, True])
def test_the_parts_compute_what_the_whole_does(padded: bool) -> None:
    model, inputs, active = decoder(layers=3), batch(3, padded=padded), some_active(3)
    model = Loss(model)
    _, (loss,) = split(model, inputs, active)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    (expected,) = whole(model, inputs, active)
    wanted = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    assert torch.equal(loss, expected)
    for seen, grad in zip(gradients, wanted, strict=True):
        assert (seen is None) == (grad is None)
        assert grad is None or torch.equal(seen, grad)


def test_one_part_a_layer_and_packed_states_between() -> None:
    parts, _ = split(Loss(decoder(layers=4)), batch(3), some_active(3))
    assert [part.layer for part in parts.parts] == [-1, 0, 1, 2, 3, 4]
    layers = parts.parts[1:-1]
    assert all(operators(part.graph_module)["regate_fx.varlen_attention"] == 1 for part in layers)
    for before, after in itertools.pairwise(layers):
        (states,) = before.outputs
        assert states in after.inputs and states in after.last
    moves = [operators(part.graph_module)["aten.index_put"] for part in layers]
    assert moves == [0, 0, 0, 0]
    assert len({signature(part.graph_module) for part in layers}) == 1


def test_layers_that_differ_are_not_taken_for_one() -> None:
    model = decoder(layers=4)
    model.layers[2].q.weight.requires_grad_(False)
    model.layers[3].norm.eps = 1e-3
    parts, _ = split(Loss(model), batch(3), some_active(3))
    signatures = [signature(part.graph_module) for part in parts.parts[1:-1]]
    assert signatures[0] == signatures[1]
    assert len(set(signatures)) == 3


def test_an_earlier_layer_that_reads_a_later_one_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    late = graph.call_function(torch.ops.aten.relu.default, (x,))
    early = graph.call_function(torch.ops.aten.relu.default, (late,))
    graph.output((early,))
    for node, segment in ((late, 1), (early, 0)):
        node.meta["segment"] = segment
    with pytest.raises(Refused, match="layer 1 feeds an earlier one through relu"):
        split_layers(fx.GraphModule(nn.Module(), graph))
