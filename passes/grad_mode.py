"""Writes under `no_grad` to values that carry gradients.

Eager PyTorch changes the value and leaves its gradient history alone. A functional graph makes a new value instead,
which was computed under `no_grad` and has no history: the same loss, other gradients. Such a write is refused.
"""

from __future__ import annotations

import torch
from torch import fx

from regate_fx.passes.base import Refused
from regate_fx.passes.in_place import storage, targets, with_grad_mode, writes


def refuse_writes_without_grad(gm: fx.GraphModule) -> None:
    """Raise `Refused` for an in-place operator of a Dynamo graph that is under `no_grad` and writes to a value,
    or a view of one, that requires grad; or for one that gives a tensor the memory of another."""
    _refuse_new_memory(gm)
    carriers: dict[int, fx.Node] = {}
    for node, grad_enabled in with_grad_mode(gm.graph):
        if not grad_enabled and writes(node):
            for target in targets(node):
                if (owner := carriers.get(storage(target))) is not None:
                    reason = f"{node.name} writes under no_grad to {owner.name}, which carries gradients"
                    raise Refused("write-without-grad", reason, node)
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.requires_grad:
            carriers[storage(node)] = node


def _refuse_new_memory(gm: fx.GraphModule) -> None:
    """`x.data = y`, which Dynamo records as `set_`: views of x that are already there keep the old memory."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.Tensor.set_):
        reason = f"{node.name} gives {node.args[0]} the memory of another tensor, as `x.data = y` does"
        raise Refused("mutation", reason, node)
