"""Write attention for the active rows: one variable-length operator, or the captured one over compact slots."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from regate_fx.passes.axes import Axes, Token, has_token
from regate_fx.passes.base import Refused, fake, operator_name
from regate_fx.passes.contractions import operands_of, with_operand, zeroed
from regate_fx.passes.emit import in_any_order
from regate_fx.passes.layouts import Layout
from regate_fx.passes.masks import MaskProof
from regate_fx.passes.rules import Operands
from regate_fx.passes.rules_math import MASKABLE
from regate_fx.passes.shared_heads import before_repeat

if TYPE_CHECKING:
    from regate_fx.passes.elide import Rewriter

aten = torch.ops.aten


def emit_kernel(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """`regate_fx::varlen_attention` in place of `scaled_dot_product_attention`; [1, H, N, d] in and out."""
    op = Operands(node, rewriter.analysis.axes, rewriter.symbols)
    emit = rewriter.emit
    query, key, value = (
        as_autocast(rewriter, node, rewriter.value(operand, Layout.PACKED))
        for operand in (op["query"], *before_repeat(op["key"], op["value"]))
    )
    proof = rewriter.masks[node]
    mask = dense_mask(rewriter, rewriter.value(op["attn_mask"], Layout.DENSE)) if proof.explicit else None
    scale = op["scale"] if op["scale"] is not None else 1.0 / math.sqrt(fake(query).shape[-1])
    dropout = float(op["dropout_p"])
    seed = None
    if dropout > 0.0:
        seed = emit.call(aten.randint.low, -(2**62), 2**62, [1], dtype=torch.int64, device=fake(query).device)
    return varlen(rewriter, (query, key, value), proof, mask, scale, dropout, seed)


def varlen(
    rewriter: Rewriter,
    qkv: tuple[fx.Node, fx.Node, fx.Node],
    proof: MaskProof,
    mask: fx.Node | None,
    scale: float,
    dropout: float = 0.0,
    seed: fx.Node | None = None,
    softcap: float = 0.0,
    sinks: fx.Node | None = None,
) -> fx.Node:
    """Attention among packed rows of queries, keys and values, each [1, H, N, d]. sinks: [H]."""
    indices = rewriter.layouts.indices
    query, key, value = qkv
    if scale <= 0.0:
        # The kernels scale scores that are hidden already, by minus infinity.
        query, scale = rewriter.emit.call(aten.mul.Scalar, query, scale), 1.0
    both = rewriter.emit.call(
        torch.ops.regate_fx.varlen_attention.default,
        query, key, value, indices.cu_seqlens, indices.slots, indices.positions,
        mask, proof.causal, proof.window, scale, dropout, seed, rewriter.placement.prefer,
        softcap, sinks,
    )  # fmt: skip
    return rewriter.emit.call(operator.getitem, both, 0)


def autocast_dtype(node: fx.Node, device: str) -> torch.dtype | None:
    """The dtype autocast computes a node's attention in; None where autocast is off."""
    for kind, dtype, enabled, _ in reversed(node.meta.get("autocast", ())):
        if kind == device:
            return (dtype or torch.get_autocast_dtype(device)) if enabled else None
    ambient = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if ambient else None


def as_autocast(rewriter: Rewriter, node: fx.Node, value: fx.Node) -> fx.Node:
    """Attention is on autocast's list of lower-precision operators; the operator that replaces it is not."""
    tensor = fake(value)
    dtype = autocast_dtype(node, tensor.device.type)
    if dtype is None or tensor.dtype in (dtype, torch.float64):
        return value
    return rewriter.emit.call(aten._to_copy.default, value, dtype=dtype)


def dense_mask(rewriter: Rewriter, mask: fx.Node) -> fx.Node:
    """A mask over all pairs as [1 or B, 1 or H, S, S]."""
    rank = len(fake(mask).shape)
    emit, sizes = rewriter.emit, rewriter.layouts.sizes[Layout.DENSE]
    if rank < 4:
        shape = [1] * (4 - rank) + [emit.size(mask, dim) for dim in range(rank)]
        mask = emit.call(aten.reshape.default, mask, shape)
    return emit.call(aten.expand.default, mask, [-1, -1, sizes.length, sizes.length])


def emit_compact(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """A captured operator over compact slots, with empty slots kept out of every sum over keys."""
    op = Operands(node, rewriter.analysis.axes, rewriter.symbols)
    name = operator_name(node)
    if name == "aten.scaled_dot_product_attention":
        return _compact_attention(rewriter, op)
    args, kwargs = rewriter.arguments(node, Layout.COMPACT)
    filled = list(args)
    if name in MASKABLE:
        axes = op.axes("self")
        for dim in _key_dims(op, axes):
            filler = torch.finfo(fake(args[0]).dtype).min if MASKABLE[name] == "lowest" else 0.0
            filled[0] = _fill(rewriter, filled[0], axes, dim, filler)
    else:
        filled = _without_empty_keys(rewriter, op, filled)
    return rewriter.emit.call(in_any_order(node.target), *filled, **kwargs)


def _key_dims(op: Operands, axes: Axes) -> list[int]:
    dims = op._arguments.get("dim")
    listed = range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    return [dim % len(axes) for dim in listed if axes.dims[dim] == (Token.S,)]


def _fill(rewriter: Rewriter, value: fx.Node, axes: Axes, dim: int, filler: float) -> fx.Node:
    valid = rewriter.layouts.valid_at(axes, dim)
    return rewriter.emit.call(aten.where.ScalarOther, valid, value, filler)


def _without_empty_keys(rewriter: Rewriter, op: Operands, args: list[Any]) -> list[Any]:
    """A product's arguments, with zeros where it would sum over empty slots."""
    for factor in zeroed(op):
        operand = operands_of(op.node, args)[factor.place]
        zero = _fill(rewriter, operand, factor.axes, factor.dim, 0.0)
        args = with_operand(op.node, args, factor.place, zero)
    return args


def _compact_attention(rewriter: Rewriter, op: Operands) -> fx.Node:
    """The attention operator over slots. Causal order is kept by compaction; other masks are gathered."""
    query, key, value = (rewriter.value(op[name], Layout.COMPACT) for name in ("query", "key", "value"))
    axes = op.axes("query")
    pairs = Axes((*axes.dims[:-1], op.axes("key").dims[-2]))
    emit = rewriter.emit
    mask = None
    if not has_token(pairs.dims[-1]):  # every slot sees all keys of its sample
        if op["attn_mask"] is not None:
            mask = rewriter.value(op["attn_mask"], Layout.COMPACT, pairs)
    elif not op["is_causal"]:
        valid = rewriter.layouts.valid_at(pairs, len(pairs) - 1)
        mask = valid
        if op["attn_mask"] is not None:
            mask = rewriter.value(op["attn_mask"], Layout.COMPACT, pairs)
            if fake(mask).dtype is torch.bool:
                mask = emit.call(aten.logical_and.default, mask, valid)
            else:
                mask = emit.call(aten.where.ScalarOther, valid, mask, torch.finfo(fake(mask).dtype).min)
    elif op["attn_mask"] is not None:
        raise Refused("attention", "is causal and has a mask too", op.node)
    return emit.call(
        op.node.target, query, key, value, mask, op["dropout_p"], op["is_causal"],
        scale=op["scale"], enable_gqa=op["enable_gqa"],
    )  # fmt: skip
