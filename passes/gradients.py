"""Through which values of a graph a gradient can flow back to its inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from regate_fx.passes.base import fake


def learned_nodes(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, given in the graph's order, that depend on an input with a gradient other than by a detach."""
    learned: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            if _requires_grad(node):
                learned.add(node)
        elif node.target is torch.ops.aten.detach.default or not _may_carry_gradient(fake(node)):
            continue
        elif any(source in learned for source in node.all_input_nodes):
            learned.add(node)
    return learned


def _requires_grad(placeholder: fx.Node) -> bool:
    # Normalisation detaches its inputs: only what Dynamo captured still knows.
    value = placeholder.meta.get("example_value", fake(placeholder))
    return isinstance(value, torch.Tensor) and value.requires_grad


def _may_carry_gradient(value: object) -> bool:
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(item, torch.Tensor) and item.is_floating_point() for item in tensors)
