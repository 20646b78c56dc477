"""The rewrite: compute the gated part of the graph on the N active rows.

A region is re-instantiated rather than rewritten operator by operator: the same operators at B := 1, S := N.
Values that enter it are gathered, attention becomes variable-length attention or runs in the compact layout, and
what leaves it is scattered back.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regate_fx.passes.axes import NO_AXES, NUMBERING, REORDERED, Axes, Cut, Meaning, Token
from regate_fx.passes.base import (
    SCALARS_OF_TENSORS,
    PassContext,
    PassResult,
    Refused,
    fake,
    fake_mode_of,
    is_tensor,
    is_tensors,
    operator_name,
    reads_number,
)
from regate_fx.passes.bucket import refuse_counted_rows
from regate_fx.passes.emit import Emitter, in_any_order
from regate_fx.passes.layers import DecoderStack
from regate_fx.passes.layouts import Layout, Layouts
from regate_fx.passes.placement import Placement
from regate_fx.passes.plan_nodes import ANCHOR, PlanNodes
from regate_fx.passes.rewrite_attention import emit_compact, emit_kernel
from regate_fx.passes.rewrite_loss import LossRewrite, emit_loss
from regate_fx.passes.rewrite_written import emit_written
from regate_fx.passes.rules import Kind, Operands
from regate_fx.passes.rules_shape import is_whole_slice
from regate_fx.passes.scalars import (
    SCALARS,
    is_count,
    is_token_number,
    positions_in_divisor,
    scalar_expr,
    size_arguments,
)
from regate_fx.passes.token_axes import TokenAxes
from regate_fx.passes.token_sums import TokenSums
from regate_fx.passes.token_symbols import TokenSymbols, size_expr

aten = torch.ops.aten


@dataclass(frozen=True)
class ElideTokens:
    """Write the graph anew with the gated layers on active rows only; `rewrites` counts the gated attentions.

    bucketed: the plan has rows that are no position's. Refuses graphs that sum over rows elsewhere than in the loss.
    """

    bucketed: bool = False
    name: str = "elide_tokens"
    after: tuple[str, ...] = ("place",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        graph = fx.Graph()
        if self.bucketed:
            refuse_counted_rows(ctx)
        rewriter = Rewriter(gm, graph, ctx, self.bucketed)
        rewriter.run()
        ctx.findings["loss"] = rewriter.loss.nll is not None
        # Not by the setter, which writes the code too: that is done once, when all passes have run.
        gm._graph = graph
        graph.owning_module = gm
        stack: DecoderStack = ctx.findings["layers"]
        gated = sum(len(layer.attentions) for layer in stack.layers if layer.refused is None)
        return PassResult(gm, gated)


@dataclass
class _Values:
    """The nodes that hold one captured value, by layout."""

    layouts: dict[Layout, fx.Node] = field(default_factory=dict)


class Rewriter:
    """Walks the captured graph in order and writes each node in the layout that `Placement` gave it."""

    def __init__(self, gm: fx.GraphModule, graph: fx.Graph, ctx: PassContext, bucketed: bool) -> None:
        self.gm = gm
        self.bucketed = bucketed
        self.emit = Emitter(graph, fake_mode_of(gm))
        self.analysis: TokenAxes = ctx.findings["token_axes"]
        self.symbols: TokenSymbols = ctx.findings["symbols"]
        self.placement: Placement = ctx.findings["placement"]
        self.masks: dict[fx.Node, Any] = ctx.findings["masks"]
        self.plan: PlanNodes = ctx.findings["plan"]
        self.sums: TokenSums = ctx.findings["token_sums"]
        self.layouts: Layouts
        self.loss = LossRewrite()
        self.segments = ctx.findings["layers"].segment
        self._values: dict[fx.Node, _Values] = {}
        self._symints: dict[tuple[fx.Node, Layout], Any] = {}

    def run(self) -> None:
        for node in self.gm.graph.nodes:
            if node.op == "output":
                self._emit_output(node)
                continue
            with self.emit.like(node):
                if node.op != "placeholder":
                    self._open_plan()  # not at the anchor: it may come after the embedding
                self._emit_node(node)

    # -- looking values up in the layout a consumer needs -------------------------------------------------

    def value(self, node: fx.Node, layout: Layout, consumer: Axes = NO_AXES) -> fx.Node:
        """The node that holds a captured value in one layout, moved there if need be.

        `consumer`: axes of the value it is combined with, for operands that lack a token axis.
        """
        held = self._values[node].layouts
        axes = self.analysis.axes.get(node, NO_AXES) if fake(node) is not None else NO_AXES
        if not isinstance(axes, Axes) or not axes.has_tokens:
            if isinstance(axes, Axes) and axes.meaning is Meaning.OFFSETS:
                self._check_counted(node, layout)
            return held.get(layout) or next(iter(held.values()))
        if layout in held:
            return held[layout]
        moved = self._move(node, axes, layout, consumer)
        if not self._depends_on_consumer(axes, layout):
            held[layout] = moved
        return moved

    def _depends_on_consumer(self, axes: Axes, layout: Layout) -> bool:
        lacks_batch = not axes.has_batch and self.symbols.batch != 1
        return axes.sequences == 0 or (layout is Layout.COMPACT and lacks_batch)

    def _move(self, node: fx.Node, axes: Axes, layout: Layout, consumer: Axes) -> fx.Node:
        held = self._values[node].layouts
        kind = self.analysis.kinds.get(node)
        if kind is Kind.CONSTANT and layout is not Layout.DENSE:
            with self.emit.like(node):
                return self._reinstantiate(node, layout)
        is_numbered = axes.meaning in NUMBERING or any(isinstance(f, REORDERED) for f in axes.factors)
        if layout is not Layout.DENSE and is_numbered:
            return self._made_of(node, layout)
        if layout is Layout.PACKED and any(isinstance(factor, Cut) for factor in axes.factors):
            with self.emit.like(node):
                return self._reinstantiate(node, layout)  # from the rows it was cut from
        if layout is Layout.PACKED:
            if Layout.COMPACT in held:
                return self.layouts.pack(held[Layout.COMPACT], axes)
            return self.layouts.gather(held[Layout.DENSE], axes, consumer)
        if layout is Layout.COMPACT:
            if Layout.PACKED in held:
                return self.layouts.spread(held[Layout.PACKED], axes)
            return self.layouts.gather_pairs(held[Layout.DENSE], axes, consumer)
        base = self.placement.scatter_base.get(node)
        if base is None:
            raise Refused(
                "layout", f"{node.name} is computed on active rows but needed at every position", node
            )
        shown = self.layouts.rearrange(self.value(base, Layout.DENSE), self.analysis.of(base), axes)
        return self.layouts.scatter(self.value(node, Layout.PACKED), axes, shown)

    def _check_counted(self, counts: fx.Node, layout: Layout) -> None:
        """Rows counted in one layout are no others' number."""
        if (layout is Layout.DENSE) is not (Layout.DENSE in self._values[counts].layouts):
            raise Refused("layout", "rows are counted at other positions than they are grouped at", counts)

    def _made_of(self, node: fx.Node, layout: Layout) -> fx.Node:
        """Rows picked or sorted at every position, in a layout of fewer: picked or sorted anew among those."""
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Refused("layout", f"{operator_name(node)} among picked rows would draw anew", node)
        if operator_name(node) == "getitem":
            held = self._values[node.args[0]].layouts
            if layout not in held:
                held[layout] = self._made_of(node.args[0], layout)
        with self.emit.like(node):
            return self._reinstantiate(node, layout)

    def symint(self, node: fx.Node, layout: Layout) -> Any:
        """A captured size, with B and S replaced by what they are in a layout."""
        if (node, layout) not in self._symints:
            self._symints[node, layout] = self._resize(node, layout)
        return self._symints[node, layout]

    def _resize(self, node: fx.Node, layout: Layout) -> Any:
        held = self._values.get(node, _Values()).layouts.get(Layout.DENSE)
        value = fake(node)
        if not isinstance(value, SCALARS) or (held is not None and layout is Layout.DENSE):
            return held
        if reads_number(node):
            return self._number(node, layout)
        expr = scalar_expr(value)
        if expr.is_Integer and isinstance(value, (int, torch.SymInt)):
            return int(expr)
        if self.symbols.mentions(expr) and not (
            held is None and layout is Layout.DENSE and not self._is_open
        ):
            sizes = self.layouts.sizes[layout]
            if expr == self.symbols.batch:
                return sizes.batch
            if expr == self.symbols.length:
                return sizes.length
        elif held is not None:
            return held
        if node.op == "call_function" and not any(is_tensor(source) for source in node.all_input_nodes):
            return self._computed(node, fx.map_arg(node.args, lambda arg: self.symint(arg, layout)))
        if node.target is aten.sym_size.int:
            return self._size_of(node, layout)
        if node.target is aten.sym_numel.default:
            return self.emit.call(node.target, self.value(node.args[0], layout))
        raise Refused("size", f"a size {expr} cannot be made anew for the active rows", node)

    def _computed(self, node: fx.Node, operands: tuple[Any, ...]) -> Any:
        found: list[fx.Node] = []
        fx.map_arg(operands, found.append)
        return self.emit.call(node.target, *operands) if found else node.target(*operands)

    def _number(self, node: fx.Node, layout: Layout) -> fx.Node:
        """Read again, even if the capture learned its value from an assert: that assert is to be checked."""
        if node.target in SCALARS_OF_TENSORS:
            if self.analysis.of(node.args[0]).aggregate:
                self._check_counted(node.args[0], layout)
            return self.emit.call(node.target, self.value(node.args[0], Layout.DENSE))
        return self.emit.call(
            node.target, *fx.map_arg(node.args, lambda argument: self.symint(argument, layout))
        )

    def _size_of(self, node: fx.Node, layout: Layout) -> Any:
        source, dim = node.args
        assert isinstance(source, fx.Node) and isinstance(dim, int)
        if self.symbols.mentions(size_expr(fake(node))):
            return self.emit.size(self.value(source, layout), dim)
        return self.emit.size(next(iter(self._values[source].layouts.values())), dim)

    @property
    def _is_open(self) -> bool:
        return hasattr(self, "layouts")

    # -- writing nodes -----------------------------------------------------------------------------------

    def _emit_node(self, node: fx.Node) -> None:
        values = self._values.setdefault(node, _Values())
        layout = self._layout(node)
        kind = self.analysis.kinds.get(node)
        if node.op in ("placeholder", "get_attr"):
            values.layouts[Layout.DENSE] = self._copy_input(node)
        elif node.target is ANCHOR:
            pass
        elif not is_tensors(fake(node)) and node.op == "call_function" and fake(node) is not None:
            pass  # sizes are made where they are used
        elif node in self.plan.token_loss or node in self.plan.counted:
            pass
        elif kind is Kind.LOSS and layout is Layout.PACKED:
            values.layouts[Layout.DENSE] = emit_loss(self, node)
        elif (written := self.placement.written.get(node)) is not None:
            if node is written.result:
                values.layouts[Layout.PACKED] = emit_written(self, written)
        elif kind is Kind.ATTENTION and layout is Layout.PACKED:
            values.layouts[Layout.PACKED] = emit_kernel(self, node)
        elif layout is Layout.COMPACT:
            values.layouts[Layout.COMPACT] = emit_compact(self, node)
        else:
            values.layouts[layout] = self._reinstantiate(node, layout)
        if node in self.segments and layout in values.layouts:
            values.layouts[layout].meta["segment"] = self.segments[node]

    def _layout(self, node: fx.Node) -> Layout:
        """An assertion of numbers is about those of the layout that they are read in."""
        if node.target is aten._assert_scalar.default and self._reads_packed(node):
            return Layout.PACKED
        return self.placement.layout(node)

    def _reads_packed(self, node: fx.Node) -> bool:
        return any(
            self.placement.layout(source) is Layout.PACKED
            if is_tensors(fake(source))
            else self._reads_packed(source)
            for source in node.all_input_nodes
        )

    def _copy_input(self, node: fx.Node) -> fx.Node:
        copy = self.emit.graph.node_copy(node)
        copy.meta = dict(node.meta)
        if node.op == "get_attr":
            copy.meta.setdefault("val", getattr(self.gm, str(node.target)))
        return copy

    def _open_plan(self) -> None:
        """Once the plan's tensors are in the new graph, layouts can be made from them."""
        if self._is_open:
            return

        def new(node: fx.Node) -> fx.Node:
            return self._values[node].layouts[Layout.DENSE]

        plan = self.plan
        rows, row_of, cu_seqlens = new(plan.rows), new(plan.row_of), new(plan.cu_seqlens)
        slots = (new(plan.slot_rows), new(plan.row_slots))
        moved = PlanNodes(rows, row_of, cu_seqlens, *slots, None, None, (), ())
        self.layouts = Layouts(self.emit, moved, self.bucketed)

    def _reinstantiate(self, node: fx.Node, layout: Layout) -> fx.Node:
        """The node's own operator in another layout: operands moved, sizes replaced."""
        args, kwargs = self.arguments(node, layout)
        return self.emit.call(in_any_order(node.target), *args, **kwargs)

    def arguments(self, node: fx.Node, layout: Layout) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A node's arguments in a layout. A size in a place that is no shape keeps its captured value."""
        if operator_name(node) == "aten.slice" and layout is not Layout.DENSE and self._is_identity(node):
            return (self.value(node.args[0], layout), 0, 0, 2**63 - 1), {}
        axes = self.analysis.axes.get(node, NO_AXES)
        consumer = axes if isinstance(axes, Axes) else NO_AXES
        sizes = size_arguments(node)
        inverts = consumer.meaning is Meaning.INVERSE and layout is not Layout.DENSE

        def replace(argument: fx.Node, is_size: bool) -> Any:
            if inverts and self.analysis.of(argument).meaning is Meaning.ARANGE:
                return self._reinstantiate(argument, layout)  # row numbers, not values
            if is_tensors(fake(argument)):
                return self.value(argument, layout, consumer)
            if not is_size:
                self._check_value(node, argument, layout)
            return self.symint(argument, layout)

        args = tuple(
            fx.map_arg(argument, functools.partial(replace, is_size=sizes is None or index in sizes))
            for index, argument in enumerate(node.args)
        )
        return args, fx.map_arg(node.kwargs, functools.partial(replace, is_size=False))

    def _check_value(self, node: fx.Node, number: fx.Node, layout: Layout) -> None:
        """A number that a node computes with must be the same in this layout as in the captured graph."""
        is_active = layout is not Layout.DENSE
        if is_active and node in self.sums.plain and positions_in_divisor(node, self.symbols) is not None:
            return
        if is_count(fake(number), self.symbols) and (is_active or self._reads_packed(number)):
            counted = "how many tokens were picked"
        elif is_active and is_token_number(fake(number), self.symbols):
            counted = "the batch or sequence size"
        else:
            return
        raise Refused("size-as-value", f"{operator_name(node)} computes with {counted}", node)

    def _is_identity(self, node: fx.Node) -> bool:
        """Whether a slice of a token axis keeps all rows of this layout; positions cut off count no label."""
        operands = Operands(node, self.analysis.axes, self.symbols)
        axes = operands.axes("self")
        dim = operands["dim"] % len(axes)
        return is_whole_slice(operands) or Token.S in axes.dims[dim]

    def _emit_output(self, node: fx.Node) -> None:
        if self._is_open:
            self.loss.emit_slots(self)

        def replace(value: fx.Node) -> fx.Node:
            if value in self.plan.token_loss:
                return self.loss.token_loss or self._values[self.plan.rows].layouts[Layout.DENSE]
            if value in self.plan.counted:
                return self.loss.counted or self._values[self.plan.rows].layouts[Layout.DENSE]
            return self.value(value, Layout.DENSE)

        self.emit.graph.output(fx.map_arg(node.args[0], replace))
