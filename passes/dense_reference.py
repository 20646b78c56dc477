"""The dense reference: the same captured graph without any gather, slow and simple.

Every position is computed. An elided position is hidden from the others' attention, keeps its state as a constant
through each gated layer, and its logits count for nothing. It tells what the rewrite on active rows must give,
whatever the attention looks like; since it shares the capture, it says nothing about the capture itself.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from regate_fx.passes.axes import Axes, Cut, Factor, Token, has_token
from regate_fx.passes.base import PassContext, PassResult, Refused, fake, fake_mode_of, operator_name
from regate_fx.passes.contractions import operands_of, with_operand, zeroed
from regate_fx.passes.emit import Emitter
from regate_fx.passes.layers import DecoderStack, Layer
from regate_fx.passes.layouts import Layout, Layouts
from regate_fx.passes.plan_nodes import PlanNodes
from regate_fx.passes.rules import Kind, Operands
from regate_fx.passes.rules_math import MASKABLE
from regate_fx.passes.scalars import positions_in_divisor
from regate_fx.passes.token_axes import TokenAxes
from regate_fx.passes.token_sums import TokenSums

aten = torch.ops.aten


@dataclass(frozen=True)
class DenseReference:
    """Mask the captured graph in place instead of rewriting it on active rows.

    Rewrites every gated layer, every loss and every other sum over tokens. Refuses models without a residual stream, of
    which no layer's input and output could be named, and values whose token axes are folded with features.
    """

    name: str = "dense_reference"
    after: tuple[str, ...] = ("place",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        rewrite = _Reference(gm, ctx)
        gated = [layer for layer in rewrite.stack.layers if layer.refused is None]
        layouts = ctx.findings["placement"].layouts
        # A sum that a dense layer spreads to its tokens is over all of them.
        summands = {node: rewrite.summand(node) for node in rewrite.sums.begins if node in layouts}
        for layer in gated:
            rewrite.mask_layer(layer)
        losses = [node for node, kind in rewrite.analysis.kinds.items() if kind is Kind.LOSS]
        for node in losses:
            rewrite.mask_loss(node)
        for node, summand in summands.items():
            rewrite.mask_sum(node, summand)
        rewrite.count_active(layouts)
        ctx.findings["loss"] = bool(losses)
        return PassResult(gm, len(gated) + len(losses))


class _Reference:
    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.graph = gm.graph
        self.emit = Emitter(gm.graph, fake_mode_of(gm))
        self.analysis: TokenAxes = ctx.findings["token_axes"]
        self.stack: DecoderStack = ctx.findings["layers"]
        self.plan: PlanNodes = ctx.findings["plan"]
        self.symbols = self.analysis.symbols
        self.sums: TokenSums = ctx.findings["token_sums"]
        with self.graph.inserting_before(_first_operator(gm)):
            self.active = self.emit.call(aten.ge.Scalar, self.plan.row_of, 0)
            self.elided = self.emit.call(aten.logical_not.default, self.active)
            self.layouts = Layouts(self.emit, self.plan)
        self.held: dict[fx.Node, fx.Node] = {}

    def mask_layer(self, layer: Layer) -> None:
        if layer.start is None or layer.end is None:
            raise Refused("no-stream", "the layer has no residual stream to hold elided states", layer.anchor)
        for attention in layer.attentions:
            for node in attention.nodes:
                with self.emit.like(node), self.graph.inserting_before(node):
                    self._hide_keys(node)
        self._hold(layer.start, layer.end)

    def _hold(self, start: fx.Node, end: fx.Node) -> None:
        """`where(active, end, start)` with `start` a constant, read by everything behind the layer."""
        users = list(end.users)
        with self.emit.like(end), self.graph.inserting_before(end.next):
            constant = self.emit.call(aten.detach.default, self.held.get(start, start))
            active = self._along(self.active, self.analysis.of(end))
            held = self.emit.call(aten.where.self, active, end, constant)
        for user in users:
            user.replace_input_with(end, held)
        self.held[end] = held

    def _along(self, grid: fx.Node, axes: Axes) -> fx.Node:
        """A [B, S] grid shaped to broadcast to a value of `axes`."""
        shape: list[fx.Node | int] = []
        for dim in axes.dims:
            if dim in ((Token.B, Token.S), (Token.S, Token.B)):
                shape.append(-1)
            elif dim in ((Token.B,), (Token.S,)):
                shape.append(self._size(Token.B if dim == (Token.B,) else Token.S))
            elif has_token(dim):
                raise Refused("layout", "the reference does not mask an axis that folds tokens with features")
            else:
                shape.append(1)
        return self.emit.call(aten.reshape.default, self._in_order(grid, axes.factors), shape)

    def _in_order(self, grid: fx.Node, factors: Sequence[Factor]) -> fx.Node:
        """A [B, S] grid, as [S, B] where the sequence comes first in what it is to meet."""
        tokens = [factor for factor in factors if isinstance(factor, Token)]
        is_turned = tokens[:1] == [Token.S] and Token.B in tokens
        return self.emit.call(aten.transpose.int, grid, 0, 1) if is_turned else grid

    def _size(self, token: Token) -> fx.Node | int:
        return self.emit.size(self.plan.row_of, 0 if token is Token.B else 1)

    # -- attention -------------------------------------------------------------------------------------

    def _hide_keys(self, node: fx.Node) -> None:
        op = Operands(node, self.analysis.axes, self.symbols)
        name = operator_name(node)
        if name == "aten.scaled_dot_product_attention":
            self._mask_attention(op)
        elif name in MASKABLE:
            axes = op.axes("self")
            for dim, factors in enumerate(axes.dims):
                if factors == (Token.S,) and dim in _reduced(op, axes):
                    node.replace_input_with(op["self"], self._filled(op["self"], axes, dim, name))
        else:
            for factor in zeroed(op):
                value = operands_of(node, node.args)[factor.place]
                filled = self._filled(value, factor.axes, factor.dim, "aten.sum")
                node.args = tuple(with_operand(node, node.args, factor.place, filled))

    def _filled(self, value: fx.Node, axes: Axes, dim: int, name: str) -> fx.Node:
        """A value with elided keys filled.

        An elided query sees what it saw before: its row is dropped, but must stay finite.
        """
        batched = Axes(tuple(d if i == dim or Token.B in d else () for i, d in enumerate(axes.dims)))
        visible = self._folded(self.active, batched, dim)
        others = [i for i, d in enumerate(axes.dims) if d == (Token.S,) and i != dim]
        if others:
            rows = Axes(tuple(d if i == others[0] or Token.B in d else () for i, d in enumerate(axes.dims)))
            visible = self.emit.call(
                aten.logical_or.default, visible, self._folded(self.elided, rows, others[0])
            )
        filler = torch.finfo(fake(value).dtype).min if MASKABLE.get(name) == "lowest" else 0.0
        return self.emit.call(aten.where.ScalarOther, visible, value, filler)

    def _folded(self, grid: fx.Node, axes: Axes, dim: int) -> fx.Node:
        """As `_along` for the sequence axis `dim`, also where heads are folded into the batch axis: `(B, H)`."""
        shape: list[fx.Node | int] = []
        wide: list[fx.Node | int] = []
        for index, factors in enumerate(axes.dims):
            if index == dim:
                shape.append(self._size(Token.S))
                wide.append(-1)
            elif factors and factors[0] is Token.B:
                shape.extend([self._size(Token.B), 1])
                heads = 1
                for factor in factors[1:]:
                    if not isinstance(factor, int):
                        raise Refused("layout", "the reference does not mask an axis folded this way")
                    heads *= factor
                wide.extend([-1, heads])
            elif has_token(factors):
                raise Refused("layout", "the reference does not mask an axis folded this way")
            else:
                shape.append(1)
                wide.append(1)
        view = self.emit.call(aten.reshape.default, self._in_order(grid, axes.factors), shape)
        expanded = self.emit.call(aten.expand.default, view, wide)
        sizes: list[fx.Node | int] = [
            self._size(Token.S) if i == dim else -1 if factors else 1 for i, factors in enumerate(axes.dims)
        ]
        return self.emit.call(aten.reshape.default, expanded, sizes)

    def _mask_attention(self, op: Operands) -> None:
        """Hide elided keys from active queries in `scaled_dot_product_attention`'s own mask."""
        node = op.node
        query = op.axes("query")
        pairs = Axes((*query.dims[:-1], (Token.S,)))
        last = len(pairs) - 1
        keys = Axes(tuple(d if i == last or Token.B in d else () for i, d in enumerate(pairs.dims)))
        rows = Axes(tuple(d if i == last - 1 or Token.B in d else () for i, d in enumerate(pairs.dims)))
        visible = self.emit.call(
            aten.logical_or.default,
            self._folded(self.active, keys, last),
            self._folded(self.elided, rows, last - 1),
        )
        mask = op["attn_mask"]
        if op["is_causal"]:
            length = self._size(Token.S)
            square = self.emit.call(
                aten.ones.default, [length, length], dtype=torch.bool, device=fake(self.active).device
            )
            mask = self.emit.call(aten.tril.default, square)
        if mask is None:
            mask = visible
        elif fake(mask).dtype is torch.bool:
            mask = self.emit.call(aten.logical_and.default, mask, visible)
        else:
            mask = self.emit.call(aten.where.ScalarOther, visible, mask, torch.finfo(fake(mask).dtype).min)
        node.args = (op["query"], op["key"], op["value"], mask, op["dropout_p"], False)
        node.kwargs = {"scale": op["scale"], "enable_gqa": op["enable_gqa"]}

    # -- loss -------------------------------------------------------------------------------------------

    def mask_loss(self, node: fx.Node) -> None:
        """Labels whose row is elided are ignored; the mean over none is zero."""
        op = Operands(node, self.analysis.axes, self.symbols)
        with self.emit.like(node), self.graph.inserting_before(node):
            rows = self._logits_rows(op)
            target = self.emit.call(aten.where.ScalarOther, rows, op["target"], op["ignore_index"])
            nll = self.emit.call(
                aten.cross_entropy_loss.default, op["self"], target, None, 0, op["ignore_index"]
            )
            loss = self.emit.call(aten.sum.default, nll)
            if op["reduction"] != 2:
                counted = self.emit.call(aten.ne.Scalar, target, op["ignore_index"])
                count = self.emit.call(aten.clamp.default, self.emit.call(aten.sum.default, counted), 1)
                loss = self.emit.call(aten.div.Tensor, loss, count)
        node.replace_all_uses_with(loss)
        self.graph.erase_node(node)

    # -- other sums over tokens ---------------------------------------------------------------------------

    def summand(self, node: fx.Node) -> _Summand:
        """What a node sums. Asked before layers are masked, which puts other nodes in the place of those analysed."""
        known = _SUMMANDS.get(operator_name(node))
        if known is None:
            raise Refused("no-reference", f"{operator_name(node)} sums over tokens in an unknown way", node)
        name, filler = known
        return _Summand(name, Operands(node, self.analysis.axes, self.symbols).axes(name), filler)

    def mask_sum(self, node: fx.Node, summand: _Summand) -> None:
        """Leave elided tokens out of a sum, or of a mean."""
        values = Operands(node, self.analysis.axes, self.symbols)[summand.name]
        with self.emit.like(node), self.graph.inserting_before(node):
            kept = self.layouts.align(self.active, summand.axes, (Token.B, Token.S), Layout.DENSE)
            masked = self.emit.call(aten.where.ScalarOther, kept, values, summand.filler)
        node.replace_input_with(values, masked)
        if operator_name(node) == "aten.mean":
            self._correct_mean(node)

    def _correct_mean(self, mean: fx.Node) -> None:
        """A mean over all positions, zero at elided ones, as one over the active ones."""
        with self.emit.like(mean), self.graph.inserting_before(mean.next):
            every = self.emit.call(aten.sum.default, self.emit.call(aten.ones_like.default, self.active))
            # Not by their ratio, which as one of whole numbers would be rounded to float32.
            total = self.emit.call(aten.mul.Tensor, mean, every)
            corrected = self.emit.call(aten.div.Tensor, total, self._count())
        mean.replace_all_uses_with(corrected, delete_user_cb=lambda user: user is not total)

    def count_active(self, layouts: Mapping[fx.Node, Layout]) -> None:
        """Divide sums that were divided by the number of positions by that of active ones."""
        for node in self.sums.plain:
            times = positions_in_divisor(node, self.symbols)
            if times is not None and node in layouts:
                with self.emit.like(node), self.graph.inserting_before(node):
                    count = self.emit.call(aten.mul.Scalar, self._count(), float(times))
                node.args = (node.args[0], count)

    def _count(self) -> fx.Node:
        """How many positions are active."""
        return self.emit.call(aten.sum.default, self.active)

    def _logits_rows(self, op: Operands) -> fx.Node:
        """bool [rows of the logits]: which are active."""
        active, rows = self.active, op.axes("self").dims[0]
        if Token.B in rows and rows[0] is not Token.B:
            raise Refused("loss", "orders the rows of the logits in an unknown way", op.node)
        for factor in rows:
            if isinstance(factor, Cut):
                end = -factor.tail if factor.tail else 2**63 - 1
                active = self.emit.call(aten.slice.Tensor, active, 1, factor.head, end)
        return self.emit.call(aten.reshape.default, active, [-1])


@dataclass(frozen=True)
class _Summand:
    """The operand of a sum over tokens, and what stands in it for a token that is left out."""

    name: str
    axes: Axes
    filler: float


_SUMMANDS = {
    "aten.sum": ("self", 0.0),
    "aten.mean": ("self", 0.0),
    "aten.scatter_add": ("src", 0.0),
    "aten.histc": ("self", -1.0),  # less than any id, and not counted
}


def _first_operator(gm: fx.GraphModule) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr"))


def _reduced(op: Operands, axes: Axes) -> list[int]:
    dims = op._arguments.get("dim")
    listed = range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    return [dim % len(axes) for dim in listed]
