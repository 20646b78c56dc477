"""Self-attention in all the ways that programs write it.

Shapes: B samples, S positions, D width, H query heads, G key heads, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from blocks import norm
from mixing import LONGEST, Mix
from program import Layer, Program
from told import Pair, Told, from_grid, join_heads, phases, split_heads, to_grid, turned
from torch import Tensor, nn

DISTANCES = 6  # told apart by learned biases
WINDOW, CHUNK, PREFIX = 3, 4, 3


def seen_by_index(span: str, query: Tensor, key: Tensor, causal: Tensor) -> Tensor:
    """bool [S, S]: which keys a span leaves to a query, by their positions. causal: those at or before it."""
    if span == "window":
        return causal & (query - key < WINDOW)
    if span == "chunk":
        return causal & (query // CHUNK == key // CHUNK)
    if span == "prefix":
        return causal | (key < PREFIX)
    return torch.ones_like(causal) if span == "full" else causal


class Attention(nn.Module):
    """Tokens in a layout to tokens in the same, and the keys and values [B, G, S, d] that a later layer may take."""

    def __init__(self, choice: Layer, program: Program) -> None:
        super().__init__()
        self.choice, self.program = choice, program
        D, H = program.width, program.heads
        self.H, self.d = H, D // H
        self.G = H if choice.groups == "all" else H // 2
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
        self.sinks, self.second = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.tensor(0.5))
        self.relative = nn.Embedding(DISTANCES, H)
        self.relative_rows = nn.Embedding(DISTANCES, self.d // (2 if choice.minus else 1))
        self.content_bias, self.talk = nn.Linear(D, H), nn.Linear(H, H)
        self.dropout = nn.Dropout(0.0)
        self.mix = (
            Mix(choice.mix, D if choice.groups == "all" else D // 2) if choice.mix_at == "values" else None
        )
        index = torch.arange(LONGEST)
        square = seen_by_index(choice.span, index[:, None], index, index <= index[:, None])
        self.register_buffer("tril", square)

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
            q, k = turned(q, kind, rotary), turned(k, kind, rotary)
        if self.choice.writes:
            q, k = _written(q), _written(k)
        if self.mix is not None:
            mixed = self.mix(join_heads(v, "grid"), told.padding)
            v = split_heads(mixed, "grid", *told.padding.shape, self.G)
        return q, k, v

    def _expanded(self, k: Tensor) -> Tensor:
        """Keys or values, one head for each of the queries'."""
        times = self.H // self.G
        if self.choice.groups == "interleave":
            return k.repeat_interleave(times, dim=1)
        if self.choice.groups == "expand":
            B, G, S, d = k.shape
            return k[:, :, None].expand(B, G, times, S, d).reshape(B, G * times, S, d)
        return k

    # -- attention ---------------------------------------------------------------------------------------------

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, told: Told) -> Tensor:
        k, v = self._expanded(k), self._expanded(v)
        if not self.choice.minus:
            return self._single(q, k, v, told)
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        return self._single(q1, k1, v, told) - self.second * self._single(q2, k2, v, told)

    def _single(self, q: Tensor, k: Tensor, v: Tensor, told: Told) -> Tensor:
        if self.choice.attend == "scores":
            return self._by_scores(q, k, v, told)
        options = {"enable_gqa": True} if self.choice.groups == "enable_gqa" else {}
        if self.choice.attend == "sdpa_causal" and told.visible is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        mask = told.visible if self.choice.attend != "sdpa" else self._biased(told.additive, told)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

    def _bias(self, told: Told) -> Tensor | None:
        biases = [bias for bias in (told.bias, told.content_bias) if bias is not None]
        if self.choice.relative == "added":
            biases.append(self.relative(self._apart(told)).permute(2, 0, 1)[None])
        return sum(biases[1:], start=biases[0]) if biases else None

    def _apart(self, told: Told) -> Tensor:
        """int64 [S, S]: how far a key is behind a query."""
        index = torch.arange(told.padding.shape[1])
        return (index[:, None] - index).clamp(0, DISTANCES - 1)

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

    # -- attention by scores -----------------------------------------------------------------------------------

    def _by_scores(self, q: Tensor, k: Tensor, v: Tensor, told: Told) -> Tensor:
        scores = self._scores(q, k, told)
        if self.choice.cap:
            scores = torch.tanh(scores / 2) * 2
        if self.choice.talking:
            scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        hidden = self._hidden(scores, told)
        weights = self.dropout(self._weights(hidden).to(v.dtype))
        y = self._summed(weights, v)
        if self.choice.twice == "late":
            y = self._summed(weights, y)
        elif self.choice.twice == "early":
            y = self._summed(weights @ weights, v)
        return self._read(weights, hidden, y)

    def _read(self, weights: Tensor, hidden: Tensor, y: Tensor) -> Tensor:
        """Values scaled by something read from the weights."""
        kind = self.choice.read
        if kind == "none":
            return y
        if kind == "largest":
            found = weights.amax(-1, keepdim=True)
        elif kind == "squares":
            found = weights.square().sum(-1, keepdim=True)
        elif kind == "entropy":
            found = -(weights * (weights.abs() + 1e-9).log()).sum(-1, keepdim=True)
        else:
            found = torch.tanh(hidden.logsumexp(-1, keepdim=True))
        return y * found.view(*y.shape[:3], 1).to(y.dtype)

    def _summed(self, weights: Tensor, v: Tensor) -> Tensor:
        kind = self.choice.scores
        if kind == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        if kind == "einsum_late":
            return torch.einsum("bhqk,bkhd->bqhd", weights, v.transpose(1, 2)).transpose(1, 2)
        if kind in ("bmm", "baddbmm"):
            B, H, S, d = v.shape
            return torch.bmm(weights.reshape(B * H, S, S), v.reshape(B * H, S, d)).view(B, H, S, d)
        return weights @ v

    def _scores(self, q: Tensor, k: Tensor, told: Told) -> Tensor:
        """[B, H, S, S], or [B * H, S, S] by `bmm`."""
        kind, scale = self.choice.scores, q.shape[-1] ** -0.5
        bias = self._bias(told)
        if kind in ("bmm", "baddbmm"):
            B, H, S, d = q.shape
            flat_q, flat_k = q.reshape(B * H, S, d), k.reshape(B * H, S, d)
            if kind == "bmm":
                scores = torch.bmm(flat_q * scale, flat_k.transpose(1, 2))
                return scores if bias is None else scores + bias.expand(B, H, -1, S).reshape(B * H, -1, S)
            base = (
                q.new_zeros(B * H, 1, S) if bias is None else bias.expand(B, H, -1, S).reshape(B * H, -1, S)
            )
            return torch.baddbmm(base, flat_q, flat_k.transpose(1, 2), alpha=scale).view(B, H, S, S)
        if kind == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
        elif kind == "einsum_late":
            scores = torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)) * scale
        elif kind == "summed":
            scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) * scale
        elif kind == "distance":
            squares = q.square().sum(-1, keepdim=True) + k.square().sum(-1)[:, :, None]
            scores = (2 * q @ k.mT - squares) * scale
        elif kind == "transposed":
            scores = (k @ q.mT).mT * scale
        else:
            scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        if self.choice.relative == "rows":
            scores = scores + torch.einsum("bhqd,qkd->bhqk", q, self.relative_rows(self._apart(told)))
        return scores if bias is None else scores + bias

    def _hidden(self, scores: Tensor, told: Told) -> Tensor:
        B, S = told.padding.shape

        def fit(mask: Tensor) -> Tensor:
            if scores.dim() == 4:
                return mask
            return mask.expand(B, self.H, -1, S).reshape(B * self.H, -1, S)

        assert told.visible is not None
        hide, least = self.choice.hide, self.program.least
        if self.choice.softmax in ("none", "sigmoid"):
            weights = scores if self.choice.softmax == "none" else torch.sigmoid(scores)
            return torch.where(fit(told.visible), weights, 0.0)
        if self.choice.softmax == "masked_after":
            return (scores - scores.amax(-1, keepdim=True)).exp() * fit(told.visible)
        if hide == "add":
            assert told.additive is not None
            return scores + fit(told.additive)
        if hide == "masked_fill":
            return scores.masked_fill(~fit(told.visible), least)
        if hide == "masked_fill_":
            return (scores * 1.0).masked_fill_(~fit(told.visible), least)
        if hide == "where":
            return torch.where(fit(told.visible), scores, torch.full((), least, dtype=scores.dtype))
        keys = torch.zeros_like(told.keys, dtype=scores.dtype).masked_fill(~told.keys, least)
        return torch.where(self.tril[:S, :S], scores, least) + fit(keys)

    def _weights(self, scores: Tensor) -> Tensor:
        kind = self.choice.softmax
        if kind in ("none", "sigmoid"):
            return scores
        if kind == "masked_after":
            return scores / (scores.sum(-1, keepdim=True) + 1e-300)
        if self.choice.sinks == "joined":
            B, H, S, _ = scores.shape
            joined = torch.cat([scores, self.sinks.view(1, H, 1, 1).expand(B, H, S, 1)], dim=-1)
            return self._normalised(joined)[..., :-1]
        if self.choice.sinks == "denominator":
            largest = scores.amax(-1, keepdim=True)
            shares = (scores - largest).exp()
            sink = (self.sinks.view(1, -1, 1, 1) - largest).exp()
            return shares / (shares.sum(-1, keepdim=True) + sink)
        return self._normalised(scores)

    def _normalised(self, scores: Tensor) -> Tensor:
        if self.choice.softmax == "by_hand":
            shares = (scores - scores.amax(-1, keepdim=True)).exp()
            return shares / shares.sum(-1, keepdim=True)
        if self.choice.softmax == "logsumexp":
            return (scores - scores.logsumexp(-1, keepdim=True)).exp()
        if self.program.float32:
            return F.softmax(scores, dim=-1, dtype=torch.float32)
        return scores.softmax(-1)


def _written(x: Tensor) -> Tensor:
    """The same, written into a new tensor by halves."""
    half = x.shape[-1] // 2
    y = torch.empty_like(x)
    y[..., :half] = x[..., :half]
    y[..., half:] = x[..., half:]
    return y
