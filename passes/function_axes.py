"""Prove that an `autograd.Function` treats every token row by itself, forward and backward.

Its two bodies are recorded as functional ATen graphs, for the proof only, and analysed like the graph around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from regate_fx.passes.axes import NO_AXES, Axes
from regate_fx.passes.base import Refused, fake, is_tensor, is_tensors
from regate_fx.passes.functional_trace import functional_trace
from regate_fx.passes.rules import Kind, Operands, Result, Verdict

if TYPE_CHECKING:
    from regate_fx.passes.token_axes import TokenAxes

Analyse = Callable[[fx.GraphModule, Sequence[Axes]], "TokenAxes"]


def function_verdict(op: Operands, analyse: Analyse) -> Verdict:
    """The axes of what an `autograd.Function` returns. Raises `Refused` where a body does more than rows by themselves.

    A gradient of an operand without tokens, a weight say, may be a sum over rows.
    """
    module = op.node.graph.owning_module
    forward, backward = (getattr(module, str(body.target)) for body in op.node.args[:2])
    operands = op.node.args[2:]
    known = [op.axes(operand) if is_tensor(operand) else NO_AXES for operand in operands]
    values = [fake(operand) if isinstance(operand, fx.Node) else operand for operand in operands]
    outputs, saved = _follow(op, forward, values, known, analyse)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    handed = [*outputs, *saved]
    gradients = _follow(op, backward, [value for value, _ in handed], [axes for _, axes in handed], analyse)
    for operand, axes, (value, gradient) in zip(operands, known, gradients, strict=True):
        if is_tensor(operand) and isinstance(value, torch.Tensor) and gradient.dims != axes.dims:
            raise op.refuse("function", "has a backward whose gradients do not have the axes of its inputs")
    results = [axes for value, axes in outputs if isinstance(value, torch.Tensor)]
    return Verdict(results[0] if isinstance(fake(op.node), torch.Tensor) else tuple(results))


def _follow(
    op: Operands, body: fx.GraphModule, values: Sequence[Any], known: Sequence[Axes], analyse: Analyse
) -> Any:
    """The body's outputs, nested as it nests them: each value with its axes."""
    recorded, written = functional_trace(body, values)
    if written:
        raise op.refuse("function", "writes to its inputs")
    analysis = analyse(recorded, known)
    for node, refused in analysis.unproven.items():
        raise Refused(
            "function", f"an autograd.Function runs {node.name}: {refused.reason}", op.node
        ) from None
    for node in analysis.kinds:
        if not _is_by_row(node, analysis):
            reason = f"an autograd.Function runs {node.name}, which does not treat every token by itself"
            raise Refused("function", reason, op.node)
    (output,) = recorded.graph.find_nodes(op="output")

    def described(value: Any) -> tuple[Any, Axes]:
        if not isinstance(value, fx.Node):
            return value, NO_AXES
        return fake(value), analysis.of(value) if is_tensor(value) else NO_AXES

    def nested(value: Any) -> Any:
        return [nested(item) for item in value] if isinstance(value, (tuple, list)) else described(value)

    return nested(output.args[0])


def _is_by_row(node: fx.Node, analysis: TokenAxes) -> bool:
    """Whether a value is the same at a token when the body is given the active rows only."""
    if not _has_tokens(analysis.axes[node]):
        return True
    if analysis.kinds[node] is Kind.CONSTANT:
        return analysis.of(node).meaning is None
    sources = [analysis.axes[source] for source in node.all_input_nodes if is_tensors(fake(source))]
    return analysis.kinds[node] is Kind.ROWS and any(map(_has_tokens, sources))


def _has_tokens(result: Result) -> bool:
    return any(axes.has_tokens for axes in (result if isinstance(result, tuple) else (result,)))
