"""Variable-length attention on the CPU: torch's flash attention, once for every run of equally long samples.

Shapes: N packed rows, B samples, S positions, n samples in a block, T rows of each of them, Hq query heads,
Hk key heads, Hm heads of a mask, d width of a query and key, dv width of a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regate_fx.ops import attention_explicit, attention_flash_cpu
from regate_fx.ops.visibility import Scoring, Visibility, with_sinks

# A query to whose every key a mask adds a large finite number has a logsumexp so far from 0 that the backward
# of flash attention, which rebuilds the weights from it, loses them to rounding. Real scores stay within this.
_LSE_LIMIT = 1e3


class Block(NamedTuple):
    """`samples` samples of `length` rows each, from packed row `start` on.

    bias: added to the scores of a single sample, [1, 1 or Hm, T, T], or None.
    """

    start: int
    samples: int
    length: int
    bias: Tensor | None

    def of(self, rows: Tensor) -> Tensor:
        """View this block of [1, H, N, w] as [n, H, T, w]."""
        _, heads, _, width = rows.shape
        _, per_head, per_row, per_value = rows.stride()
        # One call instead of narrow, unflatten and transpose: short samples are bound by the number of calls.
        return rows.as_strided(
            (self.samples, heads, self.length, width),
            (self.length * per_row, per_head, per_row, per_value),
            rows.storage_offset() + self.start * per_row,
        )

    def of_heads(self, lse: Tensor) -> Tensor:
        """View this block of [H, N] as [n, H, T]."""
        per_head, per_row = lse.stride()
        return lse.as_strided(
            (self.samples, lse.shape[0], self.length),
            (self.length * per_row, per_head, per_row),
            lse.storage_offset() + self.start * per_row,
        )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    sees: Visibility,
    scoring: Scoring,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return out [1, Hq, N, dv] and lse [Hq, N] as `regate_fx::varlen_attention` describes them."""
    if (block := _only_block(cu_seqlens, q, k, v, sees, scoring, dropout_p)) is not None:
        out, lse = attention_flash_cpu.forward(
            block.of(q), block.of(k), block.of(v), None, sees.causal, scoring.scale
        )
        return _by_head([_pack(out, v.shape[-1])], q, v.shape[-1]), lse.transpose(1, 2).flatten(0, 1).t()
    dv = v.shape[-1]
    width = max(q.shape[-1], dv)
    q, k, v = _to_width(q, width), _to_width(k, width), _to_width(v, width)
    draws = _draws(scoring, dropout_p, seed)
    single = draws is not None or attention_flash_cpu.must_split(q.shape[1], k.shape[1])
    outs, lses = [], []
    for block in _blocks(cu_seqlens, sees, q.dtype, single):
        qkv, bias = (block.of(q), block.of(k), block.of(v)), block.bias
        if draws is None:
            out, lse = attention_flash_cpu.forward(*qkv, bias, sees.causal, scoring.scale)
        else:
            out, lse = attention_explicit.forward(*qkv, bias, sees.causal, scoring, draws)
        outs.append(_pack(out, dv))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    rows = _join(lses) if lses else q.new_empty(0, q.shape[1], dtype=_wide(q))
    out, lse = _by_head(outs, q, dv), rows.t()
    return (out, lse) if draws is not None else with_sinks(out, lse, scoring.sinks)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    sees: Visibility,
    scoring: Scoring,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each [1, H, N, w] with a contiguous transpose(1, 2)."""
    if (block := _only_block(cu_seqlens, q, k, v, sees, scoring, dropout_p)) is not None:
        parts = attention_flash_cpu.backward(
            block.of(grad_out), block.of(q), block.of(k), block.of(v), block.of(out), block.of_heads(lse), None,
            sees.causal, scoring.scale,
        )  # fmt: skip
        of_q, of_k, of_v = (_by_head([_pack(part, part.shape[-1])], part, part.shape[-1]) for part in parts)
        return of_q, of_k, of_v
    d, dv = q.shape[-1], v.shape[-1]
    grad_out, q, k, v, out = (_to_width(t, max(d, dv)) for t in (grad_out, q, k, v, out))
    draws = _draws(scoring, dropout_p, seed)
    single = draws is not None or attention_flash_cpu.must_split(q.shape[1], k.shape[1])
    grads: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for block in _blocks(cu_seqlens, sees, q.dtype, single):
        given, bias = (block.of(grad_out), block.of(q), block.of(k), block.of(v)), block.bias
        block_lse = block.of_heads(lse)
        if draws is None and not (sees.mask is not None and bool((block_lse.abs() > _LSE_LIMIT).any())):
            found = block.of(out), block_lse
            parts = attention_flash_cpu.backward(*given, *found, bias, sees.causal, scoring.scale)
        else:
            again = draws or attention_explicit.Dropout(0.0, seed)
            parts = attention_explicit.backward(*given, bias, sees.causal, scoring, again)
        for packed, part, width in zip(grads, parts, (d, d, dv), strict=True):
            packed.append(_pack(part, width))
    return _by_head(grads[0], q, d), _by_head(grads[1], k, d), _by_head(grads[2], v, dv)


def _only_block(
    cu_seqlens: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sees: Visibility,
    scoring: Scoring,
    dropout_p: float,
) -> Block | None:
    """The block of a batch whose samples are equally long, where one call of flash attention is all there is to do.

    Apart from the general way, because the Python around that call is what a small step waits for.
    """
    if sees.mask is not None or sees.window or dropout_p or scoring.softcap or scoring.sinks is not None:
        return None
    if q.shape[-1] != v.shape[-1] or attention_flash_cpu.must_split(q.shape[1], k.shape[1]):
        return None
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        return None
    bounds = cu_seqlens.tolist()
    samples = len(bounds) - 1
    length = bounds[1] if samples else 0
    if length == 0 or bounds != list(range(0, length * (samples + 1), length)):
        return None
    return Block(0, samples, length, None)


def _draws(scoring: Scoring, dropout_p: float, seed: int) -> attention_explicit.Dropout | None:
    """What an explicit softmax drops; None where flash attention computes."""
    if dropout_p == 0 and scoring.softcap == 0:
        return None
    return attention_explicit.Dropout(dropout_p, seed)


def _blocks(cu_seqlens: Tensor, sees: Visibility, dtype: torch.dtype, single: bool) -> Iterator[Block]:
    """Yield the blocks of the non-empty samples in packed order; one sample a block where a bias differs."""
    bounds = cu_seqlens.tolist()
    if sees.mask is not None or sees.window or single:
        for b, (start, end) in enumerate(pairwise(bounds)):
            if end > start:
                yield Block(start, 1, end - start, _bias(sees, b, start, end - start, dtype))
        return
    start = 0
    for length, run in groupby(end - begin for begin, end in pairwise(bounds) if end > begin):
        samples = len(list(run))
        yield Block(start, samples, length, None)
        start += samples * length


def _bias(sees: Visibility, sample: int, start: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to the scores of one sample, [1, Hm or 1, T, T], or None."""
    positions = sees.positions.narrow(0, start, length)
    if sees.mask is not None:
        # Behind the samples may come rows that are none's, of which it does not matter what they see.
        of_sample = sees.mask[min(sample, sees.mask.shape[0] - 1)]
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


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _by_head(parts: list[Tensor], like: Tensor, width: int) -> Tensor:
    """Concatenate packed rows [.., H, width] into [1, H, N, width] whose transpose(1, 2) is contiguous."""
    if not parts:
        return like.new_empty(1, 0, like.shape[1], width).transpose(1, 2)
    return _join(parts).unsqueeze(0).transpose(1, 2)


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
