"""Carry `torch.autograd.Function` through normalisation with its own backward.

Dynamo captures one as `autograd_function_apply(forward_body, backward_body, *operands)`. Normalisation would
inline the forward body and lose the backward: the same loss, other gradients.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regate_fx.passes.base import Refused

FUNCTION_APPLY = torch.ops.higher_order.autograd_function_apply


@dataclass(frozen=True)
class Shielded:
    """What is needed to put one `autograd_function_apply` node back: its two bodies and its keywords.

    `tensors[i]` tells whether operand i is a tensor; the others are sizes.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    kwargs: dict[str, Any]
    tensors: tuple[bool, ...]
    single: bool


def shield(gm: fx.GraphModule) -> list[Shielded]:
    """Replace each `autograd_function_apply` of a Dynamo graph by `regate_fx::opaque`; `key` indexes the result.

    Raises `Refused` where an operand is neither tensor nor size, or an output is not shaped like an operand.
    """
    shielded: list[Shielded] = []
    for node in gm.graph.find_nodes(op="call_function", target=FUNCTION_APPLY):
        forward, backward = (gm.get_submodule(str(body.target)) for body in node.args[:2])
        assert isinstance(forward, fx.GraphModule) and isinstance(backward, fx.GraphModule)
        tensors = tuple(_is_tensor_operand(node, operand) for operand in node.args[2:])
        operands = [arg for arg, tensor in zip(node.args[2:], tensors, strict=True) if tensor]
        sizes = [arg for arg, tensor in zip(node.args[2:], tensors, strict=True) if not tensor]
        example = node.meta["example_value"]
        single = isinstance(example, torch.Tensor)
        outputs = (example,) if single else tuple(example)
        like = [_operand_like(node, operands, output) for output in outputs]
        with gm.graph.inserting_before(node):
            opaque = gm.graph.call_function(
                torch.ops.regate_fx.opaque.default,
                (operands, sizes, like, len(shielded)),
            )
            opaque.meta = dict(node.meta, example_value=list(outputs))
            stand_in = opaque
            if single:
                stand_in = gm.graph.call_function(operator.getitem, (opaque, 0))
                stand_in.meta = dict(node.meta)
        node.replace_all_uses_with(stand_in)
        gm.graph.erase_node(node)
        shielded.append(Shielded(forward, backward, dict(node.kwargs), tensors, single))
    if shielded:
        gm.recompile()
    return shielded


def _is_tensor_operand(node: fx.Node, operand: Any) -> bool:
    value = operand.meta.get("example_value") if isinstance(operand, fx.Node) else operand
    if not isinstance(value, (torch.Tensor, torch.SymInt, int)):
        raise Refused("function-operand", f"an autograd.Function takes a {type(value).__name__}", node)
    return isinstance(value, torch.Tensor)


def _operand_like(node: fx.Node, operands: list[Any], output: Any) -> int:
    for index, operand in enumerate(operands):
        value = operand.meta["example_value"]
        if isinstance(output, torch.Tensor) and value.dtype == output.dtype and value.shape == output.shape:
            return index
    raise Refused(
        "function-shape",
        "an output of an autograd.Function has not the shape and dtype of one of its inputs",
        node,
    )


def unshield(gm: fx.GraphModule, shielded: list[Shielded]) -> int:
    """Put the shielded nodes back into the normalised graph; returns how many."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.regate_fx.opaque.default):
        operands, sizes, _, key = node.args
        record = shielded[key]
        tensors, integers = iter(operands), iter(sizes)
        arguments = [next(tensors) if tensor else next(integers) for tensor in record.tensors]
        bodies = []
        with gm.graph.inserting_before(node):
            for kind, body in (("forward", record.forward), ("backward", record.backward)):
                attribute = f"function_{kind}_{key}"
                setattr(gm, attribute, body)
                bodies.append(gm.graph.get_attr(attribute))
            apply = gm.graph.call_function(FUNCTION_APPLY, (*bodies, *arguments), record.kwargs)
        apply.meta = dict(node.meta)
        if record.single:
            apply.meta["val"] = node.meta["val"][0]
            for user in list(node.users):
                user.replace_all_uses_with(apply)
                gm.graph.erase_node(user)
        else:
            apply.meta["val"] = tuple(node.meta["val"])
            node.replace_all_uses_with(apply)
        gm.graph.erase_node(node)
    return len(shielded)
