"""Write one variable-length operator in place of an attention that a model writes by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from regate_fx.passes.base import fake
from regate_fx.passes.layouts import Layout
from regate_fx.passes.masks import MaskProof
from regate_fx.passes.rewrite_attention import as_autocast, dense_mask, varlen
from regate_fx.passes.shared_heads import before_repeat, own_keys
from regate_fx.passes.written_attention import WrittenAttention

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
    mask = _one_mask(rewriter, written) if proof.explicit else None
    result = varlen(rewriter, (query, key, value), proof, mask, written.scale, 0.0, None)
    merged = len(fake(written.result).shape) == 3
    return emit.call(aten.squeeze.dim, result, 0) if merged else result


def _by_head(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """Packed rows of [B, H, S, d] or [B * H, S, d], both as [1, H, N, d]."""
    packed = rewriter.value(node, Layout.PACKED)
    return rewriter.emit.call(aten.unsqueeze.default, packed, 0) if len(fake(packed).shape) == 3 else packed


def _one_mask(rewriter: Rewriter, written: WrittenAttention) -> fx.Node:
    """All that is added to the scores, [1 or B, 1 or H, S, S]."""
    emit = rewriter.emit
    total: fx.Node | None = None
    for added in written.added:
        mask = rewriter.value(added.mask, Layout.DENSE)
        if fake(mask).dtype != added.dtype:
            mask = emit.call(aten._to_copy.default, mask, dtype=added.dtype)
        total = mask if total is None else emit.call(aten.add.Tensor, total, mask)
    assert total is not None
    if written.sees != MaskProof():
        # The lowest number, as a model adds: what it is added to is lost in its rounding.
        lowest = torch.finfo(fake(total).dtype).min
        zero = emit.call(aten.zeros.default, [], dtype=fake(total).dtype, device=fake(total).device)
        hides = emit.call(aten.where.ScalarOther, _seen(rewriter, written.sees), zero, lowest)
        total = emit.call(aten.add.Tensor, total, hides)
    return dense_mask(rewriter, total)


def _seen(rewriter: Rewriter, sees: MaskProof) -> fx.Node:
    """bool [S, S]: the pairs that a proof is about."""
    emit, indices = rewriter.emit, rewriter.layouts.indices
    length = rewriter.layouts.sizes[Layout.DENSE].length
    keys = emit.call(aten.arange.default, length, device=fake(indices.positions).device)
    behind = emit.call(aten.sub.Tensor, emit.call(aten.unsqueeze.default, keys, 1), keys)
    seen = emit.call(aten.ge.Scalar, behind, 0)
    if sees.window:
        near = emit.call(aten.lt.Scalar, behind, sees.window)
        seen = emit.call(aten.logical_and.default, seen, near)
    return seen
