"""What each operator does to token axes: the registry, and the verdict a rule returns.

A rule proves how one operator treats batch and sequence. An operator without a rule, or used in a way its rule
does not cover, is refused: it may still run densely outside the gated part, never inside it.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regate_fx.passes.axes import NO_AXES, Axes, merge
from regate_fx.passes.base import Refused, fake, operator_name
from regate_fx.passes.row_keys import row_key
from regate_fx.passes.token_symbols import TokenSymbols

Result = Axes | tuple[Axes, ...]


def parts_of(result: Result) -> tuple[Axes, ...]:
    """The axes of each value of a node, which may have several."""
    return result if isinstance(result, tuple) else (result,)


class Kind(enum.Enum):
    """How an operator treats tokens."""

    ROWS = "every token row by itself"
    SAMPLES = "every token row by itself, beside a value of its sample"
    PAIRS = "pairs of positions, or a reduction over positions"
    ATTENTION = "scaled dot-product attention"
    LOSS = "cross entropy over token rows"
    CONSTANT = "the same value at every token, or row numbers: made anew for the active rows"


@dataclass(frozen=True)
class Verdict:
    """The axes of a node's value (a tuple for several values) and how it treats tokens.

    `reads_offsets`: the operator takes ends of groups of rows, and is known to compute each row by itself.
    `reads_numbers`: it takes numbers of rows, and is known to take them for nothing else.
    `unread`: operands that are taken for their gradients alone.
    """

    axes: Result
    kind: Kind = Kind.ROWS
    reads_offsets: bool = False
    reads_numbers: bool = False
    unread: tuple[fx.Node, ...] = ()


Rule = Callable[["Operands"], Verdict]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, named as `operator_name` names them, or for one overload: `aten.where.default`."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


class Operands:
    """One node as its rule sees it: arguments by schema name, and the axes of tensor arguments."""

    def __init__(
        self, node: fx.Node, axes: dict[fx.Node, Result], symbols: TokenSymbols, within: str = ""
    ) -> None:
        self.node = node
        self._within = within
        self.symbols = symbols
        self._axes = axes
        self._arguments = _bind(node)

    def __getitem__(self, name: str) -> Any:
        """An argument by its schema name, with the schema's default where it was left out."""
        return self._arguments[name]

    def axes(self, operand: str | fx.Node | None) -> Axes:
        """Axes of an argument; no axes for scalars and None."""
        value = self._arguments.get(operand) if isinstance(operand, str) else operand
        if not isinstance(value, fx.Node):
            return NO_AXES
        result = self._axes[value]
        if not isinstance(result, Axes):
            raise Refused("axis", "a list of tensors is used as one value", self.node)
        return result

    def known(self, node: Any) -> Result | None:
        """The axes of a node of the graph, None where they are not known."""
        return self._axes.get(node)

    def result_of(self, operand: str) -> Result:
        return self._axes[self._arguments[operand]]

    def tensors(self) -> list[fx.Node]:
        return [node for node in self.node.all_input_nodes if isinstance(fake(node), torch.Tensor)]

    @property
    def shape(self) -> torch.Size:
        """Shape of the node's own value."""
        return fake(self.node).shape

    def key(self, node: fx.Node) -> str:
        """`row_key` of a node; names of nodes are those of one graph, which may be a body within another."""
        return self._within + row_key(node)

    def dim(self, value: int, of: Axes) -> int:
        return value % max(len(of), 1)

    def refuse(self, code: str, reason: str) -> Refused:
        return Refused(code, f"{operator_name(self.node)} {reason}", self.node)


def _bind(node: fx.Node) -> dict[str, Any]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(index): argument for index, argument in enumerate(node.args)}
    names, defaults = _signature(node.target)
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


@functools.cache
def _signature(target: torch._ops.OpOverload) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of an operator's parameters, and the defaults of those that have one."""
    parameters = target._schema.arguments
    defaults = {each.name: each.default_value for each in parameters if each.has_default_value()}
    return tuple(each.name for each in parameters), defaults


def kind_of(result: Axes, *operands: Axes) -> Kind:
    """`PAIRS` where the value or an operand ranges over pairs of positions, else `ROWS`."""
    return Kind.PAIRS if any(axes.sequences > 1 for axes in (result, *operands)) else Kind.ROWS


def kind_of_product(result: Axes, *operands: Axes) -> Kind:
    """`SAMPLES` where rows of tokens are multiplied by values of their samples, which have no positions."""
    kind = kind_of(result, *operands)
    beside = any(axes.has_batch and not axes.sequences for axes in operands)
    return Kind.SAMPLES if kind is Kind.ROWS and result.sequences and beside else kind


def rowwise(op: Operands, operands: Sequence[Axes]) -> Verdict:
    """An operator that broadcasts its operands and treats every element by itself."""
    result = Axes(merge(operands, operator_name(op.node)))
    return Verdict(result, kind_of(result, *operands))
