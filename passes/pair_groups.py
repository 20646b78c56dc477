"""Check that a group of operators over (query, key) pairs is an attention that may run in the compact layout.

A group that sums over positions in any other way, or that takes queries for keys, mixes tokens and is refused.
"""

from __future__ import annotations

from torch import fx

from regate_fx.passes.axes import Axes, Token
from regate_fx.passes.base import Refused, operator_name
from regate_fx.passes.layers import DecoderStack
from regate_fx.passes.rules import Operands
from regate_fx.passes.rules_math import MASKABLE
from regate_fx.passes.token_axes import TokenAxes

_PRODUCTS = {"aten.matmul", "aten.bmm", "aten.mm", "aten.baddbmm", "aten.addmm"}


def why_no_attention(nodes: tuple[fx.Node, ...], stack: DecoderStack, analysis: TokenAxes) -> Refused | None:
    """A group of pair operators must be an attention.

    It sums over keys with weights that depend on the (query, key) pair's content, and what leaves it are rows of
    tokens again, with both token axes.
    """
    members = set(nodes)
    for node in nodes:
        if _sums_without_pairs(node, stack, analysis):
            reason = f"{operator_name(node)} sums over positions with weights that are no attention"
            return Refused("mixes-tokens", reason, node)
        if _reduces_queries(node, analysis):
            return Refused(
                "mixes-tokens", f"{operator_name(node)} sums over queries, or takes them for keys", node
            )
        leaves = any(user not in members for user in node.users)
        axes = analysis.axes[node]
        if leaves and (not isinstance(axes, Axes) or axes.sequences != 1):
            return Refused(
                "attention-shape", f"{operator_name(node)} hands on values over pairs of positions", node
            )
    return None


def _sums_without_pairs(node: fx.Node, stack: DecoderStack, analysis: TokenAxes) -> bool:
    """Whether a product contracts positions although no operand holds one number per pair made from content."""
    contracted = _contracted(node, analysis)
    if not contracted:
        return False
    return not any(
        source in stack.content and axes.sequences == 2 and _last_sequence(axes) == dim
        for source, axes, dim in contracted
    )


def _contracted(node: fx.Node, analysis: TokenAxes) -> list[tuple[fx.Node, Axes, int]]:
    """Operands of a product, each with the sequence dimension that it is summed over."""
    name = operator_name(node)
    if name in _PRODUCTS:
        sides = zip(node.args[-2:], (-1, -2), strict=True)
        found = [(source, analysis.of(source), len(analysis.of(source)) + dim) for source, dim in sides]
        return [entry for entry in found if entry[1].dims[entry[2]] == (Token.S,)]
    if name != "aten.einsum":
        return []
    inputs, _, output = str(node.args[0]).replace(" ", "").partition("->")
    operands = zip(inputs.split(","), node.args[1], strict=True)
    return [
        (source, analysis.of(source), dim)
        for subscript, source in operands
        for dim, letter in enumerate(subscript)
        if letter not in output and analysis.of(source).dims[dim] == (Token.S,)
    ]


def _last_sequence(axes: Axes) -> int:
    return max(dim for dim, factors in enumerate(axes.dims) if Token.S in factors)


def _reduces_queries(node: fx.Node, analysis: TokenAxes) -> bool:
    """Whether an operator sums over the first of two sequence axes, or exchanges them: keys are the last one."""
    name = operator_name(node)
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(axes := analysis.axes.get(source), Axes):
        return False
    if axes.sequences != 2:
        return False
    if name in ("aten.permute", "aten.transpose", "aten.t", "aten.mT"):
        return _order_changes(node, axes, analysis)
    if name not in MASKABLE:
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    reduced = [dim % len(axes) for dim in listed if isinstance(dim, int)]
    return any(axes.dims[dim] == (Token.S,) and dim != _last_sequence(axes) for dim in reduced)


def _order_changes(node: fx.Node, axes: Axes, analysis: TokenAxes) -> bool:
    """Whether moving dimensions puts the last sequence axis before the first."""
    op = Operands(node, analysis.axes, analysis.symbols)
    order = list(range(len(axes)))
    if operator_name(node) == "aten.permute":
        order = [dim % len(axes) for dim in op["dims"]]
    else:
        first, second = (op["dim0"], op["dim1"]) if operator_name(node) == "aten.transpose" else (-2, -1)
        order[first], order[second] = order[second], order[first]
    places = [order.index(dim) for dim, factors in enumerate(axes.dims) if Token.S in factors]
    return places != sorted(places)
