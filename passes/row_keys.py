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
    """The name of a node's values in their order, whatever its shape: that decides only what meets what later."""
    while _hands_on(node) or _widens(node):
        (node, *_) = node.all_input_nodes
    return _computed(node)


def _computed(node: fx.Node) -> str:
    """The same for nodes that are computed alike, shapes included: in an operand they decide which entries meet."""
    if not _hands_on(node) and operator_name(node) not in _CONDITIONS:
        return node.name
    named = [_named(argument) for argument in (*node.args, *node.kwargs.items())]
    return f"{node.target}{list(fake(node).shape)}({', '.join(named)})"


def _named(argument: object) -> str:
    if isinstance(argument, fx.Node):
        return _computed(argument) if isinstance(fake(argument), torch.Tensor) else argument.name
    return repr(argument)


def _hands_on(node: fx.Node) -> bool:
    name = operator_name(node)
    if name == "aten.slice":
        return _takes_all(node)
    return name in _SAME and node.target is not torch.ops.aten.view.dtype


def _takes_all(node: fx.Node) -> bool:
    """`x[:]`, which a look-up along a later dimension writes for each one before it."""
    given = list(node.args[2:])
    start, end, step = given + [0, None, 1][len(given) :]
    return start in (0, None) and end in (None, 2**63 - 1) and step == 1


def _widens(node: fx.Node) -> bool:
    """A cast between whole numbers to a dtype that has them all."""
    if operator_name(node) != "aten._to_copy":
        return False
    before, after = fake(node.all_input_nodes[0]).dtype, fake(node).dtype
    whole = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return before in whole and after in whole[2:] and torch.iinfo(before).bits <= torch.iinfo(after).bits
