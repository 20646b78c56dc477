"""Moving rows between the dense, the packed and the compact layout: one differentiable, deterministic op.

Shapes: R source rows, M output rows; further dimensions of `x` travel with their row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "regate_fx::take_rows",
    mutates_args=(),
    schema="(Tensor x, Tensor index, Tensor inverse, bool total, bool inverse_total) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
def take_rows(x: Tensor, index: Tensor, inverse: Tensor, total: bool, inverse_total: bool) -> Tensor:
    """Return out [M, ...] with `out[m] = x[index[m]]`, and zeros where `index[m] == -1`.

    x:             any dtype [R, ...], any strides.
    index:         int64 [M], the source row of every output row or -1; no source row twice.
    inverse:       int64 [R], the output row of every source row or -1; the inverse map of `index`.
    total:         promises that `index` has no -1.
    inverse_total: promises that `inverse` has no -1.

    The maps and promises are the caller's responsibility: they are not checked against each other, because
    that would wait for the device. The output is contiguous. Differentiable once, in `x` only; because rows
    are unique the backward is this op with the two maps exchanged: no atomics, the same bits every time.
    """
    if total:
        return x.index_select(0, index)
    shape = (index.shape[0], *x.shape[1:])
    if x.shape[0] == 0:
        return x.new_zeros(shape)
    if inverse_total:
        return x.new_zeros(shape).index_copy_(0, inverse, x)
    out = x.index_select(0, index.clamp(min=0))
    empty = (index < 0).view(-1, *(1,) * (x.dim() - 1))
    return out.masked_fill_(empty, 0)


@take_rows.register_fake
def _take_rows_fake(x: Tensor, index: Tensor, inverse: Tensor, total: bool, inverse_total: bool) -> Tensor:
    return x.new_empty((index.shape[0], *x.shape[1:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, inverse, ctx.total, ctx.inverse_total = inputs
    ctx.save_for_backward(index, inverse)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    index, inverse = ctx.saved_tensors
    return take_rows(grad, inverse, index, ctx.inverse_total, ctx.total), None, None, None, None


take_rows.register_autograd(_backward, setup_context=_setup_context)
