"""Variable-length attention over packed rows: one differentiable operator, whatever kernel computes it.

Shapes: N packed rows, B samples, S positions, Hq query heads, Hk key heads, Bm and Hm batch and heads of a
mask, d width of a query and key, dv width of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regate_fx.errors import InvalidInput, Unsupported
from regate_fx.ops import attention_cpu, attention_cuda, attention_flex
from regate_fx.ops.attention_kernels import Preferred, choose_kernel, supported
from regate_fx.ops.visibility import Scoring, Visibility, grad_of_sinks

__all__ = ["supported", "varlen_attention", "varlen_attention_backward"]

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, Tensor positions, Tensor? mask, "
    "bool causal, int window, float scale, float dropout_p, Tensor? seed, str prefer='auto', float softcap=0.0, "
    "Tensor? sinks=None) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, "
    "SymInt max_seqlen, Tensor positions, Tensor? mask, bool causal, int window, float scale, "
    "float dropout_p, Tensor? seed, str prefer='auto', float softcap=0.0, Tensor? sinks=None) "
    "-> (Tensor, Tensor, Tensor)"
)


# Defined bare: `custom_op` would add a check for aliases and a layer of autograd to each of the many calls of a step.
for _name, _schema in (("varlen_attention", _SCHEMA), ("varlen_attention_backward", _BACKWARD_SCHEMA)):
    torch.library.define(
        f"regate_fx::{_name}", _schema, tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
    )

varlen_attention = torch.ops.regate_fx.varlen_attention.default
"""Attention of every packed row to the packed rows of its own sample.

q:          floating [1, Hq, N, d], k: [1, Hk, N, d], v: [1, Hk, N, dv]; one dtype, any strides. Query
            head h reads key head `h // (Hq // Hk)`.
cu_seqlens: int32 [B+1], the packed row at which each sample starts; a sample may be empty.
max_seqlen: the most rows of a sample.
positions:  int64 [N], the original position of every packed row, ascending inside a sample.
mask:       None, or bool (True: may see) or floating (added to the scores) [Bm, Hm, S, S] over original
            positions, Bm in {1, B}, Hm in {1, Hq}; read at the active pairs only. Excludes causal and
            window.
causal:     a query sees keys at its own position or before.
window:     W > 0: a query sees keys at original positions after `query - W` only; 0: no limit.
dropout_p:  probability that an attention weight is dropped, the others growing by 1 / (1 - p); `seed`,
            int64 [1], decides which, so that equal arguments give equal results in a recomputation.
prefer:     the CUDA kernel that computes it where it can: "flash_attn", "torch", "flex" or "auto".
softcap:    c > 0: a score s becomes `c * tanh(s / c)`, before a mask is added; 0: it stays.
sinks:      None, or floating [Hq]: the score of one more key that every query sees, and that has no value.

Returns out [1, Hq, N, dv], whose transpose(1, 2) is contiguous, and lse [Hq, N], the logsumexp of each
query's scores, its sink included: float32, float64 for float64 queries. lse serves the backward only and has no
gradient; zeros where FlexAttention computes without sinks, which does without.
A query that sees no key gets zeros. Differentiable once, in q, k, v and sinks. Raises `InvalidInput` for heads
that do not divide, a mask beside causal or window, and dropout without a seed; `Unsupported` for a mask
that requires grad and for what `supported` names.
"""

varlen_attention_backward = torch.ops.regate_fx.varlen_attention_backward.default
"""Return the gradients of q, k and v, each with a contiguous transpose(1, 2). That of sinks is read from out and lse.

grad_out [1, Hq, N, dv]; out and lse as `varlen_attention` returned them, the rest as it took them.
"""


@torch.library.impl("regate_fx::varlen_attention", "cpu")
def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    positions: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    prefer: Preferred = "auto",
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    sees = Visibility(positions, mask, causal, window)
    _check(q, k, sees, sinks)
    scoring = Scoring(scale, softcap, sinks)
    return attention_cpu.forward(q, k, v, cu_seqlens, sees, scoring, dropout_p, _seed(dropout_p, seed))


@torch.library.impl("regate_fx::varlen_attention_backward", "cpu")
def _backward_cpu(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    positions: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    prefer: Preferred = "auto",
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    sees = Visibility(positions, mask, causal, window)
    scoring = Scoring(scale, softcap, sinks)
    return attention_cpu.backward(
        grad_out, q, k, v, out, lse, cu_seqlens, sees, scoring, dropout_p, _seed(dropout_p, seed)
    )


def _check(q: Tensor, k: Tensor, sees: Visibility, sinks: Tensor | None) -> None:
    if q.shape[1] % k.shape[1]:
        problem = f"{q.shape[1]} query heads do not divide among {k.shape[1]} key heads."
        raise InvalidInput("q", problem, "Use a multiple of the key heads.")
    if sinks is not None and sinks.shape != (q.shape[1],):
        problem = f"has shape {list(sinks.shape)}, and there are {q.shape[1]} query heads."
        raise InvalidInput("sinks", problem, "Give one sink for each query head.")
    if sees.mask is not None and (sees.causal or sees.window):
        raise InvalidInput("mask", "was given beside causal or window.", "Put them into the mask.")


def _seed(dropout_p: float, seed: Tensor | None) -> int:
    if dropout_p == 0:
        return 0
    if seed is None:
        raise InvalidInput("seed", "attention dropout has no seed.", "Pass an int64 tensor of one element.")
    return int(seed)


@torch.library.impl("regate_fx::varlen_attention", "cuda")
def _forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    positions: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    prefer: Preferred = "auto",
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    sees = Visibility(positions, mask, causal, window)
    _check(q, k, sees, sinks)
    widths = q.shape[-1], v.shape[-1]
    reason = supported(q.device.type, q.dtype, causal, window, mask, dropout_p, *widths, softcap)
    if reason:
        raise Unsupported("this attention", f"{reason}.", "Ask regate_fx.ops.attention.supported beforehand.")
    scoring = Scoring(scale, softcap, sinks)
    kernel = choose_kernel(prefer, q.dtype, window, mask, *widths, softcap)
    if kernel == "flash_attn" or kernel == "torch":
        return attention_cuda.forward(kernel, q, k, v, cu_seqlens, max_seqlen, causal, scoring)
    return attention_flex.forward(q, k, v, cu_seqlens, sees, scoring)


@torch.library.impl("regate_fx::varlen_attention_backward", "cuda")
def _backward_cuda(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    positions: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    prefer: Preferred = "auto",
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    scoring = Scoring(scale, softcap, sinks)
    kernel = choose_kernel(prefer, q.dtype, window, mask, q.shape[-1], v.shape[-1], softcap)
    if kernel == "flash_attn" or kernel == "torch":
        return attention_cuda.backward(
            kernel, grad_out, q, k, v, out, lse, cu_seqlens, max_seqlen, causal, scoring
        )
    sees = Visibility(positions, mask, causal, window)
    return attention_flex.backward(grad_out, q, k, v, cu_seqlens, sees, scoring)


def _packed(like: Tensor, width: Any) -> Tensor:
    """Allocate [1, H, N, width] whose transpose(1, 2) is contiguous."""
    return like.new_empty(1, like.shape[2], like.shape[1], width).transpose(1, 2)


@torch.library.register_fake("regate_fx::varlen_attention")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    heads, rows = q.shape[1], q.shape[2]
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    if q.device.type == "cpu":
        lse = q.new_empty(rows, heads, dtype=lse_dtype).t()  # as the kernel leaves it
    else:
        lse = q.new_empty(heads, rows, dtype=lse_dtype)
    return _packed(q, v.shape[-1]), lse


@torch.library.register_fake("regate_fx::varlen_attention_backward")
def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _packed(q, q.shape[-1]), _packed(k, k.shape[-1]), _packed(v, v.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, max_seqlen, positions, mask, *rest, seed, prefer, softcap, sinks = inputs
    if mask is not None and mask.requires_grad:
        raise Unsupported(
            "a gradient of the attention mask", "the operator has none for it.", "Detach the mask."
        )
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, positions, mask, seed, sinks)
    ctx.max_seqlen = max_seqlen
    ctx.rest, ctx.prefer, ctx.softcap = rest, prefer, softcap


@once_differentiable
def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, positions, mask, seed, sinks = ctx.saved_tensors
    grads = varlen_attention_backward(
        grad_out, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, positions, mask, *ctx.rest, seed, ctx.prefer,
        ctx.softcap, sinks,
    )  # fmt: skip
    wants_sinks = sinks is not None and ctx.needs_input_grad[-1]
    of_sinks = grad_of_sinks(grad_out, out, lse, sinks) if wants_sinks else None
    return (*grads, *(None,) * 11, of_sinks)


torch.library.register_autograd("regate_fx::varlen_attention", _autograd, setup_context=_setup_context)
