"""Rules for attention operators, the loss and `autograd.Function`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from regate_fx.passes.axes import Axes, Dim, Token, has_token, merge
from regate_fx.passes.base import Refused, fake
from regate_fx.passes.rules import Kind, Operands, Verdict, rule


@rule("aten.scaled_dot_product_attention")
def _attention(op: Operands) -> Verdict:
    query, key, value = op.axes("query"), op.axes("key"), op.axes("value")
    mask = op.axes("attn_mask")
    if {axes.dims[-2] for axes in (query, key, value)} != {(Token.S,)}:
        if any(has_token(axes.dims[dim]) for axes in (query, key, value) for dim in (-1, -2)):
            raise op.refuse("attention", "attends over something else than the decoder's own positions")
        batch = merge([Axes(axes.dims[:-2]) for axes in (query, key, value)], "attention")
        return Verdict(Axes((*batch, query.dims[-2], value.dims[-1])))
    heads = [axes.dims[:-2] for axes in (query, key, value)]
    if any(_batch(dims) != _batch(heads[0]) for dims in heads):
        raise op.refuse("attention", "pairs queries and keys of different samples")
    if mask.dims and (len(mask) < 2 or any(dim not in ((), (Token.S,)) for dim in mask.dims[-2:])):
        raise op.refuse("attention", "has a mask that is not over (query, key) positions")
    result = Axes((*query.dims[:-1], value.dims[-1]))
    plain = len(query) == 4 and query.dims[0] in ((Token.B,), ()) and not has_token(query.dims[1])
    return Verdict(result, Kind.ATTENTION if plain else Kind.PAIRS)


def _batch(dims: tuple[Dim, ...]) -> list[Any]:
    return [factor for dim in dims for factor in dim if isinstance(factor, Token)]


@rule("aten.cross_entropy_loss")
def _cross_entropy(op: Operands) -> Verdict:
    logits, target = op.axes("self"), op.axes("target")
    if not logits.has_tokens:
        return Verdict(op.symbols.axes_of_shape(op.shape))
    if len(logits) != 2 or len(target) != 1 or has_token(logits.dims[1]):
        raise op.refuse(
            "loss", "takes logits that are not [tokens, vocabulary] or labels that are not [tokens]"
        )
    if op.symbols.size(logits.dims[0]) != op.symbols.size(target.dims[0]):
        raise op.refuse("loss", "pairs logits and labels of different positions")
    if op["weight"] is not None or op["label_smoothing"] != 0.0:
        raise op.refuse("loss", "weights classes or smooths labels, which has no per-token loss to report")
    if op["reduction"] == 0:
        raise op.refuse(
            "loss", "returns losses per token, to be averaged by code that does not know which count"
        )
    return Verdict(Axes((), aggregate=True), Kind.LOSS)


@rule("autograd_function_apply")
def _function(op: Operands) -> Verdict:
    """An `autograd.Function` whose forward and backward treat every token row by itself."""
    module = op.node.graph.owning_module
    bodies = [getattr(module, str(body.target)) for body in op.node.args[:2]]
    operands = op.node.args[2:]
    known = [op.axes(operand) if _is_tensor(operand) else None for operand in operands]
    outputs, saved = _body_axes(op, bodies[0], known)
    gradients, _ = _body_axes(op, bodies[1], [*outputs, *saved], flat=True)
    for axes, gradient in zip(known, gradients, strict=True):
        if axes is not None and gradient is not None and gradient.dims != axes.dims:
            raise op.refuse("function", "has a backward whose gradients do not have the axes of its inputs")
    result = [axes for axes in outputs if axes is not None]
    single = isinstance(fake(op.node), torch.Tensor)
    return Verdict(result[0] if single else tuple(result))


def _is_tensor(operand: object) -> bool:
    return isinstance(operand, fx.Node) and isinstance(fake(operand), torch.Tensor)


def _body_axes(
    op: Operands, body: fx.GraphModule, known: list[Axes | None], flat: bool = False
) -> tuple[list[Axes | None], list[Axes | None]]:
    """Follow axes through a Dynamo-level body made of elementwise operators; sizes may only pass through."""
    placeholders = body.graph.find_nodes(op="placeholder")
    env: dict[fx.Node, Axes | None] = dict(zip(placeholders, known, strict=True))
    for node in body.graph.nodes:
        if node.op == "placeholder" or node.target is torch._C._set_grad_enabled:
            continue
        if node.op == "output":
            if flat:
                return [_lookup(env, value) for value in node.args[0]], []
            outputs, saved = node.args[0]
            outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
            return [_lookup(env, value) for value in outputs], [_lookup(env, value) for value in saved]
        operands = [env[source] for source in node.all_input_nodes]
        if not _is_elementwise(node) or any(axes is None for axes in operands):
            raise Refused(
                "function",
                f"an autograd.Function runs {node.name}, which is not elementwise on tensors",
                op.node,
            )
        env[node] = Axes(merge([axes for axes in operands if axes is not None], node.name))
    raise AssertionError("a graph without output")


def _lookup(env: dict[fx.Node, Axes | None], value: object) -> Axes | None:
    return env[value] if isinstance(value, fx.Node) else None


def _is_elementwise(node: fx.Node) -> bool:
    """Whether a torch-level call is elementwise, by the ATen operator of the same name."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    packet = getattr(torch.ops.aten, {"truediv": "div"}.get(name, name), None)
    if packet is None:
        return False
    # An operator of that name over tensors; `default` of some is an overload over plain numbers.
    overloads = [getattr(packet, name) for name in ("Tensor", "default") if name in packet.overloads()]
    return bool(overloads) and torch.Tag.pointwise in overloads[0].tags
