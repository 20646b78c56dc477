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
    or a view of one, that requires grad."""
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
