"""Carry `torch.autograd.Function` through normalisation with its own backward.

Dynamo captures one as `autograd_function_apply(forward_body, backward_body, *operands)`. Normalisation would
inline the forward body and lose the backward: the same loss, other gradients.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regate_fx.passes.base import Refused
from regate_fx.passes.token_symbols import size_expr

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

    Raises `Refused` where an operand is neither tensor nor size, or an output has a size or dtype of its own.
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
        values = [operand.meta["example_value"] for operand in operands]
        read = _read_outputs(node, len(outputs))
        described = [_described(node, values, output, index in read) for index, output in enumerate(outputs)]
        like = [index for index, _ in described]
        shapes = [number for _, shape in described for number in shape]
        with gm.graph.inserting_before(node):
            opaque = gm.graph.call_function(
                torch.ops.regate_fx.opaque.default,
                (operands, sizes, like, shapes, len(shielded)),
            )
            opaque.meta = dict(node.meta, example_value=list(outputs))
            stand_in = opaque
            if single:
                stand_in = gm.graph.call_function(operator.getitem, (opaque, 0))
                stand_in.meta = dict(node.meta)
        node.replace_all_uses_with(stand_in)
        gm.graph.erase_node(node)
        shielded.append(Shielded(forward, backward, dict(node.kwargs), tensors, single))
    return shielded


def _is_tensor_operand(node: fx.Node, operand: Any) -> bool:
    value = operand.meta.get("example_value") if isinstance(operand, fx.Node) else operand
    if not isinstance(value, (torch.Tensor, torch.SymInt, int)):
        raise Refused("function-operand", f"an autograd.Function takes a {type(value).__name__}", node)
    return isinstance(value, torch.Tensor)


def _read_outputs(node: fx.Node, count: int) -> set[int]:
    users = list(node.users)
    if all(user.target is operator.getitem and isinstance(user.args[1], int) for user in users):
        return {user.args[1] for user in users if isinstance(user.args[1], int)}
    return set(range(count))


def _described(
    node: fx.Node, operands: Sequence[torch.Tensor], output: Any, is_read: bool
) -> tuple[int, list[int]]:
    """An operand of the output's dtype, and the output's shape, as `regate_fx::opaque` takes them.

    Dynamo of torch 2.11 also hands out what the forward body computes on its way. Nobody reads it: any dtype will do.
    """
    alike = [
        index
        for index, value in enumerate(operands)
        if isinstance(output, torch.Tensor) and (value.dtype, value.device) == (output.dtype, output.device)
    ]
    if not alike and operands and not is_read:
        if not isinstance(output, torch.Tensor):
            return 0, [-1]
        alike = [0]
    if not alike:
        raise Refused(
            "function-shape", "an output of an autograd.Function has the dtype of none of its inputs", node
        )
    # Sizes are compared as expressions: to ask whether symbols are equal would guard on their values.
    wanted = list(map(size_expr, output.shape))
    for index in alike:
        if list(map(size_expr, operands[index].shape)) == wanted:
            return index, [-1]
    sizes = {
        size_expr(size): (index, dim)
        for index, value in enumerate(operands)
        for dim, size in enumerate(value.shape)
    }
    shape = [len(wanted)]
    for size in wanted:
        if not size.is_Integer and size not in sizes:
            raise Refused(
                "function-shape",
                f"an output of an autograd.Function has a size, {size}, that none of its inputs has",
                node,
            )
        shape.extend((-1, int(size)) if size.is_Integer else sizes[size])
    return alike[0], shape


def unshield(gm: fx.GraphModule, shielded: list[Shielded]) -> int:
    """Put the shielded nodes back into the normalised graph; returns how many."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.regate_fx.opaque.default):
        operands, sizes, _, _, key = node.args
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
