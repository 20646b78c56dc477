"""Attention written as scores of pairs, what hides them, what makes weights of them, and a sum.

Shapes: B samples, S positions, H heads, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mixing import LONGEST
from program import Layer, Program
from told import Told
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


def distances(told: Told) -> Tensor:
    """int64 [S, S]: how far a key is behind a query."""
    index = torch.arange(told.padding.shape[1])
    return (index[:, None] - index).clamp(0, DISTANCES - 1)


class ByScores(nn.Module):
    """q, k and v [B, H, S, d] to what the queries found, [B, H, S, d]; keys may have one head for all."""

    def __init__(self, choice: Layer, program: Program) -> None:
        super().__init__()
        self.choice, self.program, self.H = choice, program, program.heads
        d = program.width // program.heads
        self.sinks = nn.Parameter(torch.zeros(self.H))
        self.relative_rows = nn.Embedding(DISTANCES, d // (2 if choice.minus else 1))
        self.talk = nn.Linear(self.H, self.H)
        self.dropout = nn.Dropout(0.0)
        index = torch.arange(LONGEST)
        square = seen_by_index(choice.span, index[:, None], index, index <= index[:, None])
        self.register_buffer("tril", square)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, told: Told, bias: Tensor | None) -> Tensor:
        scores = self._scores(q, k, told, bias)
        if self.choice.cap:
            scores = torch.tanh(scores / 2) * 2
        if self.choice.talking:
            scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        hidden = self._hidden(self._tempered(scores, told), told)
        weights = self.dropout(self._weights(hidden).to(v.dtype))
        y = self._summed(weights, v)
        if self.choice.twice == "late":
            y = self._summed(weights, y)
        elif self.choice.twice == "early":
            y = self._summed(weights @ weights, v)
        return self._read(weights, hidden, y)

    def _tempered(self, scores: Tensor, told: Told) -> Tensor:
        kind, (B, S) = self.choice.temper, told.padding.shape
        if kind == "none":
            return scores
        four = scores.view(B, self.H, S, S)
        if kind == "head":
            four = four * self.sinks.exp().view(-1, 1, 1)
        elif kind == "sample":
            four = four / told.padding.sum(1).to(scores.dtype).view(-1, 1, 1, 1).sqrt()
        elif kind == "position":
            four = four * torch.arange(1, S + 1).to(scores.dtype).log1p()[:, None]
        else:
            four = four * torch.log1p(torch.tensor(float(S), dtype=scores.dtype))
        return four.view(scores.shape)

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

    def _scores(self, q: Tensor, k: Tensor, told: Told, bias: Tensor | None) -> Tensor:
        """[B, H, S, S], or [B * H, S, S] by `bmm`."""
        kind, scale = self.choice.scores, q.shape[-1] ** -0.5
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
            scores = scores + torch.einsum("bhqd,qkd->bhqk", q, self.relative_rows(distances(told)))
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
            sinks = self.sinks.view(1, -1, 1, 1)
            largest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
            shares, sink = (scores - largest).exp(), (sinks - largest).exp()
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
