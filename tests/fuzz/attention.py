"""Self-attention in all the ways that programs write it.

Shapes: B samples, S positions, D width, H query heads, G key heads, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from blocks import norm
from mixing import Mix
from program import Layer, Program
from scores import DISTANCES, ByScores, distances
from told import Pair, Told, from_grid, join_heads, phases, split_heads, to_grid, turned
from torch import Tensor, nn


class Attention(nn.Module):
    """Tokens in a layout to tokens in the same, and the keys and values [B, G, S, d] that a later layer may take."""

    def __init__(self, choice: Layer, program: Program) -> None:
        super().__init__()
        self.choice, self.program = choice, program
        D, H = program.width, program.heads
        self.H, self.d = H, D // H
        self.G = {"all": H, "single": 1}.get(choice.groups, H // 2)
        outer = (H + 2 * self.G) * self.d
        if choice.attend.startswith("mha"):
            is_first = program.layout != "sequence_first"
            self.mha = nn.MultiheadAttention(D, H, 0.0, batch_first=is_first, add_bias_kv=choice.memory)
        elif choice.qkv == "separate":
            self.q = nn.Linear(D, H * self.d, bias=False)
            self.k, self.v = (nn.Linear(D, self.G * self.d, bias=False) for _ in range(2))
        else:
            self.qkv = nn.Linear(D, outer)
        self.out = nn.Linear(D, D, bias=choice.residual != "scaled")
        self.q_norm, self.k_norm = (norm("rms", self.d, program.float32) for _ in range(2))
        self.out_gate = nn.Linear(D, H if choice.out_gate == "heads" else D)
        self.second = nn.Parameter(torch.tensor(0.5))
        self.relative = nn.Embedding(DISTANCES, H)
        self.content_bias = nn.Linear(D, H)
        self.by_scores = ByScores(choice, program)
        self.mix = Mix(choice.mix, self.G * self.d) if choice.mix_at == "values" else None

    def forward(self, x: Tensor, told: Told, lent: Pair | None) -> tuple[Tensor, Pair | None]:
        B, S = told.padding.shape
        if self.choice.attend.startswith("mha"):
            y, kept = self._packaged(x, told), None
        else:
            q, k, v = self._projected(x, B, S)
            q, k, v = self._prepared(q, k, v, told)
            if self.choice.values == "earlier":
                assert lent is not None
                k, v = lent
            kept = k, v
            if self.choice.content_bias != "none":
                rows = split_heads(self.content_bias(x), self.program.layout, B, S, self.H)  # [B, H, S, 1]
                told = told._replace(content_bias=rows.mT if self.choice.content_bias == "keys" else rows)
            out = self._attended(q, k, v, told)
            if self.choice.out_gate == "heads":
                gates = split_heads(self.out_gate(x), self.program.layout, B, S, self.H)
                out = out * torch.sigmoid(gates)
            y = join_heads(out, self.program.layout)
        if self.choice.out_gate == "elements":
            y = y * torch.sigmoid(self.out_gate(x))
        return self.out(y), kept

    # -- queries, keys and values ----------------------------------------------------------------------------

    def _projected(self, x: Tensor, B: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
        layout, H, G, d = self.program.layout, self.H, self.G, self.d
        if self.choice.qkv == "view":
            if layout == "sequence_first":
                parts = self.qkv(x).view(S, B, 3, H, d).permute(2, 1, 3, 0, 4)
            else:
                parts = self.qkv(x).view(B, S, 3, H, d).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind(0)
            return q, k, v
        if self.choice.qkv == "view_by_head":
            q, k, v = split_heads(self.qkv(x), layout, B, S, H).chunk(3, dim=-1)
            return q, k, v
        if self.choice.qkv == "separate":
            flat = self.q(x), self.k(x), self.v(x)
        elif self.choice.qkv == "chunk":
            flat = self.qkv(x).chunk(3, dim=-1)
        else:
            flat = self.qkv(x).split([H * d, G * d, G * d], dim=-1)
        q, k, v = (split_heads(part, layout, B, S, n) for part, n in zip(flat, (H, G, G), strict=True))
        return q, k, v

    def _prepared(self, q: Tensor, k: Tensor, v: Tensor, told: Told) -> tuple[Tensor, Tensor, Tensor]:
        if self.choice.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        kind = self.program.positions
        if kind.startswith("rotary"):
            rotary = told.rotary or phases(kind, told.positions, self.d, q.dtype)
            q, k = (_rotated(x, kind, rotary) for x in (q, k))
        if self.choice.writes:
            q, k = _written(q), _written(k)
        if self.mix is not None:
            mixed = self.mix(join_heads(v, "grid"), told.padding)
            v = split_heads(mixed, "grid", *told.padding.shape, self.G)
        return q, k, v

    def _expanded(self, k: Tensor) -> Tensor:
        """Keys or values, one head for each of the queries', or one to be broadcast to them."""
        times = self.H // self.G
        if self.choice.groups == "single" and not self._broadcasts:
            return k.expand(-1, self.H, -1, -1)
        if self.choice.groups == "interleave":
            return k.repeat_interleave(times, dim=1)
        if self.choice.groups == "expand":
            B, G, S, d = k.shape
            return k[:, :, None].expand(B, G, times, S, d).reshape(B, G * times, S, d)
        return k

    @property
    def _broadcasts(self) -> bool:
        return self.choice.attend == "scores" and self.choice.scores in ("matmul", "summed", "distance")

    # -- attention ---------------------------------------------------------------------------------------------

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, told: Told) -> Tensor:
        k, v = self._expanded(k), self._expanded(v)
        if not self.choice.minus:
            return self._single(q, k, v, told)
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        return self._single(q1, k1, v, told) - self.second * self._single(q2, k2, v, told)

    def _single(self, q: Tensor, k: Tensor, v: Tensor, told: Told) -> Tensor:
        if self.choice.attend == "scores":
            return self.by_scores(q, k, v, told, self._bias(told))
        options = {"enable_gqa": True} if self.choice.groups == "enable_gqa" else {}
        if self.choice.attend == "sdpa_causal" and told.visible is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        mask = told.visible if self.choice.attend != "sdpa" else self._biased(told.additive, told)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    def _bias(self, told: Told) -> Tensor | None:
        biases = [bias for bias in (told.bias, told.content_bias) if bias is not None]
        if self.choice.relative == "added":
            biases.append(self.relative(distances(told)).permute(2, 0, 1)[None])
        return sum(biases[1:], start=biases[0]) if biases else None

    def _biased(self, additive: Tensor | None, told: Told) -> Tensor:
        assert additive is not None
        bias = self._bias(told)
        return additive if bias is None else additive + bias

    def _packaged(self, x: Tensor, told: Told) -> Tensor:
        """`nn.MultiheadAttention`."""
        layout, (B, S) = self.program.layout, told.padding.shape
        if layout == "flat":
            x = to_grid(x, layout, B, S)
        if self.choice.attend == "mha":
            assert told.additive is not None
            mask = told.additive.expand(B, self.H, S, S).reshape(B * self.H, S, S)
            y, _ = self.mha(x, x, x, attn_mask=mask, need_weights=False)
        else:
            keys = torch.zeros_like(told.keys[:, 0, 0], dtype=x.dtype).masked_fill(
                ~told.keys[:, 0, 0], self.program.least
            )
            causal = torch.zeros_like(told.causal, dtype=x.dtype).masked_fill(
                ~told.causal, self.program.least
            )
            y, _ = self.mha(x, x, x, attn_mask=causal, key_padding_mask=keys)
        return from_grid(y, layout) if layout == "flat" else y


def _rotated(x: Tensor, kind: str, rotary: Pair) -> Tensor:
    if kind != "rotary_partial":
        return turned(x, kind, rotary)
    half = x.shape[-1] // 2
    return torch.cat([turned(x[..., :half], kind, rotary), x[..., half:]], -1)


def _written(x: Tensor) -> Tensor:
    """The same, written into a new tensor by halves."""
    half = x.shape[-1] // 2
    y = torch.empty_like(x)
    y[..., :half] = x[..., :half]
    y[..., half:] = x[..., half:]
    return y
