"""Masks of attention that is written by hand, read at active pairs as one that is added to the scores.

Shapes: B samples, H heads, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import fx

from regate_fx.passes.axes import Token, has_token
from regate_fx.passes.base import fake
from regate_fx.passes.layouts import Layout
from regate_fx.passes.mask_forms import Form, Hides
from regate_fx.passes.masks import MaskProof, proof_of
from regate_fx.passes.rewrite_attention import dense_mask
from regate_fx.passes.token_axes import TokenAxes

if TYPE_CHECKING:
    from regate_fx.passes.elide import Rewriter

aten = torch.ops.aten


@dataclass(frozen=True)
class Mask:
    """What is done to scores of a dtype at pairs [B, H, S, S], or what broadcasts to it.

    values: what is added, or bools for which `fill` is filled in; where they are false if `is_shown`.
    seen: what is known of the pairs that it lets a query see.
    """

    values: fx.Node
    dtype: torch.dtype
    seen: Form
    fill: float | None = None
    is_shown: bool = False

    @property
    def band(self) -> tuple[MaskProof, float] | None:
        """What it is proven to show, and the number that it hides others by; at active pairs it is nothing else."""
        number = self.seen.number if isinstance(self.seen, Hides) else self.fill
        proof = proof_of([self.seen])
        return None if number is None or proof.explicit else (proof, number)


def why_not_one(masks: Sequence[Mask], analysis: TokenAxes, heads: int | None) -> fx.Node | None:
    """The values that keep masks from being read as one, not larger than the scores of active pairs can be."""
    of_heads = of_samples = False
    for mask in masks:
        # A number has no gradient where it is filled in. Where others hide all else it counts, but for minus infinity.
        if mask.fill not in (None, -math.inf):
            return mask.values
        if mask.band is not None:
            continue
        axes, sizes = analysis.of(mask.values), fake(mask.values).shape
        if axes.aggregate or len(axes) > 4 or axes.dims[:-3] not in ((), ((),), ((Token.B,),)):
            return mask.values
        pairs = zip(axes.dims[-2:], sizes[-2:], strict=True)
        if any(dim != (Token.S,) and (dim or size != 1) for dim, size in pairs):
            return mask.values
        for dim, size in zip(axes.dims[-3:-2], sizes[-3:-2], strict=True):
            if has_token(dim) or size not in (1, heads):
                return mask.values
            of_heads |= size != 1
        of_samples |= axes.has_batch
        if of_heads and of_samples:
            return mask.values
    return None


def one_mask(rewriter: Rewriter, masks: Sequence[Mask]) -> fx.Node:
    """All that masks do to the scores as what is added to them, [1 or B, 1 or H, S, S]."""
    parts = [_as_added(rewriter, mask) for mask in masks if mask.band is None or mask.band[0] != MaskProof()]
    total = reduce(lambda total, part: rewriter.emit.call(aten.add.Tensor, total, part), parts)
    return dense_mask(rewriter, total)


def _as_added(rewriter: Rewriter, mask: Mask) -> fx.Node:
    emit = rewriter.emit
    if mask.band is not None:
        proof, fill = mask.band
        values, is_shown = _shown(rewriter, proof), True
    elif mask.fill is not None:
        values, fill, is_shown = rewriter.value(mask.values, Layout.DENSE), mask.fill, mask.is_shown
    else:
        values = rewriter.value(mask.values, Layout.DENSE)
        same = fake(values).dtype == mask.dtype
        return values if same else emit.call(aten._to_copy.default, values, dtype=mask.dtype)
    zero = emit.call(aten.zeros.default, [], dtype=mask.dtype, device=fake(values).device)
    if is_shown:
        return emit.call(aten.where.ScalarOther, values, zero, fill)
    return emit.call(aten.where.ScalarSelf, values, fill, zero)


def _shown(rewriter: Rewriter, proof: MaskProof) -> fx.Node:
    """bool [S, S]: the pairs that a proof is about."""
    emit, indices = rewriter.emit, rewriter.layouts.indices
    length = rewriter.layouts.sizes[Layout.DENSE].length
    keys = emit.call(aten.arange.default, length, device=fake(indices.positions).device)
    behind = emit.call(aten.sub.Tensor, emit.call(aten.unsqueeze.default, keys, 1), keys)
    shown = emit.call(aten.ge.Scalar, behind, 0)
    if proof.window:
        near = emit.call(aten.lt.Scalar, behind, proof.window)
        shown = emit.call(aten.logical_and.default, shown, near)
    return shown
