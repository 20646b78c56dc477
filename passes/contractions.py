"""Which operands a product sums over positions together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from regate_fx.passes.axes import Axes, Dim, Token
from regate_fx.passes.base import operator_name
from regate_fx.passes.rules import Operands

# Matrix products, and the place of their left-hand matrix among the arguments; the right-hand one follows.
MATRIX_PRODUCTS = {"aten.matmul": 0, "aten.bmm": 0, "aten.mm": 0, "aten.baddbmm": 1, "aten.addmm": 1}


@dataclass(frozen=True)
class Factor:
    """One operand of a product: which of its dimensions is summed over, and its place among the operands."""

    source: fx.Node
    axes: Axes
    dim: int
    place: int

    @property
    def summed(self) -> Dim:
        return self.axes.dims[self.dim]


def contractions(op: Operands) -> list[list[Factor]]:
    """For each index that a product sums over, the operands that have it; nothing for other operators."""
    name = operator_name(op.node)
    if name in MATRIX_PRODUCTS:
        left, right = operands_of(op.node, op.node.args)
        sides = (op.axes(left), op.axes(right))
        return [[Factor(left, sides[0], len(sides[0]) - 1, 0), Factor(right, sides[1], len(sides[1]) - 2, 1)]]
    if name != "aten.einsum":
        return []
    inputs, _, output = op["equation"].replace(" ", "").partition("->")
    summed: dict[str, list[Factor]] = {}
    for place, (subscript, source) in enumerate(zip(inputs.split(","), op["tensors"], strict=True)):
        for dim, letter in enumerate(subscript):
            if letter not in output:
                summed.setdefault(letter, []).append(Factor(source, op.axes(source), dim, place))
    return list(summed.values())


def over_positions(op: Operands) -> list[list[Factor]]:
    """The sums of a product that run over positions."""
    return [factors for factors in contractions(op) if factors[0].summed == (Token.S,)]


def zeroed(op: Operands) -> list[Factor]:
    """For each sum over positions the one operand, as small as there is, whose zeros leave a position out."""
    return [
        min(reversed(factors), key=lambda factor: factor.axes.sequences) for factors in over_positions(op)
    ]


def operands_of(node: fx.Node, args: Sequence[Any]) -> Sequence[Any]:
    """The operands of a product among arguments like those of `node`."""
    if operator_name(node) == "aten.einsum":
        return list(args[1])
    first = MATRIX_PRODUCTS[operator_name(node)]
    return args[first : first + 2]


def with_operand(node: fx.Node, args: Sequence[Any], place: int, operand: fx.Node) -> list[Any]:
    """The arguments of a product, with another operand at one place."""
    operands = list(operands_of(node, args))
    operands[place] = operand
    if operator_name(node) == "aten.einsum":
        return [args[0], operands, *args[2:]]
    first = MATRIX_PRODUCTS[operator_name(node)]
    return [*args[:first], *operands, *args[first + 2 :]]
