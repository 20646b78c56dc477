"""What one operator asks of the operands of an attention that is written by hand.

Shapes: B samples, H heads, S positions, d width of a query and key, dv width of a value. What has B and H may have them
as one dimension B * H.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from regate_fx.passes.axes import Axes, Token, has_token
from regate_fx.passes.base import fake, is_tensor, operator_name
from regate_fx.passes.rewrite_attention import autocast_dtype
from regate_fx.passes.token_axes import TokenAxes

CASTS = {"aten._to_copy", "aten.type_as"}
EXPANDS = {"aten.expand", "aten.expand_as"}
PRODUCTS = {"aten.matmul", "aten.bmm"}


class Unlike(Exception):
    """This is no attention that is followed."""


def must(holds: bool) -> None:
    if not holds:
        raise Unlike


def check_operands(
    query: Any, key: Any, value: Any, product: fx.Node, result: fx.Node, analysis: TokenAxes
) -> None:
    """Queries [B, H, S, d], keys [B, H, d, S] and values [B, H, S, dv] of one dtype, or `Unlike`.

    product: of queries and keys; result: of weights and values.
    """
    operands = (query, key, value)
    must(all(map(is_tensor, operands)))
    axes = [analysis.of(node) for node in operands]
    heads = [heads_of(analysis.of(node), node) for node in (*operands, result)]
    columns = [found.dims[-2:] for found in axes]
    sequences, widths = zip(columns[0], columns[1][::-1], columns[2], strict=True)
    must(all(dim == (Token.S,) for dim in sequences) and not any(map(has_token, widths)))
    sizes = [fake(query).shape[-1], fake(key).shape[-2], fake(value).shape[-1]]
    must(all(isinstance(size, int) for size in sizes) and None not in heads)
    # A single head is every query's, as an operator with groups of heads has it.
    must(heads[3] == heads[0] and heads[1] == heads[2] and heads[1] in (1, heads[0]))
    must(len({found.has_batch for found in axes}) == 1)
    must(fake(query).dtype == fake(key).dtype == fake(value).dtype)
    device = fake(query).device.type
    must(autocast_dtype(product, device) == autocast_dtype(result, device))


def sinks_of(sink: fx.Node, result: fx.Node, analysis: TokenAxes) -> fx.Node:
    """The sinks [1, 1 or H, 1, 1] that are expanded to every query, or `Unlike`."""
    while operator_name(sink) in EXPANDS or (operator_name(sink) in CASTS and rounds_nothing(sink)):
        sink = sink.args[0]
    axes, sizes = analysis.of(sink), fake(sink).shape
    must(not (axes.has_tokens or axes.aggregate or axes.meaning))
    must(len(fake(result).shape) == len(sizes) == 4 and sizes[0] == sizes[2] == sizes[3] == 1)
    must(fake(sink).is_floating_point())
    return sink


def heads_of(axes: Axes, node: fx.Node) -> int | None:
    """H of a value [B, H, ...] or [B * H, ...]."""
    if len(axes) == 4:
        heads = fake(node).shape[1]
        plain = axes.dims[0] in ((Token.B,), ()) and not has_token(axes.dims[1]) and isinstance(heads, int)
        return heads if plain else None
    if len(axes) != 3:
        return None
    numbers = axes.dims[0][1:] if axes.dims[0][:1] == (Token.B,) else axes.dims[0]
    return math.prod(numbers) if all(isinstance(number, int) for number in numbers) else None  # type: ignore[arg-type]


def rounds_nothing(node: fx.Node) -> bool:
    """Whether the dtype that an operator computes in holds all that its operand's does."""
    before, after = fake(node.args[0]).dtype, fake(node).dtype
    return torch.promote_types(before, after) == after


def is_last(dim: Any, of: fx.Node) -> bool:
    """Whether this is the number of a value's last dimension."""
    rank = len(fake(of).shape)
    return isinstance(dim, int) and dim % rank == rank - 1
