"""Variable-length attention on CUDA: flash_attn where it is installed, torch's own kernel elsewhere.

Shapes: N packed rows, B samples, Hq query heads, Hk key heads, d head width. The kernels take [N, H, d].
"""

from __future__ import annotations

import torch
from torch import Tensor

from regate_fx.errors import Unsupported
from regate_fx.ops.attention_kernels import (
    Kernel,
    activated_flash_attention,
    torch_groups_heads,
    torch_version,
)
from regate_fx.ops.visibility import Scoring, with_sinks

# For a single row, flash_attn takes the query heads of a group for rows, and then expects every sample to have one. The
# kernels size their grids by it, so that a larger one changes no result.
_LEAST_MAX_SEQLEN = 2
# The kernels load 16 bytes at once, and check the last stride only.
_ALIGNED = 16
# Seen to translate a window of -1 on its way there; an older one was seen to pass it on.
_FA4_SINCE = (2, 13)


def forward(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Return out [1, Hq, N, d] with a contiguous transpose(1, 2) and lse float32 [Hq, N].

    Scores are capped by flash_attn only.
    """
    if q.shape[2] == 0:
        return torch.empty_like(q), q.new_empty(q.shape[1], 0, dtype=torch.float32)
    rows_q, rows_k, rows_v = _rows(q), _repeated(_rows(k), q, kernel), _repeated(_rows(v), q, kernel)
    max_seqlen = max(max_seqlen, _LEAST_MAX_SEQLEN)
    if kernel == "flash_attn":
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            rows_q,
            rows_k,
            rows_v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            dropout_p=0.0,
            softmax_scale=scoring.scale,
            causal=causal,
            softcap=scoring.softcap,
        )
    else:
        out, lse = _torch_forward(rows_q, rows_k, rows_v, cu_seqlens, max_seqlen, causal, scoring.scale)
    return with_sinks(_heads(out), lse.contiguous(), scoring.sinks)


def backward(
    kernel: Kernel,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each [1, H, N, d] with a contiguous transpose(1, 2)."""
    if q.shape[2] == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rows_q, rows_k, rows_v = _rows(q), _repeated(_rows(k), q, kernel), _repeated(_rows(v), q, kernel)
    rows = (_rows(grad_out), rows_q, rows_k, rows_v, _rows(out))
    if kernel == "flash_attn":
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = (torch.empty_like(rows_q), torch.empty_like(rows_k), torch.empty_like(rows_v))
        _flash_attn_varlen_backward(
            *rows,
            lse,
            *grads,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            dropout_p=0.0,
            softmax_scale=scoring.scale,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=scoring.softcap,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    else:
        grads = _torch_backward(*rows, lse, cu_seqlens, max_seqlen, causal, scoring.scale)
    return _heads(grads[0]), _heads(_summed(grads[1], k)), _heads(_summed(grads[2], v))


def _torch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    import torch.nn.attention.varlen  # registers torch_attn::_varlen_attn

    if activated_flash_attention() == "FA4" and torch_version() < _FA4_SINCE:
        raise Unsupported(
            "FlashAttention 4 in the place of torch's kernel, before torch 2.13",
            "it may take 'no limit to the left' for a window.",
            "Call torch.nn.attention.restore_flash_attention_impl(), or use a newer torch.",
        )
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    window = [-1, 0] if causal else [-1, -1]
    out, lse, _ = torch.ops.torch_attn._varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        causal,
        scale=scale,
        window_size=window,
        **grouped,
    )
    return out, lse


def _torch_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    import torch.nn.attention.varlen  # registers torch_attn::_varlen_attn_backward

    window = [-1, 0] if causal else [-1, -1]
    # The kernel asks for the random state of dropout, which it does not use: its dropout is fixed to 0.
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.torch_attn._varlen_attn_backward(
        grad_out, q, k, v, out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal, random_state,
        scale=scale, window_size=window,
    )  # fmt: skip


def _rows(heads: Tensor) -> Tensor:
    """View [1, H, N, d] as [N, H, d] with unit stride inside, every row of a head where a kernel can load it."""
    rows = heads[0].transpose(0, 1)
    steps = (rows.data_ptr(), *(stride * rows.element_size() for stride in rows.stride()[:2]))
    if rows.stride(2) == 1 and all(step % _ALIGNED == 0 for step in steps):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _heads(rows: Tensor) -> Tensor:
    """View [N, H, d] as [1, H, N, d] whose transpose(1, 2) is contiguous."""
    return rows.contiguous()[None].transpose(1, 2)


def _repeated(rows: Tensor, q: Tensor, kernel: Kernel) -> Tensor:
    if kernel == "torch" and q.shape[1] != rows.shape[1] and not torch_groups_heads():
        return rows.repeat_interleave(q.shape[1] // rows.shape[1], 1)
    return rows


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """Sum a gradient [N, Hq, d] of repeated key heads to [N, Hk, d]; one that is not repeated is returned."""
    key_heads = like.shape[1]
    if grad.shape[1] == key_heads:
        return grad
    return grad.unflatten(1, (key_heads, -1)).sum(2)
