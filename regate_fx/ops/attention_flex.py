"""Variable-length attention by FlexAttention: windows and masks in original positions, caps, any dtype and head widths.

A kernel compiled for what an attention sees, over the blocks of rows that see each other at all. The backward computes
the forward again: this operator keeps no graph.

Shapes: N packed rows, B samples, n blocks of rows, Hq query heads, Hk key heads, Bm and Hm batch and heads of a mask,
S positions, d width of a query and key, dv width of a value.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, FlexKernelOptions, flex_attention

from regate_fx.ops.visibility import Scoring, Visibility, with_sinks

BLOCK = 128
# For less than a block of rows, Inductor would take its kernel for decoding, which fails for most numbers of them where
# heads are grouped.
_OPTIONS: FlexKernelOptions = {"FORCE_USE_FLEX_ATTENTION": True}
# Larger than any position, so that rows of all samples are in order by `sample * _SPAN + position`.
_SPAN = 1 << 32


class Range(NamedTuple):
    """The rows that a row may see: int64 [N] each, `last` included; neither ever falls from row to row."""

    first: Tensor
    last: Tensor


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, sees: Visibility, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Return out [1, Hq, N, dv] and lse [Hq, N], zeros where there are no sinks: the backward does without."""
    with torch.no_grad(), _outside():
        out, lse = _kernel(q, k, v, sees, scoring)(q, k, v, cu_seqlens, *sees, *_constant(scoring))
    if lse is None:
        lse = q.new_zeros(q.shape[1], q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    return _packed(out), lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, sees: Visibility, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each [1, H, N, w] with a contiguous transpose(1, 2)."""
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad(), _outside():
        out, _ = _kernel(q, k, v, sees, scoring)(*leaves, cu_seqlens, *sees, *_constant(scoring))
    grads = torch.autograd.grad(out, leaves, grad_out)
    return _packed(grads[0]), _packed(grads[1]), _packed(grads[2])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: str,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """out [1, Hq, N, dv] and, beside sinks, lse [Hq, N].

    The arguments are those of `regate_fx::varlen_attention`, but for the cap, which is text: of a number, Dynamo would
    make a variable, which FlexAttention does not take.
    """
    rows = torch.arange(q.shape[2], device=q.device)
    samples = torch.bucketize(rows, cu_seqlens[1:].long(), right=True)
    seen = visible_rows(rows, samples, cu_seqlens.long(), positions, causal, window)
    allows, scores = _mods(samples, positions, mask, causal, window, float(softcap))
    blocks = blocks_of(seen, whole=mask is None, allows=allows)
    grouped = q.shape[1] != k.shape[1]
    out, aux = flex_attention(
        q, k, v, score_mod=scores, block_mask=blocks, scale=scale, enable_gqa=grouped,
        return_aux=AuxRequest(lse=sinks is not None), kernel_options=_OPTIONS,
    )  # fmt: skip
    return (out, None) if aux.lse is None else with_sinks(out, aux.lse[0], sinks)


def visible_rows(
    rows: Tensor, samples: Tensor, bounds: Tensor, positions: Tensor, causal: bool, window: int
) -> Range:
    """The rows of its own sample that a row may see by order and window. samples, positions: int64 [N]."""
    first = bounds[samples]
    if window:
        # The first key of the sample at `position - window + 1` or behind it.
        least = (positions - window + 1).clamp(min=0)
        first = torch.searchsorted(samples * _SPAN + positions, samples * _SPAN + least)
    return Range(first, rows if causal else bounds[samples + 1] - 1)


def blocks_of(seen: Range, whole: bool, allows: Callable[..., Tensor]) -> BlockMask:
    """Which blocks of keys each block of queries sees: a range of them, those in its middle without any exception.

    whole: what a row may see by order and window, it sees.
    """
    N = seen.first.shape[0]
    count = (N + BLOCK - 1) // BLOCK
    index = torch.arange(count, device=seen.first.device)
    begin, end = index * BLOCK, ((index + 1) * BLOCK).clamp(max=N) - 1
    low, high = seen.first[begin] // BLOCK, seen.last[end] // BLOCK
    if whole:
        full_low = (seen.first[end] + BLOCK - 1) // BLOCK
        full_high = (seen.last[begin] + 1) // BLOCK
        full = (full_high - full_low).clamp(min=0)
    else:
        full_low, full = low, torch.zeros_like(low)
    before = torch.where(full > 0, full_low - low, high - low + 1)
    partial = high - low + 1 - full
    places = low[:, None] + index + torch.where(index >= before[:, None], full[:, None], 0)
    return BlockMask.from_kv_blocks(
        partial.int()[None, None],
        places.clamp(max=count - 1).int()[None, None],
        full.int()[None, None],
        (full_low[:, None] + index).clamp(max=count - 1).int()[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=allows,
        seq_lengths=(N, N),
    )


def _mods(
    samples: Tensor, positions: Tensor, mask: Tensor | None, causal: bool, window: int, softcap: float
) -> tuple[Callable[..., Tensor], Callable[..., Tensor] | None]:
    """What may be seen by (batch, head, query, key), and what becomes of a score."""
    is_added = mask is not None and mask.dtype is not torch.bool

    def entry(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert mask is not None
        # Behind the samples may come rows that are none's, of which it does not matter what they see.
        sample = samples[i].clamp(max=mask.shape[0] - 1)
        return mask[sample, head if mask.shape[1] > 1 else 0, positions[i], positions[j]]

    def allows(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = samples[i] == samples[j]
        if causal:
            seen = seen & (j <= i)
        if window:
            seen = seen & (positions[j] > positions[i] - window)
        return seen & entry(head, i, j) if mask is not None and mask.dtype is torch.bool else seen

    def scores(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        return score + entry(head, i, j) if is_added else score

    return allows, scores if softcap or is_added else None


def _constant(scoring: Scoring) -> tuple[float, str, Tensor | None]:
    return scoring.scale, str(scoring.softcap), scoring.sinks


# As they are outside of any operator.
_KEYS = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def _outside() -> Any:
    """What runs in here is dispatched as if no operator were running: within one, compilers and vmap do not work."""
    return torch._C._ForceDispatchKeyGuard(*_KEYS)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, sees: Visibility, scoring: Scoring
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    mask = None if sees.mask is None else (sees.mask.dtype, sees.mask.shape[0] > 1, sees.mask.shape[1] > 1)
    heads = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
    sinks = None if scoring.sinks is None else scoring.sinks.dtype
    return _compiled(
        q.device, q.dtype, heads, sees.causal, sees.window, mask, scoring.scale, scoring.softcap, sinks
    )


@cache
def _compiled(*facts: object) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`attend` for one kind of attention, with code of its own: Dynamo limits the graphs of a code object, and past the
    limit would compute all pairs of rows, without a word."""
    own = types.FunctionType(attend.__code__.replace(), attend.__globals__, attend.__name__)
    return torch.compile(own, dynamic=True, fullgraph=True)


def _packed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)
