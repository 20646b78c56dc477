"""Features added to the rows that a mask picks become a tensor of their own, and nothing else does.

Shapes: B samples, S positions, D hidden size, M positions in the mask.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captured import capture, copy_graph, operators
from torch import Tensor, fx, nn

from regate_fx.passes.base import PassContext
from regate_fx.passes.pipeline import NORMALISE, PipelineRun, run_passes

Write = Callable[[Tensor, Tensor, Tensor], None]


def adds(states: Tensor, mask: Tensor, features: Tensor) -> None:
    states[mask, :] = states[mask, :] + features


def adds_in_place(states: Tensor, mask: Tensor, features: Tensor) -> None:
    states[mask] += features


def scales(states: Tensor, mask: Tensor, features: Tensor) -> None:
    states[mask, :] = states[mask, :] * features


def adds_other_rows(states: Tensor, mask: Tensor, features: Tensor) -> None:
    states[mask, :] = states.roll(1, 0)[mask, :] + features


def adds_one_row(states: Tensor, mask: Tensor, features: Tensor) -> None:
    states[mask, :] = states[mask, :] + features[0]


class Writes(nn.Module):
    def __init__(self, write: Write, features: Tensor) -> None:
        super().__init__()
        self.write = write
        self.features = nn.Parameter(features)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = states.clone()
        self.write(states, mask, self.features)
        return states.sin()


def check(write: Write) -> PipelineRun:
    """Run the normalised graph: values and gradients are those of eager PyTorch; returns how it was made."""
    mask = torch.rand(3, 7) < 0.4
    module = Writes(write, torch.randn(int(mask.sum()), 5))
    states = torch.randn(3, 7, 5, requires_grad=True)
    seen: list[PipelineRun] = []

    def normalise(gm: fx.GraphModule) -> fx.GraphModule:
        copied = fx.GraphModule(gm, copy_graph(gm))
        seen.append(run_passes(copied, PassContext(), NORMALISE))
        return seen[0].graph_module

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (found,) = capture(module, {"states": states, "mask": mask}, rewrite=normalise).outputs
    expected = module(states, mask)
    torch.testing.assert_close(found, expected)
    inputs = [states, module.features]
    for ours, theirs in zip(
        *(torch.autograd.grad(v.square().sum(), inputs) for v in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    return seen[0]


@pytest.mark.parametrize("write", [adds, adds_in_place])
def test_added_features_are_laid_out_first(write: Write) -> None:
    run = check(write)
    counts = operators(run.graph_module)
    assert run.rewrites["add_masked_rows"] == counts["aten.masked_scatter"] == 1
    assert counts["aten.index_put"] == counts["aten.index"] == 0
    assert counts["aten._assert_async"] == 1


@pytest.mark.parametrize("write", [scales, adds_other_rows, adds_one_row])
def test_other_writes_are_left_alone(write: Write) -> None:
    run = check(write)
    counts = operators(run.graph_module)
    assert run.rewrites["add_masked_rows"] == counts["aten.masked_scatter"] == 0
    assert counts["aten.index_put"] == 1
