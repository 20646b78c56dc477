"""Parameters that a model clamps as it runs: the weights, values and gradients are those of eager PyTorch.

Shapes: B samples, S positions, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captured import capture, copy_graph, run_until
from normalising import Small, step
from torch import Tensor, fx

from regate_fx.passes.base import PassContext, Refused
from regate_fx.passes.pipeline import NORMALISE, run_passes

Body = Callable[[Small, Tensor], Tensor]
LIMIT = 0.05


def clamped(w: Small, x: Tensor) -> Tensor:
    w.up.weight.data.clamp_(-LIMIT, LIMIT)
    return w.up(x)


def clamped_in_each_run(w: Small, x: Tensor) -> Tensor:
    for _ in range(2):
        w.up.weight.data.clamp_(max=LIMIT)
        x = w.up(x).sin()
    return x


def run_with_bounds(gm: fx.GraphModule) -> Any:
    run = run_passes(fx.GraphModule(gm, copy_graph(gm)), PassContext(), NORMALISE)

    def forward(*inputs: Tensor) -> object:
        for bound in run.context.findings["bounds"]:
            bound.apply(inputs)
        return run.graph_module(*inputs)

    return SimpleNamespace(forward=forward)


@pytest.mark.parametrize("body", [clamped, clamped_in_each_run])
def test_weights_values_and_gradients_are_those_of_eager(body: Body, ids: dict[str, Tensor]) -> None:
    module = Small(body)
    eager = copy.deepcopy(module)
    assert (module.up.weight.abs() > LIMIT).any()
    outputs = capture(module, ids, rewrite=run_with_bounds).outputs
    found, wanted = step(outputs, module), step(eager(**ids), eager)
    assert torch.equal(module.up.weight, eager.up.weight)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


def read_before(w: Small, x: Tensor) -> Tensor:
    x = w.up(x)
    w.up.weight.data.clamp_(-LIMIT, LIMIT)
    return w.up(x)


def other_bounds(w: Small, x: Tensor) -> Tensor:
    w.up.weight.data.clamp_(-LIMIT, LIMIT)
    x = w.up(x)
    w.up.weight.data.clamp_(-LIMIT / 2, LIMIT)
    return w.up(x)


def scaled(w: Small, x: Tensor) -> Tensor:
    w.up.weight.data.mul_(0.5)  # not the same when done again
    return w.up(x)


def bounds_of_the_batch(w: Small, x: Tensor) -> Tensor:
    w.up.weight.data.clamp_(max=x.detach().max())
    return w.up(x)


@pytest.mark.parametrize("body", [read_before, other_bounds, scaled, bounds_of_the_batch])
def test_other_writes_are_refused(body: Body, ids: dict[str, Tensor]) -> None:
    with pytest.raises(Refused, match="was detached from"):
        run_until("functionalize", Small(body), ids)
