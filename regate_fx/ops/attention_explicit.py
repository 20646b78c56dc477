"""Attention by an explicit softmax over one sample, a chunk of queries at a time.

For what torch's flash attention on the CPU cannot do: dropout, capped scores, and the gradient of queries whose every
key is masked by a large finite number.

Shapes: T rows of the sample, C queries of a chunk, K keys they may see, Hq query heads, Hk key heads, d width
of queries, keys and values, G = Hq / Hk query heads per key head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from regate_fx.ops.visibility import Scoring

# Scores held at once, Hq * C * K; bounds the memory of a long sample.
_CHUNK_SCORES = 1 << 22


class Dropout:
    """The dropout of one call of the operator: the same seed draws the same factors in the same order."""

    def __init__(self, p: float, seed: int) -> None:
        self._keep = 1.0 - p
        self._generator = torch.Generator().manual_seed(seed)

    def factors(self, weights: Tensor) -> Tensor | None:
        """Draw what the weights are multiplied by, 0 or 1 / (1 - p); None where nothing is dropped."""
        if self._keep == 1.0:
            return None
        if self._keep == 0.0:
            return torch.zeros_like(weights)
        return torch.empty_like(weights).bernoulli_(self._keep, generator=self._generator).div_(self._keep)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scoring: Scoring, dropout: Dropout
) -> tuple[Tensor, Tensor]:
    """Return out [1, Hq, T, d] and lse [1, Hq, T] of one sample.

    q, k, v [1, H, T, d]; bias [1, 1 or Hq, T, T] or None.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = k[0].to(wide), v[0].to(wide)
    out = torch.empty(q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
    lse = torch.empty(q.shape[1:3], dtype=wide)
    for rows, seen in _chunks(q.shape[1], q.shape[2], causal):
        queries = q[0, :, rows].to(wide)
        scores, _ = _scores(queries, keys[:, seen], scoring)
        weights, lse[:, rows] = _weights(scores, bias, rows, seen, causal, scoring.sinks)
        factors = dropout.factors(weights)
        if factors is not None:
            weights.mul_(factors)
        out[rows] = (
            _per_key_head(weights, keys).matmul(values[:, seen]).view(*queries.shape[:2], -1).transpose(0, 1)
        )
    return out.transpose(0, 1)[None], lse[None]


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    scoring: Scoring,
    dropout: Dropout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of one sample, shaped like them."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = k[0].to(wide), v[0].to(wide)
    grad_q, grad_k, grad_v = torch.empty_like(q[0]), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, seen in _chunks(q.shape[1], q.shape[2], causal):
        queries, grads = q[0, :, rows].to(wide), _per_key_head(grad_out[0, :, rows].to(wide), keys)
        scores, slopes = _scores(queries, keys[:, seen], scoring)
        weights, _ = _weights(scores, bias, rows, seen, causal, scoring.sinks)
        grad_weights = grads.matmul(values[:, seen].mT).view_as(weights)
        factors = dropout.factors(weights)
        if factors is not None:
            grad_weights.mul_(factors)
        dropped = weights if factors is None else factors.mul_(weights)
        grad_v[:, seen] += _per_key_head(dropped, keys).mT.matmul(grads)
        inner = (grad_weights * weights).sum(-1, keepdim=True)
        grad_scores = grad_weights.sub_(inner).mul_(weights).mul_(scoring.scale)
        if slopes is not None:
            grad_scores.mul_(slopes)
        grad_scores = _per_key_head(grad_scores, keys)
        grad_q[:, rows] = grad_scores.matmul(keys[:, seen]).view_as(queries).to(q.dtype)
        grad_k[:, seen] += grad_scores.mT.matmul(_per_key_head(queries, keys))
    return grad_q[None], grad_k[None].to(k.dtype), grad_v[None].to(v.dtype)


def _chunks(heads: int, length: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of every chunk and the keys that they may see."""
    step = max(1, _CHUNK_SCORES // (heads * length))
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield slice(start, stop), slice(0, stop if causal else length)


def _scores(queries: Tensor, keys: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """Return scores [Hq, C, K] and, where they are capped, the derivative of the cap at each."""
    scores = _per_key_head(queries, keys).matmul(keys.mT).view(*queries.shape[:2], -1).mul_(scoring.scale)
    if not scoring.softcap:
        return scores, None
    shares = scores.div_(scoring.softcap).tanh_()
    return shares * scoring.softcap, 1 - shares.square()


def _weights(
    scores: Tensor, bias: Tensor | None, rows: slice, seen: slice, causal: bool, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return softmax weights [Hq, C, K] and lse [Hq, C]; a query that sees nothing has weights 0."""
    if bias is not None:
        scores += bias[0, :, rows, seen]
    if causal:
        late = torch.arange(seen.stop) > torch.arange(rows.start, rows.stop)[:, None]
        scores.masked_fill_(late, float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    sink = None if sinks is None else sinks.to(scores.dtype)[:, None, None]
    if sink is not None:
        peak = torch.maximum(peak, sink)
    blind = peak == float("-inf")
    weights = scores.sub_(peak.masked_fill_(blind, 0)).exp_()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total += (sink - peak).exp()
    total.masked_fill_(blind, 1)
    return weights.div_(total), (peak + total.log()).squeeze(-1)


def _per_key_head(rows: Tensor, keys: Tensor) -> Tensor:
    """Fold [Hq, C, w] into [Hk, G * C, w], so that the queries of one key head meet it in one product."""
    return rows.reshape(keys.shape[0], -1, rows.shape[-1])
