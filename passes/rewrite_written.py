"""Write one variable-length operator in place of an attention that a model writes by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from regate_fx.passes.base import fake
from regate_fx.passes.layouts import Layout
from regate_fx.passes.rewrite_attention import as_autocast, varlen
from regate_fx.passes.shared_heads import before_repeat, own_keys
from regate_fx.passes.written_attention import WrittenAttention
from regate_fx.passes.written_masks import one_mask

if TYPE_CHECKING:
    from regate_fx.passes.elide import Rewriter

aten = torch.ops.aten


def emit_written(rewriter: Rewriter, written: WrittenAttention) -> fx.Node:
    """`regate_fx::varlen_attention`; [1, H, N, dv] or [H, N, dv], as the last product has it."""
    emit = rewriter.emit
    if (own := own_keys(written.key)) is not None:
        key, value = (_by_head(rewriter, node) for node in before_repeat(own, written.value))
    else:
        key = emit.call(aten.transpose.int, _by_head(rewriter, written.key), 2, 3)
        value = _by_head(rewriter, written.value)
    operands = (_by_head(rewriter, written.query), key, value)
    query, key, value = (as_autocast(rewriter, written.result, operand) for operand in operands)
    proof = written.proof
    mask = one_mask(rewriter, written.masks) if proof.explicit else None
    sinks = _sinks(rewriter, written.sinks, fake(query).shape[1])
    result = varlen(
        rewriter, (query, key, value), proof, mask, written.scale, softcap=written.softcap, sinks=sinks
    )
    merged = len(fake(written.result).shape) == 3
    return emit.call(aten.squeeze.dim, result, 0) if merged else result


def _sinks(rewriter: Rewriter, node: fx.Node | None, heads: int) -> fx.Node | None:
    """Sinks [1, 1 or H, 1, 1] as [H]."""
    if node is None:
        return None
    flat = rewriter.emit.call(aten.reshape.default, rewriter.value(node, Layout.DENSE), [-1])
    return rewriter.emit.call(aten.expand.default, flat, [heads])


def _by_head(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """Packed rows of [B, H, S, d] or [B * H, S, d], both as [1, H, N, d]."""
    packed = rewriter.value(node, Layout.PACKED)
    return rewriter.emit.call(aten.unsqueeze.default, packed, 0) if len(fake(packed).shape) == 3 else packed
