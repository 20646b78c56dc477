"""Writes under `no_grad` to values that carry gradients.

Eager PyTorch changes the value and leaves its gradient history alone. A functional graph makes a new value instead,
which was computed under `no_grad` and has no history: the same loss, other gradients. Such a write is refused.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from regate_fx.passes.base import Refused

_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.iand, operator.ior, operator.ixor, operator.ipow, operator.imod,
}  # fmt: skip


def refuse_writes_without_grad(gm: fx.GraphModule) -> None:
    """Raise `Refused` for an in-place operator of a Dynamo graph that is under `no_grad` and writes to a value,
    or a view of one, that requires grad."""
    grad_enabled = True
    carriers: dict[int, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            grad_enabled = bool(node.args[0])
            continue
        if not grad_enabled and _writes(node):
            for target in _targets(node):
                if (owner := carriers.get(_storage(target))) is not None:
                    reason = f"{node.name} writes under no_grad to {owner.name}, which carries gradients"
                    raise Refused("write-without-grad", reason, node)
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.requires_grad:
            carriers[_storage(node)] = node


def _writes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.startswith("_")
    return node.op == "call_function" and (
        node.target in _IN_PLACE or in_place or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    )


def _targets(node: fx.Node) -> list[fx.Node]:
    written = [node.kwargs.get("out"), *node.args[:1]]
    return [target for target in written if isinstance(target, fx.Node)]


def _storage(node: fx.Node) -> int:
    value = node.meta.get("example_value")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else -1
