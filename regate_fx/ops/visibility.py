"""Which keys a query sees, and what becomes of a score: the arguments of the attention operator that decide it.

Shapes: N packed rows, Bm and Hm batch and heads of a mask, S positions, Hq query heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Visibility(NamedTuple):
    """As `regate_fx::varlen_attention` takes them."""

    positions: Tensor
    mask: Tensor | None
    causal: bool
    window: int


class Scoring(NamedTuple):
    """From the product of a query and a key to its share: `softmax([cap(product * scale) + mask, sink])`.

    softcap: c > 0 caps a score s to `c * tanh(s / c)`; 0: no cap. sinks: [Hq], or None.
    """

    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention beside one more key for each head, `sinks` [Hq], that has no value, from attention without it.

    out: [1, Hq, N, dv], lse: [Hq, N]. From what this returns, a flash kernel's backward computes the right gradients
    without knowing of sinks: it takes the weights from lse, and what each query loses to them from out.
    """
    if sinks is None:
        return out, lse
    sink = sinks.to(lse.dtype)[:, None]
    share = _nothing_where_blind(torch.sigmoid(lse - sink), lse)
    return out * share[None, :, :, None].to(out.dtype), torch.logaddexp(lse, sink)


def grad_of_sinks(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """[Hq], from out [1, Hq, N, dv] and lse [Hq, N] with sinks: a sink's share is taken from every query's output."""
    wide = lse.dtype
    taken = (grad_out.to(wide) * out.to(wide)).sum(-1)[0]
    share = _nothing_where_blind(torch.exp(sinks.to(wide)[:, None] - lse), lse)
    return -(share * taken).sum(-1).to(sinks.dtype)


def _nothing_where_blind(share: Tensor, lse: Tensor) -> Tensor:
    """Of a query that sees no key, beside a sink of minus infinity."""
    return share.masked_fill(lse == float("-inf"), 0.0)
