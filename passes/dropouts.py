"""Make dropout's result one that may be written to, as normalisation freezes it.

Whether `aten::dropout` returns its input or a new tensor depends on its arguments; tracing therefore forbids writes to
what it returns. Here the arguments are known.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior, operator.setitem,
}  # fmt: skip


def free_dropouts(gm: fx.GraphModule) -> int:
    """Replace in a Dynamo graph each dropout that does nothing by its input; copy those that are written to."""
    freed = 0
    for node in gm.graph.find_nodes(op="call_function", target=torch.nn.functional.dropout):
        source, p, training, in_place = _arguments(*node.args, **node.kwargs)
        if in_place or not isinstance(p, (int, float)):
            continue
        if p == 0 or not training:
            node.replace_all_uses_with(source)  # what eager returns: the very tensor
            gm.graph.erase_node(node)
        elif any(_writes_to(user, node) for user in node.users):
            _copy_result(gm, node)
        else:
            continue
        freed += 1
    return freed


def _arguments(
    input: fx.Node, p: Any = 0.5, training: Any = True, inplace: Any = False
) -> tuple[fx.Node, Any, Any, Any]:
    return input, p, training, inplace


def _writes_to(user: fx.Node, node: fx.Node) -> bool:
    if not user.args or user.args[0] is not node:
        return False
    if user.op == "call_method":
        return str(user.target).endswith("_") and not str(user.target).endswith("__")
    return user.target in _IN_PLACE


def _copy_result(gm: fx.GraphModule, node: fx.Node) -> None:
    with gm.graph.inserting_after(node):
        copy = gm.graph.call_method("clone", (node,))
    copy.meta = dict(node.meta)
    node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
