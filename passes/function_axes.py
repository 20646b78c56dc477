"""Prove that an `autograd.Function` treats every token row by itself, forward and backward.

Its two bodies are recorded as functional ATen graphs, for the proof only, and analysed like the graph around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from regate_fx.passes.axes import NO_AXES, Axes
from regate_fx.passes.base import Refused, fake, is_tensor, is_tensors, operator_name
from regate_fx.passes.functional_trace import functional_trace
from regate_fx.passes.rules import Kind, Operands, Verdict, parts_of
from regate_fx.passes.scalars import computes_with_sizes

if TYPE_CHECKING:
    from regate_fx.passes.token_axes import TokenAxes

Analyse = Callable[[fx.GraphModule, Sequence[Axes], str], "TokenAxes"]


# What is zero where an operand is: the first one, any of them, or all of them.
_IF_FIRST = {
    "aten.neg", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.view",
    "aten.reshape", "aten._unsafe_view", "aten.expand", "aten.unsqueeze", "aten.squeeze", "aten.transpose",
    "aten.permute", "aten.slice", "aten.sum", "aten.div",
}  # fmt: skip
_IF_ANY = {"aten.mul"}
_IF_ALL = {"aten.add", "aten.sub"}


def function_verdict(op: Operands, analyse: Analyse) -> Verdict:
    """The axes of what an `autograd.Function` returns. Raises `Refused` where a body does more than rows by themselves.

    A gradient of an operand without tokens, a weight say, may be a sum over rows of what is zero where their gradient
    is: that of tokens which are not computed.
    """
    module = op.node.graph.owning_module
    forward, backward = (getattr(module, str(body.target)) for body in op.node.args[:2])
    operands = op.node.args[2:]
    known = [op.axes(operand) if is_tensor(operand) else NO_AXES for operand in operands]
    values = [fake(operand) if isinstance(operand, fx.Node) else operand for operand in operands]
    outputs, saved = _follow(op, forward, values, known, analyse, gradients=0)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    handed = [*outputs, *saved]
    gradients = _follow(
        op, backward, [value for value, _ in handed], [axes for _, axes in handed], analyse, len(outputs)
    )
    for operand, axes, (value, gradient) in zip(operands, known, gradients, strict=True):
        if is_tensor(operand) and isinstance(value, torch.Tensor) and gradient.dims != axes.dims:
            raise op.refuse("function", "has a backward whose gradients do not have the axes of its inputs")
    found = fake(op.node)
    unread = tuple(_unread(forward, operands))
    if isinstance(found, torch.Tensor):
        result = next(axes for value, axes in outputs if isinstance(value, torch.Tensor))
        return Verdict(result, unread=unread)
    # What is no tensor has a stand-in that nobody reads.
    return Verdict(
        tuple(
            axes if isinstance(value, torch.Tensor) else op.symbols.axes_of_shape(stand_in.shape)
            for (value, axes), stand_in in zip(outputs, found, strict=True)
        ),
        unread=unread,
    )


def _unread(forward: fx.GraphModule, operands: Sequence[Any]) -> Iterator[fx.Node]:
    """Operands whose values no output has in it: a loss that is taken for its gradient alone."""
    for operand, inside in zip(operands, forward.graph.find_nodes(op="placeholder"), strict=True):
        if isinstance(operand, fx.Node) and not inside.users:
            yield operand


def _follow(
    op: Operands,
    body: fx.GraphModule,
    values: Sequence[Any],
    known: Sequence[Axes],
    analyse: Analyse,
    gradients: int,
) -> Any:
    """The body's outputs, nested as it nests them: each value with its axes. Its first inputs are `gradients`."""
    recorded, written = functional_trace(body, values)
    if written:
        raise op.refuse("function", "writes to its inputs")
    analysis = analyse(recorded, known, f"{op.node.name}.{'backward' if gradients else 'forward'}")
    vanishing = _vanishing(recorded, gradients)
    for node in recorded.graph.nodes:
        if node.op == "call_function" and (reason := _why_not(node, analysis, vanishing)) is not None:
            raise Refused("function", f"an autograd.Function runs {operator_name(node)}: {reason}", op.node)

    def nested(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [nested(item) for item in value]
        known = isinstance(value, fx.Node)
        return fake(value) if known else value, analysis.of(value) if is_tensor(value) else NO_AXES

    return nested(recorded.graph.output_node().args[0])


def _why_not(node: fx.Node, analysis: TokenAxes, vanishing: set[fx.Node]) -> str | None:
    """Why a node is not the same at a token when the body is given the active rows only."""
    if node in analysis.unproven:
        return analysis.unproven[node].reason
    if node not in analysis.axes:
        return None
    if computes_with_sizes(node, analysis.symbols):
        return "it computes with the batch or sequence size"
    parts, sources = parts_of(analysis.axes[node]), _sources(node, analysis)
    if any(axes.aggregate for axes in parts) and not any(axes.aggregate for axes in sources):
        sums = operator_name(node) == "aten.sum" and node in vanishing
        return None if sums else "it does not add up what is zero where the gradient is"
    if not any(axes.has_tokens for axes in parts):
        return None
    kind = analysis.kinds[node]
    if kind is Kind.CONSTANT and all(axes.meaning is None for axes in parts):
        return None
    by_row = kind is Kind.ROWS and any(axes.has_tokens for axes in sources)
    return None if by_row else "it does not treat every token by itself"


def _sources(node: fx.Node, analysis: TokenAxes) -> list[Axes]:
    tensors = [source for source in node.all_input_nodes if is_tensors(fake(source))]
    return [axes for source in tensors for axes in parts_of(analysis.axes[source])]


def _vanishing(gm: fx.GraphModule, gradients: int) -> set[fx.Node]:
    """What is zero at a token where all gradients are: the first inputs, and what is computed from them so."""
    vanishing = set(gm.graph.find_nodes(op="placeholder")[:gradients])
    for node in gm.graph.nodes:
        tensors = [source for source in node.all_input_nodes if is_tensor(source)]
        name = operator_name(node) if node.op == "call_function" else ""
        if (
            (name in _IF_FIRST and node.args[0] in vanishing)
            or (name in _IF_ANY and vanishing.intersection(tensors))
            or (name in _IF_ALL and len(tensors) > 1 and vanishing.issuperset(tensors))
        ):
            vanishing.add(node)
    return vanishing
