"""Variable-length attention on the CPU: torch's flash attention, once for every run of equally long samples.

Shapes: N packed rows, B samples, S positions, n samples in a block, T rows of each of them, Hq query heads,
Hk key heads, Hm heads of a mask, d width of a query and key, dv width of a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from regate_fx.ops import attention_explicit, attention_flash_cpu

# A query whose every key is masked by a large finite number has a logsumexp so far from 0 that the backward
# of flash attention, which rebuilds the weights from it, loses them to rounding. Real scores stay above this.
_LSE_FLOOR = -1e3


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees: the arguments of the operator that decide it."""

    positions: Tensor
    mask: Tensor | None
    causal: bool
    window: int


@dataclass(frozen=True)
class Block:
    """`count` samples of `length` rows each, from packed row `start` on.

    bias: added to the scores of a single sample, [1, 1 or Hm, T, T], or None.
    """

    start: int
    count: int
    length: int
    bias: Tensor | None

    def of(self, rows: Tensor) -> Tensor:
        """View this block of [1, H, N, w] as [n, H, T, w]."""
        _, heads, _, width = rows.shape
        _, per_head, per_row, per_value = rows.stride()
        # One call instead of narrow, unflatten and transpose: short samples are bound by the number of calls.
        return rows.as_strided(
            (self.count, heads, self.length, width),
            (self.length * per_row, per_head, per_row, per_value),
            rows.storage_offset() + self.start * per_row,
        )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    sees: Visibility,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return out [1, Hq, N, dv] and lse [Hq, N] as `regate_fx::varlen_attention` describes them."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, padded_v = (_to_width(t, width) for t in (q, k, v))
    draws = attention_explicit.Dropout(dropout_p, seed)
    single = dropout_p > 0 or attention_flash_cpu.must_split(q.shape[1], k.shape[1])
    outs, lses = [], []
    for block in _blocks(cu_seqlens, sees, q.dtype, single):
        block_q, block_k, block_v = block.of(q), block.of(k), block.of(padded_v)
        if dropout_p > 0:
            out, lse = attention_explicit.forward(
                block_q, block_k, block_v, block.bias, sees.causal, scale, draws
            )
        else:
            out, lse = attention_flash_cpu.forward(block_q, block_k, block_v, block.bias, sees.causal, scale)
        outs.append(_pack(out, v.shape[-1]))
        lses.append(lse.transpose(0, 1).flatten(1))
    return _join(outs, q, v.shape[-1]), torch.cat(lses, 1) if lses else q.new_empty(
        q.shape[1], 0, dtype=_wide(q)
    )


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    sees: Visibility,
    scale: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each [1, H, N, w] with a contiguous transpose(1, 2)."""
    d, dv = q.shape[-1], v.shape[-1]
    grad_out, q, k, v, out = (_to_width(t, max(d, dv)) for t in (grad_out, q, k, v, out))
    lse_rows = lse[None, :, :, None]
    draws = attention_explicit.Dropout(dropout_p, seed)
    single = dropout_p > 0 or attention_flash_cpu.must_split(q.shape[1], k.shape[1])
    grads: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for block in _blocks(cu_seqlens, sees, q.dtype, single):
        block_grad, block_q, block_k, block_v = (block.of(t) for t in (grad_out, q, k, v))
        block_lse = block.of(lse_rows).squeeze(-1)
        if dropout_p > 0 or (sees.mask is not None and bool((block_lse < _LSE_FLOOR).any())):
            parts = attention_explicit.backward(
                block_grad, block_q, block_k, block_v, block.bias, sees.causal, scale, draws
            )
        else:
            parts = attention_flash_cpu.backward(
                *(block_grad, block_q, block_k, block_v, block.of(out), block_lse),
                *(block.bias, sees.causal, scale),
            )
        for packed, part, width in zip(grads, parts, (d, d, dv), strict=True):
            packed.append(_pack(part, width))
    return _join(grads[0], q, d), _join(grads[1], k, d), _join(grads[2], v, dv)


def _blocks(cu_seqlens: Tensor, sees: Visibility, dtype: torch.dtype, single: bool) -> Iterator[Block]:
    """Yield the blocks of the non-empty samples in packed order; one sample a block where a bias differs."""
    bounds = cu_seqlens.tolist()
    spans = [(b, lo, hi - lo) for b, (lo, hi) in enumerate(pairwise(bounds)) if hi > lo]
    if sees.mask is not None or sees.window or single:
        for b, start, length in spans:
            yield Block(start, 1, length, _bias(sees, b, start, length, dtype))
        return
    for length, run in groupby(spans, key=lambda span: span[2]):
        samples = list(run)
        yield Block(samples[0][1], len(samples), length, None)


def _bias(sees: Visibility, sample: int, start: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to the scores of one sample, [1, Hm or 1, T, T], or None."""
    positions = sees.positions.narrow(0, start, length)
    if sees.mask is not None:
        of_sample = sees.mask[sample if sees.mask.shape[0] > 1 else 0]
        return _additive(_active_pairs(of_sample, positions), dtype)[None]
    if sees.window == 0 or sees.window > int(positions[-1] - positions[0]):
        return None
    return _additive(positions > positions[:, None] - sees.window, dtype)[None, None]


def _active_pairs(mask: Tensor, positions: Tensor) -> Tensor:
    """Return [Hm, T, T] of a mask [Hm, S, S] at the active positions; a view where they are consecutive."""
    first, length = int(positions[0]), positions.shape[0]
    if int(positions[-1]) - first + 1 == length:
        return mask.narrow(1, first, length).narrow(2, first, length)
    return mask[:, positions[:, None], positions]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask in a floating dtype that flash attention takes beside queries of `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=wide).masked_fill_(~mask, float("-inf"))
    return mask if mask.dtype == dtype else mask.to(wide)


def _to_width(rows: Tensor, width: int) -> Tensor:
    """Return [1, H, N, w] with unit stride inside, padded by zeros, which add nothing to a score."""
    if rows.shape[-1] < width:
        return F.pad(rows, (0, width - rows.shape[-1]))
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _pack(block: Tensor, width: int) -> Tensor:
    """Turn [n, H, T, w] into packed rows [n * T, H, width]."""
    narrow = block if block.shape[-1] == width else block[..., :width]
    return narrow.transpose(1, 2).flatten(0, 1)


def _join(parts: list[Tensor], like: Tensor, width: int) -> Tensor:
    """Concatenate packed rows into [1, H, N, width] whose transpose(1, 2) is contiguous."""
    if not parts:
        return like.new_empty(1, 0, like.shape[1], width).transpose(1, 2)
    rows = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
    return rows[None].transpose(1, 2)


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
