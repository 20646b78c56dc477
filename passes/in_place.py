"""Which operators of a Dynamo graph write in place, under which grad mode, to what, and which values share memory."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

_OPERATORS = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.iand, operator.ior, operator.ixor, operator.ipow, operator.imod,
}  # fmt: skip


def with_grad_mode(graph: fx.Graph) -> Iterator[tuple[fx.Node, bool]]:
    """Each node, in order, with whether gradients are enabled where it runs."""
    enabled = True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        yield node, enabled


def writes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return node.op == "call_function" and (
        node.target in _OPERATORS or in_place or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    )


def targets(node: fx.Node) -> list[fx.Node]:
    """What an operator that writes in place writes to: a tensor, or those of a list."""
    written: list[fx.Node] = []
    fx.map_arg((node.kwargs.get("out"), node.args[:1]), written.append)
    return written


def storage(node: fx.Node) -> int:
    """The same number for values that share memory; -1 for what is no tensor."""
    value = node.meta.get("example_value")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else -1
