"""Estimate what the matrix products of a captured graph cost, at every position and on the active rows.

The sizes of a captured graph are expressions over B and S, so one capture tells the cost of any batch.
Counted are matrix products, convolutions and attention, two operations per multiply-add. Attention counts
all pairs of positions, causal or not, dense and gated alike.

Shapes: B samples, S positions, N active positions in the batch, L the most active positions of a sample.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from regate_fx.passes.base import fake, operator_name
from regate_fx.passes.layers import DecoderStack
from regate_fx.passes.layouts import Layout
from regate_fx.passes.pipeline import PipelineRun
from regate_fx.passes.placement import Placement
from regate_fx.passes.rules import Kind, Operands
from regate_fx.passes.token_axes import TokenAxes
from regate_fx.passes.token_symbols import TokenSymbols, size_expr
from regate_fx.report import NO_COST, BatchTokens, Cost

BEFORE = -1
"""The segment of what is computed before the first layer, or beside the decoder."""


@dataclass
class GraphCosts:
    """Forward FLOPs by segment: a layer's index, `BEFORE`, or the number of layers for what follows the last.

    uncounted: products whose size depends on data.
    """

    segments: dict[int, Cost] = field(default_factory=dict)
    uncounted: int = 0

    def of(self, segment: int) -> Cost:
        return self.segments.get(segment, NO_COST)


def graph_costs(run: PipelineRun, tokens: BatchTokens) -> GraphCosts:
    """The cost of the graph that `run` rewrote, for a batch of these sizes."""
    products, uncounted = _by_segment(run)
    return GraphCosts({segment: found.cost(tokens) for segment, found in products.items()}, uncounted)


class BatchCosts:
    """What the rewritten graphs of a model cost for any batch."""

    def __init__(self, runs: Sequence[PipelineRun]) -> None:
        self._runs = tuple(runs)

    def of(self, tokens: BatchTokens) -> Cost:
        """Forward FLOPs for a batch of these sizes."""
        return self._products.cost(tokens)

    @functools.cached_property
    def _products(self) -> _Products:
        total = _Products()
        for run in self._runs:
            for products in _by_segment(run)[0].values():
                total.add(products)
        return total


def _by_segment(run: PipelineRun) -> tuple[dict[int, _Products], int]:
    """The products of each segment of a graph, and the number of those whose size depends on data."""
    findings = run.context.findings
    analysis: TokenAxes = findings["token_axes"]
    placement: Placement = findings["placement"]
    stack: DecoderStack = findings["layers"]
    graph: fx.Graph = findings["plan"].rows.graph
    sizes = _Sizes(analysis.symbols, _hints(graph))
    segments: dict[int, _Products] = defaultdict(_Products)
    uncounted = 0
    for node in graph.nodes:
        flops = _flops(node, analysis)
        if flops is None:
            continue
        if not sizes.known(flops):
            uncounted += 1
            continue
        kind = placement.layout(node), analysis.kinds.get(node) is Kind.ATTENTION
        if node in placement.written:
            kind = Layout.PACKED, True
        segments[stack.segment.get(node, BEFORE)].sums[kind] += sizes.renamed(flops)
    return segments, uncounted


_B, _S = sympy.symbols("B S")


@dataclass
class _Products:
    """FLOPs of some products of one or more graphs, added up by layout and whether an attention kernel does them.

    sums: expressions in B and S.
    """

    sums: dict[tuple[Layout, bool], sympy.Expr] = field(
        default_factory=lambda: defaultdict(lambda: sympy.Integer(0))
    )
    _known: dict[tuple[sympy.Expr, int, int], int] = field(default_factory=dict)

    def add(self, other: _Products) -> None:
        for kind, flops in other.sums.items():
            self.sums[kind] += flops

    def cost(self, tokens: BatchTokens) -> Cost:
        batch = len(tokens.active)
        total = NO_COST
        for (layout, kernel), flops in self.sums.items():
            if layout is Layout.DENSE:
                gated = [(batch, tokens.length)]
            elif layout is Layout.COMPACT:
                gated = [(batch, max(tokens.active))]
            elif kernel:
                gated = [(1, length) for length in tokens.active]
            else:
                gated = [(1, sum(tokens.active))]
            dense = self._evaluate(flops, batch, tokens.length)
            total += Cost(dense, sum(self._evaluate(flops, *sizes) for sizes in gated))
        return total

    def _evaluate(self, flops: sympy.Expr, batch: int, length: int) -> int:
        key = flops, batch, length
        if key not in self._known:
            values = {_B: sympy.Integer(batch), _S: sympy.Integer(length)}
            self._known[key] = int(flops.xreplace(values))
        return self._known[key]


@dataclass
class _Sizes:
    """Names the symbols of a graph's sizes; `hints` has numbers for those other than B and S."""

    symbols: TokenSymbols
    hints: dict[sympy.Symbol, sympy.Integer]

    def known(self, expr: sympy.Expr) -> bool:
        ours = self.symbols.batch.free_symbols | self.symbols.length.free_symbols
        return expr.free_symbols <= ours | self.hints.keys()

    def renamed(self, expr: sympy.Expr) -> sympy.Expr:
        """The same in symbols that several graphs can share."""
        batch, length = self.symbols.batch, self.symbols.length
        times = 1
        values = dict(self.hints)
        if length.is_Symbol:
            values[length] = _S
        if batch.is_Symbol:
            values[batch] = _B
        elif self.symbols.mentions(expr):
            # Captured with one sample: every other one costs the same.
            times = _B
        return times * expr.xreplace(values)


def _hints(graph: fx.Graph) -> dict[sympy.Symbol, sympy.Integer]:
    """The sizes that the inputs had when the graph was captured."""
    hints: dict[sympy.Symbol, sympy.Integer] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = fake(node)
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.hint is not None:
                hints[size.node.expr] = sympy.Integer(size.node.hint)
    return hints


def _flops(node: fx.Node, analysis: TokenAxes) -> sympy.Expr | None:
    """Multiply-adds of one operator, twice; None for an operator that is no matrix product."""
    count = _PRODUCTS.get(operator_name(node)) if node.op == "call_function" else None
    if count is None or not isinstance(fake(node), torch.Tensor):
        return None
    return 2 * count(Operands(node, analysis.axes, analysis.symbols))


def _number(shape: Sequence[Any]) -> sympy.Expr:
    return math.prod((size_expr(size) for size in shape), start=sympy.Integer(1))


def _contracting(operand: str) -> Callable[[Operands], sympy.Expr]:
    """One product per entry of the result and of the operand's last dimension."""
    return lambda op: _number(op.shape) * size_expr(fake(op[operand]).shape[-1])


def _attention(op: Operands) -> sympy.Expr:
    *batch, queries, width = fake(op["query"]).shape
    keys = fake(op["key"]).shape[-2]
    return _number((*batch, queries, keys)) * (size_expr(width) + size_expr(fake(op["value"]).shape[-1]))


def _einsum(op: Operands) -> sympy.Expr:
    inputs, arrow, output = op["equation"].replace(" ", "").partition("->")
    if not arrow:
        output = "".join(letter for letter in inputs if inputs.count(letter) == 1)
    contracted: dict[str, Any] = {}
    for subscript, operand in zip(inputs.split(","), op["tensors"], strict=True):
        # An ellipsis stands in the result too, so letters are read from both ends up to it.
        shape = fake(operand).shape
        head, _, tail = subscript.partition("...")
        contracted |= dict(zip(head, shape, strict=False))
        contracted |= dict(zip(reversed(tail), reversed(shape), strict=False))
    return _number(op.shape) * _number([size for letter, size in contracted.items() if letter not in output])


def _grouped(op: Operands) -> sympy.Expr:
    rows, weight = op.tensors()[:2]
    if len(fake(rows).shape) == len(fake(weight).shape) == 2:
        return _number(fake(rows).shape) * size_expr(fake(weight).shape[-1])
    return _number(op.shape) * size_expr(fake(rows).shape[-1])


def _convolution(op: Operands) -> sympy.Expr:
    return _number(op.shape) * _number(fake(op["weight"]).shape[1:])


_PRODUCTS: dict[str, Callable[[Operands], sympy.Expr]] = {
    "aten.linear": _contracting("input"),
    "aten.matmul": _contracting("self"),
    "aten.mm": _contracting("self"),
    "aten.bmm": _contracting("self"),
    "aten.addmm": _contracting("mat1"),
    "aten.baddbmm": _contracting("batch1"),
    "aten.einsum": _einsum,
    "aten.scaled_dot_product_attention": _attention,
    "aten._grouped_mm": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
    "aten.conv1d": _convolution,
    "aten.conv2d": _convolution,
    "aten.conv3d": _convolution,
    "aten.convolution": _convolution,
}
