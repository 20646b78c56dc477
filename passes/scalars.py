"""Numbers among a node's arguments: which are sizes, made anew for the active rows, and which are computed with."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import ToFloat

from regate_fx.passes.base import fake, operator_name
from regate_fx.passes.token_symbols import TokenSymbols

SCALARS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)

# Operators all of whose integer arguments are sizes or places, and those of which only some arguments are.
_SHAPED = {
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.unflatten", "aten.slice", "aten.zeros",
    "aten.ones", "aten.empty", "aten.new_zeros", "aten.new_ones", "aten.new_empty", "aten.arange", "aten.repeat",
    "aten.broadcast_to", "aten.slice_scatter", "autograd_function_apply", "aten._assert_scalar",
}  # fmt: skip
_PARTLY_SHAPED = {"aten.full": {0}, "aten.new_full": {1}, "aten.split_with_sizes": {1}}


def scalar_expr(value: Any) -> sympy.Expr:
    return (
        value.node.expr
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
        else sympy.sympify(value)
    )


def size_arguments(node: fx.Node) -> set[int] | None:
    """Positions of the arguments that are sizes; None for all."""
    name = operator_name(node)
    return None if name in _SHAPED else _PARTLY_SHAPED.get(name, set())


def is_token_number(value: Any, symbols: TokenSymbols) -> bool:
    """Whether a fake value is a number that depends on the batch or sequence size, or on how many tokens are picked."""
    return isinstance(value, SCALARS) and (symbols.mentions(scalar_expr(value)) or is_count(value, symbols))


def is_count(value: Any, symbols: TokenSymbols) -> bool:
    """Whether a fake value is a number that depends on how many tokens are picked."""
    return isinstance(value, SCALARS) and not symbols.counts.isdisjoint(scalar_expr(value).free_symbols)


def computes_with_sizes(node: fx.Node, symbols: TokenSymbols) -> bool:
    """Whether a number that depends on the batch or sequence size is an argument of a node and no size there."""
    sizes = size_arguments(node)
    if sizes is None:
        return False
    found: list[fx.Node] = []
    for index, argument in enumerate(node.args):
        if index not in sizes:
            fx.map_arg(argument, found.append)
    fx.map_arg(node.kwargs, found.append)
    return any(is_token_number(fake(argument), symbols) for argument in found)


def positions_in_divisor(node: fx.Node, symbols: TokenSymbols) -> sympy.Expr | None:
    """How many times the number that a node divides by is that of all positions, B * S; None if it is no multiple."""
    if operator_name(node) != "aten.div" or node.kwargs or not isinstance(node.args[1], fx.Node):
        return None
    value = fake(node.args[1])
    if not isinstance(value, SCALARS):
        return None
    number = scalar_expr(value).replace(ToFloat, lambda whole: whole)
    times = sympy.simplify(number / (symbols.batch * symbols.length))
    return times if times.is_number else None
