"""Token-axis analysis: prove, node by node, how a graph treats batch and sequence.

Every tensor gets its axes. A node whose operator cannot be proven keeps the reason instead; it may run densely,
but no gated layer may contain it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

# Imported for the rules they register.
from regate_fx.passes import (  # noqa: F401
    rules_attention,
    rules_dispatch,
    rules_index,
    rules_math,
    rules_quantised,
    rules_shape,
)
from regate_fx.passes.axes import NO_AXES, NUMBERING, Axes, Cut, Meaning
from regate_fx.passes.base import PassContext, PassResult, Refused, fake, is_tensors, operator_name
from regate_fx.passes.function_axes import function_verdict
from regate_fx.passes.functions import FUNCTION_APPLY
from regate_fx.passes.plan_nodes import ANCHOR
from regate_fx.passes.rules import RULES, Kind, Operands, Result, Verdict, parts_of
from regate_fx.passes.rules_math import elementwise
from regate_fx.passes.token_symbols import TokenSymbols, size_expr


@dataclass
class TokenAxes:
    """The analysis of one graph: axes and kind of every proven node, the refusal of every other.

    within: of which node of which graph this graph is a body; empty for the whole.
    """

    symbols: TokenSymbols
    within: str = ""
    axes: dict[fx.Node, Result] = field(default_factory=dict)
    kinds: dict[fx.Node, Kind] = field(default_factory=dict)
    unproven: dict[fx.Node, Refused] = field(default_factory=dict)

    def of(self, node: fx.Node) -> Axes:
        """Axes of a node with one tensor value; raises `Refused` where they are not known."""
        if node in self.unproven and node not in self.axes:
            raise self.unproven[node]
        axes = self.axes[node]
        if not isinstance(axes, Axes):
            raise Refused("axis", "a list of tensors is used as one value", node)
        return axes


@dataclass(frozen=True)
class AnalyseTokenAxes:
    """Find the axes of every value; leaves the graph alone and puts a `TokenAxes` into the findings."""

    name: str = "token_axes"
    after: tuple[str, ...] = ("find_plan",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        analysis = TokenAxes(ctx.findings["symbols"])
        for node in gm.graph.nodes:
            _analyse(node, analysis)
        ctx.findings["token_axes"] = analysis
        return PassResult(gm, 0, tuple(refused.refusal() for refused in analysis.unproven.values()))


def check_picked_sizes(analysis: TokenAxes) -> None:
    """Raise `Refused` for a size read from data that is not known to be a number of token rows.

    Inductor fails on some operators of other such sizes (a convolution over as many images as a mask leaves).
    """
    for node in analysis.axes:
        values = fake(node) if isinstance(fake(node), (tuple, list)) else [fake(node)]
        unbacked = set().union(*(free_unbacked_symbols(v) for v in values if isinstance(v, torch.Tensor)))
        if unbacked and node in analysis.unproven:
            raise Refused("number", analysis.unproven[node].reason, node)
        if not unbacked <= analysis.symbols.counts:
            raise Refused("number", "a size is read from data", node)


def _analyse(node: fx.Node, analysis: TokenAxes) -> None:
    value = fake(node)
    if node.op == "output" or not is_tensors(value):
        return
    try:
        verdict = _contain_aggregates(node, _verdict(node, analysis), analysis)
        _follow_numbers(node, verdict, analysis)
        _check_sizes(node, verdict, analysis.symbols)
    except Refused as refused:
        refused.node = refused.node or node
        analysis.unproven[node] = refused.kept()
        with contextlib.suppress(Refused):
            analysis.axes[node] = _axes_by_size(value, analysis.symbols)
        return
    analysis.axes[node] = verdict.axes
    analysis.kinds[node] = verdict.kind


def _axes_by_size(value: object, symbols: TokenSymbols) -> Result:
    if isinstance(value, torch.Tensor):
        return symbols.axes_of_shape(value.shape)
    assert isinstance(value, (tuple, list))
    return tuple(
        symbols.axes_of_shape(item.shape) if isinstance(item, torch.Tensor) else NO_AXES for item in value
    )


def _analyse_body(gm: fx.GraphModule, known: Sequence[Axes], name: str, around: TokenAxes) -> TokenAxes:
    """The analysis of a graph within the graph, whose placeholders have known axes."""
    analysis = TokenAxes(around.symbols, f"{around.within}{name}.")
    analysis.axes.update(zip(gm.graph.find_nodes(op="placeholder"), known, strict=True))
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            _analyse(node, analysis)
    return analysis


def _verdict(node: fx.Node, analysis: TokenAxes) -> Verdict:
    if node.op in ("placeholder", "get_attr") or node.target is ANCHOR:
        return Verdict(_axes_by_size(fake(node), analysis.symbols))
    for source in node.all_input_nodes:
        if source in analysis.unproven and source not in analysis.axes:
            raise Refused("axis", f"the axes of {source.name} are not known", node)
    operands = Operands(node, analysis.axes, analysis.symbols, analysis.within)
    name = operator_name(node)
    if node.target is FUNCTION_APPLY:
        return function_verdict(operands, functools.partial(_analyse_body, around=analysis))
    tokens = [source for source in operands.tensors() if analysis.of(source).has_tokens]
    if any(_has_cut(analysis.of(source)) for source in tokens):
        return _on_cut(operands, name)
    registered = RULES.get(f"{name}.{getattr(node.target, '_overloadname', '')}", RULES.get(name))
    if registered is not None:
        return registered(operands)
    if not tokens and name != "getitem":
        return _without_tokens(node, analysis)
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return elementwise(operands)
    raise operands.refuse("unknown-operator", "is not an operator whose treatment of tokens is known")


def _contain_aggregates(node: fx.Node, verdict: Verdict, analysis: TokenAxes) -> Verdict:
    """What sums over tokens must not reach single tokens again, whatever path it takes.

    The ends of the experts' rows may: a grouped product reads them to tell rows apart, not to mix them.
    """
    sums = [
        source
        for source in node.all_input_nodes
        if source not in verdict.unread and _is_aggregate(analysis.axes.get(source))
    ]
    if not sums:
        return verdict
    results = parts_of(verdict.axes)
    if any(axes.has_tokens for axes in results):
        if verdict.reads_offsets and all(
            _meaning(analysis.axes[source]) is Meaning.OFFSETS for source in sums
        ):
            return verdict
        raise Refused(
            "mixes-tokens", f"{operator_name(node)} spreads a sum over tokens to single tokens", node
        )
    marked = tuple(replace(axes, aggregate=True) for axes in results)
    return replace(verdict, axes=marked if isinstance(verdict.axes, tuple) else marked[0])


def _follow_numbers(node: fx.Node, verdict: Verdict, analysis: TokenAxes) -> None:
    """Numbers of rows must stay known as such, or pick rows: as values they would be others in another layout."""
    if verdict.reads_numbers or all(axes.meaning in NUMBERING for axes in parts_of(verdict.axes)):
        return
    if any(_meaning(analysis.axes.get(source)) in NUMBERING for source in node.all_input_nodes):
        raise Refused(
            "row-numbers",
            f"{operator_name(node)} computes with row numbers outside a known expert dispatch",
            node,
        )


def _is_aggregate(result: Result | None) -> bool:
    return result is not None and any(axes.aggregate for axes in parts_of(result))


def _meaning(result: Result | None) -> Meaning | None:
    return result.meaning if isinstance(result, Axes) else None


def _without_tokens(node: fx.Node, analysis: TokenAxes) -> Verdict:
    """No operand has token axes: the value is a parameter, a constant, or made of those."""
    return Verdict(_axes_by_size(fake(node), analysis.symbols))


# What may happen to logits that lost their first or last positions, on the way to the loss.
_CUT_KEEPS = {
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.clone", "aten.contiguous", "aten._to_copy",
    "aten.slice", "aten.cross_entropy_loss", "aten.flatten", "aten.detach", "aten.alias",
}  # fmt: skip


def _has_cut(axes: Axes) -> bool:
    return any(isinstance(factor, Cut) for factor in axes.factors)


def _on_cut(operands: Operands, name: str) -> Verdict:
    if name not in _CUT_KEEPS:
        raise operands.refuse("cuts-tokens", "computes with part of the sequence")
    return RULES[name](operands)


def _check_sizes(node: fx.Node, verdict: Verdict, symbols: TokenSymbols) -> None:
    """The axes must multiply to the sizes the capture recorded: a rule that is wrong must not pass."""
    values = fake(node) if isinstance(verdict.axes, tuple) else (fake(node),)
    for axes, value in zip(parts_of(verdict.axes), values, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        if not symbols.fit(axes.dims, value.shape):
            sizes = [symbols.size(dim) for dim in axes.dims]
            wanted = [size_expr(size) for size in value.shape]
            raise Refused(
                "axis", f"{operator_name(node)} was analysed as {sizes} but has shape {wanted}", node
            )
