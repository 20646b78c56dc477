"""Check that a group of operators over (query, key) pairs is an attention that may run in the compact layout.

A group that sums over positions in any other way, or that takes queries for keys, mixes tokens and is refused.
"""

from __future__ import annotations

from torch import fx

from regate_fx.passes.axes import Axes, Token
from regate_fx.passes.base import Refused, operator_name
from regate_fx.passes.contractions import Factor, over_positions
from regate_fx.passes.hidden_keys import HiddenKeys
from regate_fx.passes.rules import Operands
from regate_fx.passes.rules_math import MASKABLE, reduced_dims
from regate_fx.passes.token_axes import TokenAxes
from regate_fx.passes.token_content import MOVES, TokenContent, order_after

# Attention by one operator; its scores are its own.
_ATTENTION = "aten.scaled_dot_product_attention"
# Reductions that leave the axis of keys in place, so that what is summed over it is still to be seen.
_NORMALISING = {"aten.softmax", "aten._softmax"}


def why_no_attention(
    nodes: tuple[fx.Node, ...], analysis: TokenAxes, content: TokenContent, hidden: HiddenKeys
) -> Refused | None:
    """A group of pair operators must be an attention.

    It sums over keys with weights that depend on the (query, key) pair's content, what it sums over are tokens, and
    what leaves it are rows of tokens again, with both token axes. A key that a mask hides counts for nothing in it.
    """
    members = set(nodes)
    for node in nodes:
        name = operator_name(node)
        if (reason := _why_no_sum_over_keys(node, analysis, content)) is not None:
            return Refused("mixes-tokens", f"{name} {reason}", node)
        if _reduces_queries(node, analysis):
            return Refused("mixes-tokens", f"{name} sums over queries, or takes them for keys", node)
        if (counted := _why_hidden_counts(node, analysis, hidden)) is not None:
            return Refused("hidden-keys", f"{name} {counted}", node)
        leaves = any(user not in members for user in node.users)
        axes = analysis.axes[node]
        if leaves and (not isinstance(axes, Axes) or axes.sequences != 1):
            return Refused("attention-shape", f"{name} hands on values over pairs of positions", node)
    return None


def _why_no_sum_over_keys(node: fx.Node, analysis: TokenAxes, content: TokenContent) -> str | None:
    """Why a reduction or product over a sequence axis is not one over the keys of an attention."""
    name = operator_name(node)
    op = Operands(node, analysis.axes, analysis.symbols)
    if name == _ATTENTION:
        sides = ("key", "value")
        if not all(content.varies(op[side], op.axes(side), len(op.axes(side)) - 2) for side in sides):
            return _NO_TOKENS
        return None
    for factors in _summed_together(op):
        weights = [f for f in factors if f.source in content.scored and f.dim == _last_sequence(f.axes)]
        if not weights:
            return "sums over positions with weights that are no attention"
        if name not in _NORMALISING and not any(content.varies(f.source, f.axes, f.dim) for f in factors):
            return _NO_TOKENS
    return None


_NO_TOKENS = "attends to rows that do not vary with the tokens"


def _summed_together(op: Operands) -> list[list[Factor]]:
    """For each sequence axis that an operator reduces or sums over: the operands with that axis."""
    if operator_name(op.node) not in MASKABLE:
        return over_positions(op)
    axes = op.axes("self")
    return [
        [Factor(op["self"], axes, dim, 0)] for dim in reduced_dims(op, axes) if axes.dims[dim] == (Token.S,)
    ]


def _why_hidden_counts(node: fx.Node, analysis: TokenAxes, hidden: HiddenKeys) -> str | None:
    """Why a sum over keys is another one where elided keys are left out than where a mask hides them."""
    op = Operands(node, analysis.axes, analysis.symbols)
    return hidden.why_counted(op) if _summed_together(op) or operator_name(node) == _ATTENTION else None


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
    op = Operands(node, analysis.axes, analysis.symbols)
    if name in MOVES:
        order = order_after(op, axes)
        places = [order.index(dim) for dim, factors in enumerate(axes.dims) if Token.S in factors]
        return places != sorted(places)
    if name not in MASKABLE:
        return False
    reduced = reduced_dims(op, axes)
    return any(axes.dims[dim] == (Token.S,) and dim != _last_sequence(axes) for dim in reduced)
