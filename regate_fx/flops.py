"""Estimate what the matrix products of a captured graph cost, at every position and on the active rows.

The sizes of a captured graph are expressions over B and S, so one capture tells the cost of any batch.
Counted are matrix products, convolutions and attention, two operations per multiply-add. Attention counts
all pairs of positions, causal or not, dense and gated alike.

Shapes: B samples, S positions, N active positions in the batch, L the most active positions of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from regate_fx.passes.axes import TokenSymbols, size_expr
from regate_fx.passes.base import fake, operator_name
from regate_fx.passes.layers import DecoderStack
from regate_fx.passes.layouts import Layout
from regate_fx.passes.pipeline import PipelineRun
from regate_fx.passes.placement import Placement
from regate_fx.passes.rules import Kind, Operands
from regate_fx.passes.token_axes import TokenAxes
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
    findings = run.context.findings
    analysis: TokenAxes = findings["token_axes"]
    placement: Placement = findings["placement"]
    stack: DecoderStack = findings["layers"]
    graph: fx.Graph = findings["plan"].rows.graph
    sizes = _Sizes(analysis.symbols, _hints(graph))
    costs = GraphCosts()
    for node in graph.nodes:
        flops = _flops(node, analysis)
        if flops is None:
            continue
        if not sizes.known(flops):
            costs.uncounted += 1
            continue
        kernel = analysis.kinds.get(node) is Kind.ATTENTION
        cost = _cost(flops, sizes, placement.layout(node), kernel, tokens)
        segment = stack.segment.get(node, BEFORE)
        costs.segments[segment] = costs.of(segment) + cost
    return costs


def _cost(flops: sympy.Expr, sizes: _Sizes, layout: Layout, kernel: bool, tokens: BatchTokens) -> Cost:
    batch = len(tokens.active)
    dense = sizes.evaluate(flops, batch, tokens.length)
    if layout is Layout.DENSE:
        return Cost(dense, dense)
    if layout is Layout.COMPACT:
        return Cost(dense, sizes.evaluate(flops, batch, max(tokens.active)))
    runs = tokens.active if kernel else (sum(tokens.active),)
    return Cost(dense, sum(sizes.evaluate(flops, 1, length) for length in runs))


@dataclass
class _Sizes:
    """Puts numbers in the place of symbols; `hints` has those of symbols other than B and S."""

    symbols: TokenSymbols
    hints: dict[sympy.Symbol, sympy.Integer]
    _known: dict[tuple[sympy.Expr, int, int], int] = field(default_factory=dict)

    def known(self, expr: sympy.Expr) -> bool:
        ours = self.symbols.batch.free_symbols | self.symbols.length.free_symbols
        return expr.free_symbols <= ours | self.hints.keys()

    def evaluate(self, expr: sympy.Expr, batch: int, length: int) -> int:
        key = expr, batch, length
        if key not in self._known:
            self._known[key] = self._evaluate(expr, batch, length)
        return self._known[key]

    def _evaluate(self, expr: sympy.Expr, batch: int, length: int) -> int:
        values = dict(self.hints)
        times = 1
        if self.symbols.batch.is_Symbol:
            values[self.symbols.batch] = sympy.Integer(batch)
        elif self.symbols.mentions(expr):
            # Captured with one sample: every other one costs the same.
            times = batch
        values[self.symbols.length] = sympy.Integer(length)
        return times * int(expr.xreplace(values))


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
