"""Losses of labels under a linear head without ever holding the logits of all rows.

Logits of C rows at a time are made, reduced and dropped, and in the backward made once more. Beside gradients, a call
needs C x V numbers in place of N x V.

Shapes: N rows, D width, V vocabulary, C rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FEWEST = 256  # rows at a time: fewer would leave a device idle


@torch.library.custom_op(
    "regate_fx::head_loss",
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float scale=1., float cap=0.) "
    "-> (Tensor, Tensor)",
)
def head_loss(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    scale: float = 1.0,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return nll [N], the loss of each row's label, and lse [N], the logsumexp of its logits.

    rows:   float [N, D].
    weight: [V, D], and bias: [V] or None, of the rows' dtype; logits are rounded to it, as `linear` rounds them.
    target: int64 [N], in [0, V), or `ignore_index`: such rows have loss 0 and no gradient.
    scale, cap: logits are multiplied with scale; where cap is not 0, they become `cap * tanh(scale * logits)`.

    nll and lse are float32, or float64 where rows are. Only nll is differentiable, once, in rows, weight and bias; the
    gradient of the weight is summed in nll's dtype.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    nll, lse = (rows.new_empty(rows.shape[0], dtype=wide) for _ in range(2))
    counts = target != ignore_index
    labels = target.masked_fill(~counts, 0)
    for part in _parts(rows, weight):
        logits = _scaled(_logits(rows[part], weight, bias), scale, wide)
        if cap:
            logits = logits.tanh_().mul_(cap)
        torch.logsumexp(logits, 1, out=lse[part])
        nll[part] = lse[part] - logits.gather(1, labels[part, None])[:, 0]
    return nll.masked_fill_(~counts, 0), lse


@torch.library.custom_op(
    "regate_fx::head_loss_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor weight, Tensor? bias, Tensor target, Tensor lse, int ignore_index, "
    "float scale, float cap, bool of_rows, bool of_weight, bool of_bias) -> (Tensor, Tensor, Tensor)",
)
def head_loss_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    scale: float,
    cap: float,
    of_rows: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rows, weight and bias that are asked for, and empty tensors for the others.

    grad [N] is that of nll, lse as `head_loss` returned it, the rest as it took them.
    """
    wide = lse.dtype
    counts = target != ignore_index
    labels = target.masked_fill(~counts, 0)[:, None]
    per_row = grad.to(wide).masked_fill(~counts, 0)[:, None] * (scale * (cap or 1))
    grad_rows = torch.empty_like(rows) if of_rows else rows.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if of_weight else weight.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[0], dtype=wide) if of_bias else weight.new_empty(0)
    for part in _parts(rows, weight):
        logits = _scaled(_logits(rows[part], weight, bias), scale, wide)
        slope = None
        if cap:
            capped = logits.tanh_()
            slope, logits = 1 - capped.square(), capped * cap
        shares = logits.sub_(lse[part, None]).exp_()
        of_label = shares.gather(1, labels[part]) - 1
        shares.scatter_(1, labels[part], of_label).mul_(per_row[part])
        if slope is not None:
            shares.mul_(slope)
        if of_bias:
            grad_bias += shares.sum(0)
        grad_logits = shares.to(rows.dtype)
        if of_rows:
            grad_rows[part] = grad_logits @ weight
        if of_weight and wide == rows.dtype:
            grad_weight.addmm_(grad_logits.mT, rows[part])
        elif of_weight:
            grad_weight += grad_logits.mT @ rows[part]
    return grad_rows, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _parts(rows: Tensor, weight: Tensor) -> Iterator[slice]:
    """Rows whose logits take half as much memory as the weight."""
    size = max(_FEWEST, weight.shape[1] // 2)
    return (slice(start, start + size) for start in range(0, rows.shape[0], size))


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):  # the operands have the dtype that was asked for
        return F.linear(rows, weight, bias)


def _scaled(logits: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    logits = logits.to(dtype)
    return logits if scale == 1 else logits * scale


@head_loss.register_fake
def _fake(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    scale: float = 1.0,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_empty(rows.shape[:1], dtype=wide), rows.new_empty(rows.shape[:1], dtype=wide)


@head_loss_backward.register_fake
def _backward_fake(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    scale: float,
    cap: float,
    of_rows: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(rows) if of_rows else rows.new_empty(0),
        torch.empty_like(weight) if of_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if of_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, weight, bias, target, *ctx.settings = inputs
    ctx.save_for_backward(rows, weight, bias, target, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, bias, target, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    found = head_loss_backward(grad, rows, weight, bias, target, lse, *ctx.settings, *needed)
    return (
        *(value if asked else None for value, asked in zip(found, needed, strict=True)),
        None,
        None,
        None,
        None,
    )


head_loss.register_autograd(_backward, setup_context=_setup_context)
