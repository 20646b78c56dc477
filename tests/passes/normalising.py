"""A small module around a body of code, normalised and run, and compared with eager.

Shapes: B samples, S positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captured import capture, copy_graph
from torch import Tensor, fx, nn

from regate_fx.passes.base import PassContext
from regate_fx.passes.brackets import CloseBrackets
from regate_fx.passes.pipeline import NORMALISE, run_passes

D, V = 8, 11


class Small(nn.Module):
    """`body(self, x)` on embedded ids; x [B, S, D]."""

    def __init__(self, body: Callable[[Small, Tensor], Any]) -> None:
        super().__init__()
        self.embedding, self.up = nn.Embedding(V, D), nn.Linear(D, D)
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.body = body

    def forward(self, input_ids: Tensor) -> Any:
        return self.body(self, self.embedding(input_ids))


def normalise(gm: fx.GraphModule) -> fx.GraphModule:
    """Normalised, with autocast brackets put back so that it can run."""
    passes = (*NORMALISE, CloseBrackets())
    return run_passes(fx.GraphModule(gm, copy_graph(gm)), PassContext(), passes).graph_module


def step(outputs: Any, module: nn.Module) -> dict[str, Tensor]:
    """Gradients of the sum of the first output's squares."""
    module.zero_grad(set_to_none=True)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    first.float().pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_as_eager(module: nn.Module, ids: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Outputs and their order, dtypes, the set of gradients and their values."""
    seed = torch.random.get_rng_state()
    seen = capture(module, ids, rewrite=normalise).outputs
    seen_gradients = step(seen, module)
    torch.random.set_rng_state(seed)
    wanted = module(**ids)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    assert len(seen) == len(wanted)
    for ours, theirs in zip(seen, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    wanted_gradients = step(wanted, module)
    assert seen_gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(seen_gradients[name], gradient, rtol=1e-5, atol=1e-6)
