"""What the layers of a program are told of the batch, and the layouts that tokens come in.

Shapes: B samples, S positions, K positions of a memory, D width, H heads, d width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class Told(NamedTuple):
    """What layers are told beside the hidden states.

    padding: int64 [B, S], 0 at padding. ids: int64 [B, S]. positions: [1 or B, S]. keys: bool [B, 1, 1, S], which keys
    may be seen. causal: bool [S, S], which keys the layer's span leaves. visible: bool [B, 1, S, S], both; None
    for attention that is causal without a mask. additive: the same, to be added to scores. bias: [1 or B, H, 1 or S, S]
    or None. rotary: phases, or None where layers make them or there are none. extra: an embedding for this layer, or
    None. content_bias: what the attention itself puts there, [B, H, 1, S] or [B, H, S, 1].
    memory: [B, K, D], or None. memory_keys: bool [B, K], which of it is real.
    """

    padding: Tensor
    ids: Tensor
    positions: Tensor
    keys: Tensor
    causal: Tensor
    visible: Tensor | None
    additive: Tensor | None
    bias: Tensor | None
    rotary: Pair | None
    extra: Tensor | None
    content_bias: Tensor | None = None
    memory: Tensor | None = None
    memory_keys: Tensor | None = None


def to_grid(x: Tensor, layout: str, B: int, S: int) -> Tensor:
    """[B, S, D] of tokens in any layout."""
    if layout == "flat":
        return x.view(B, S, -1)
    return x.transpose(0, 1) if layout == "sequence_first" else x


def from_grid(x: Tensor, layout: str) -> Tensor:
    if layout == "flat":
        return x.reshape(-1, x.shape[-1])
    return x.transpose(0, 1) if layout == "sequence_first" else x


def split_heads(x: Tensor, layout: str, B: int, S: int, heads: int) -> Tensor:
    """[B, H, S, d] of projected tokens."""
    if layout == "sequence_first":
        return x.contiguous().view(S, B, heads, -1).permute(1, 2, 0, 3)
    return x.view(B, S, heads, -1).transpose(1, 2)


def join_heads(x: Tensor, layout: str) -> Tensor:
    """Tokens in a layout, of [B, H, S, d]."""
    B, _, S, _ = x.shape
    if layout == "sequence_first":
        return x.permute(2, 0, 1, 3).reshape(S, B, -1)
    joined = x.transpose(1, 2).contiguous()
    return joined.view(B * S, -1) if layout == "flat" else joined.view(B, S, -1)


def phases(kind: str, positions: Tensor, d: int, dtype: torch.dtype) -> Pair:
    """Cosines and sines [1 or B, 1, S, d]; for complex ones [1 or B, 1, S, d / 2]."""
    base = 100.0
    if kind == "rotary_scaled":
        base = base * (1 + positions.shape[-1] / 8)
    if kind == "rotary_partial":
        d = d // 2
    rates = base ** (-torch.arange(0, d, 2, dtype=dtype) / d)
    angles = positions[:, None, :, None].to(dtype) * rates
    if kind == "rotary_pairs":
        angles = angles.repeat_interleave(2, -1)
    elif kind != "rotary_complex":
        angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def turned(x: Tensor, kind: str, rotary: Pair) -> Tensor:
    """Queries or keys [B, H, S, d], rotated."""
    cos, sin = rotary
    if kind == "rotary_complex":
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    if kind == "rotary_pairs":
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        other = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + other * sin
