"""torch's flash attention on the CPU for one block of equally long samples, grouped key heads included.

Shapes: n samples, T rows of each, Hq query heads, Hk key heads, G = Hq / Hk, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regate_fx.ops.attention_kernels import torch_version

# Older kernels read key head h for query head h whatever the number of key heads: past the end of the tensor,
# without a word. This is the first release that was seen to read h // G, forward and backward.
_GROUPS_HEADS_SINCE = (2, 13)


def must_split(query_heads: int, key_heads: int) -> bool:
    """Whether a block may hold one sample only, because its batch dimension is needed for the G groups."""
    return query_heads != key_heads and torch_version() < _GROUPS_HEADS_SINCE


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out [n, Hq, T, d] and lse [n, Hq, T]; q, k, v [n, H, T, d], bias [1, 1 or Hq, T, T] or None."""
    if not must_split(q.shape[1], k.shape[1]):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    groups = q.shape[1] // k.shape[1]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_by_group(q, groups), _repeated(k, groups), _repeated(v, groups)), 0.0, causal,
        attn_mask=_bias_by_group(bias, groups), scale=scale,
    )  # fmt: skip
    return _by_head(out), _by_head(lse)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, shaped like them."""
    if not must_split(q.shape[1], k.shape[1]):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    groups = q.shape[1] // k.shape[1]
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_by_group(grad_out, groups), _by_group(q, groups), _repeated(k, groups), _repeated(v, groups)),
        *(_by_group(out, groups), _by_group(lse, groups)), 0.0, causal,
        attn_mask=_bias_by_group(bias, groups), scale=scale,
    )  # fmt: skip
    return _by_head(grad_q), grad_k.sum(0, keepdim=True), grad_v.sum(0, keepdim=True)


def _by_group(heads: Tensor, groups: int) -> Tensor:
    """View [1, Hk * G, ...] as [G, Hk, ...]: the g-th query head of every key head."""
    return heads[0].unflatten(0, (-1, groups)).transpose(0, 1)


def _by_head(groups: Tensor) -> Tensor:
    """Bring [G, Hk, ...] back to [1, Hk * G, ...]."""
    return groups.transpose(0, 1).flatten(0, 1)[None]


def _repeated(keys: Tensor, groups: int) -> Tensor:
    return keys.expand(groups, *keys.shape[1:])


def _bias_by_group(bias: Tensor | None, groups: int) -> Tensor | None:
    return bias if bias is None or bias.shape[1] == 1 else _by_group(bias, groups)
