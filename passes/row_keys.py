"""Names for what rows are told apart by: expert ids, and conditions on them.

Two nodes of one name hold the same values in the same order, so that rows picked by the one can be written back by
the other. A model often computes a condition anew for each use.
"""

from __future__ import annotations

import torch
from torch import fx

from regate_fx.passes.base import fake, operator_name

# What hands on the values in their order.
_SAME = {
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.squeeze",
    "aten.unsqueeze", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach",
}  # fmt: skip
_CONDITIONS = {
    "aten.eq", "aten.ne", "aten.lt", "aten.le", "aten.gt", "aten.ge", "aten.logical_not", "aten.bitwise_not",
    "aten.logical_and", "aten.logical_or", "aten.bitwise_and", "aten.bitwise_or", "aten.select", "aten._to_copy",
}  # fmt: skip


def row_key(node: fx.Node) -> str:
    """The name of a node's values, the same for nodes that are computed alike of the same ones."""
    name = operator_name(node)
    if name in _SAME or (name == "aten.slice" and _takes_all(node)):
        return row_key(node.args[0])
    if name == "aten._to_copy" and _is_whole(node) and _is_whole(node.args[0]):
        return row_key(node.args[0])
    if name not in _CONDITIONS:
        return node.name
    named = [_named(argument) for argument in (*node.args, *node.kwargs.items())]
    return f"{node.target}({', '.join(named)})"


def _named(argument: object) -> str:
    return row_key(argument) if isinstance(argument, fx.Node) else repr(argument)


def _takes_all(node: fx.Node) -> bool:
    """`x[:]`, which a look-up along a later dimension writes for each one before it."""
    given = list(node.args[2:])
    start, end, step = given + [0, None, 1][len(given) :]
    return start in (0, None) and end in (None, 2**63 - 1) and step == 1


def _is_whole(node: object) -> bool:
    """Whether a node's values are whole numbers, which casts between their dtypes leave as they are."""
    value = fake(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return False
    return not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
