"""What layers read of a memory that comes with each sample, in all the ways that programs write it.

Shapes: B samples, S positions, K positions of the memory, D width, H heads, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from program import Program
from told import Told, from_grid, join_heads, split_heads, to_grid
from torch import Tensor, nn


class Memory(nn.Module):
    """The memory [B, K, D], of what the caller gives: itself, ids [B, K], or ids that read one another."""

    def __init__(self, made_by: str, vocabulary: int, D: int) -> None:
        super().__init__()
        self.made_by = made_by
        self.embed = nn.Embedding(vocabulary, D)
        self.query = nn.Linear(D, D)

    def forward(self, given: Tensor | None, keys: Tensor | None) -> Tensor:
        assert given is not None and keys is not None
        if self.made_by == "caller":
            return given
        x = self.embed(given)
        if self.made_by == "encoder":
            x = x + F.scaled_dot_product_attention(self.query(x), x, x, attn_mask=keys[:, None, :])
        return x


class Cross(nn.Module):
    """Tokens in a layout to tokens in the same, each from what it reads of its sample's memory."""

    def __init__(self, kind: str, program: Program) -> None:
        super().__init__()
        self.kind, self.program, self.H = kind, program, program.heads
        D = program.width
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        if kind == "mha":
            self.mha = nn.MultiheadAttention(D, self.H, 0.0, batch_first=True)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        memory, keys, layout = told.memory, told.memory_keys, self.program.layout
        assert memory is not None and keys is not None
        B, S = told.padding.shape
        if self.kind == "through_memory":
            tokens = to_grid(x, layout, B, S)
            memory = memory + F.scaled_dot_product_attention(self.k(memory), tokens, tokens)
        if self.kind in ("mean", "first"):
            read = memory.mean(1) if self.kind == "mean" else memory[:, 0]
            y = to_grid(self.q(x), layout, B, S) * torch.tanh(self.v(read))[:, None]
            return self.out(from_grid(y, layout))
        if self.kind == "mha":
            y, _ = self.mha(
                to_grid(x, layout, B, S), memory, memory, key_padding_mask=~keys, need_weights=False
            )
            return from_grid(y, layout)
        q = split_heads(self.q(x), layout, B, S, self.H)
        k, v = (split_heads(made(memory), "grid", *keys.shape, self.H) for made in (self.k, self.v))
        seen = keys[:, None, None, :] if self.kind.endswith("masked") else None
        return self.out(join_heads(self._read(q, k, v, seen), layout))

    def _read(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """[B, H, S, d] of queries, keys and values [B, H, K, d]; seen: bool [B, 1, 1, K] or None."""
        if self.kind == "einsum":
            weights = torch.einsum("bhsd,bhkd->bhsk", q, k).softmax(-1)
            return torch.einsum("bhsk,bhkd->bhsd", weights, v)
        if self.kind.startswith("scores"):
            scores = q @ k.mT / q.shape[-1] ** 0.5
            if seen is not None:
                scores = scores.masked_fill(~seen, self.program.least)
            return scores.softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
