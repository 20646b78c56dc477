"""What modules do to tokens: what must be proven, with which axes, and what must be refused, by which words.

Every entry is a function of a module with parameters and of states x [B, S, D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, H, V = 8, 2, 23
Entry = Callable[["Weights", Tensor], Tensor]


class Weights(nn.Module):
    """States from ids, every entry applied to them, and the parameters that entries use."""

    def __init__(self, entries: list[Entry]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.weight, self.bias = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D))
        self.table = nn.Parameter(torch.randn(64, D))
        self.conv = nn.Conv1d(D, D, 3, padding=2, groups=D)
        self.batch_norm = nn.BatchNorm1d(D)
        self.entries = entries

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embedding(input_ids)
        return tuple(entry(self, x) for entry in self.entries)


def size(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


def written_in_parts(w: Weights, x: Tensor) -> Tensor:
    y = x.new_empty(*x.shape)
    y[..., : D // 2] = x[..., D // 2 :]
    y[..., D // 2 :] = -x[..., : D // 2]
    return y


def scattered_features(w: Weights, x: Tensor) -> Tensor:
    values, places = x.topk(2, -1)
    return torch.zeros_like(x).scatter_(-1, places, values.softmax(-1))


def dispatched(w: Weights, x: Tensor) -> Tensor:
    """Rows sorted by expert, computed, and put back."""
    rows = x.view(-1, D)
    ids = rows[:, :2].argmax(-1, keepdim=True).expand(-1, 2).reshape(-1)
    order = torch.argsort(ids)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(ids.shape[0], device=ids.device)
    computed = F.gelu(rows[order // 2] @ w.weight)
    return computed[inverse].view(*size(x), 2, D).sum(2)


def dispatched_without_absent_experts(w: Weights, x: Tensor) -> Tensor:
    """Rows whose expert lives elsewhere, last in the order, are zeroed; ids are clamped in place for the biases."""
    rows = x.view(-1, D)
    ids, order = torch.sort(rows.argmax(-1, keepdim=True).expand(-1, 2).reshape(-1))
    absent = (ids >= D - 2).unsqueeze(-1)
    ids.clamp_(max=D - 3)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(ids.shape[0], device=ids.device)
    computed = (rows[order // 2] @ w.weight + w.table[ids]).masked_fill(absent, 0.0)
    return computed[inverse].view(*size(x), 2, D).sum(2)


ROWS: dict[str, tuple[Entry, str]] = {
    "linear": (lambda w, x: F.linear(x, w.weight, w.bias), "B, S, 8"),
    "convolution over single positions": (
        lambda w, x: F.conv1d(x.mT, w.weight[..., None], w.bias),
        "B, 8, S",
    ),
    "matmul": (lambda w, x: x @ w.weight, "B, S, 8"),
    "norm": (lambda w, x: F.layer_norm(x, (D,), w.bias), "B, S, 8"),
    "flattened": (lambda w, x: x.view(-1, D) @ w.weight, "B*S, 8"),
    "flattened and back": (lambda w, x: (x.view(-1, D) @ w.weight).view(x.shape), "B, S, 8"),
    "sequence first": (lambda w, x: x.transpose(0, 1) * w.bias, "S, B, 8"),
    "sequence first, flattened": (lambda w, x: x.transpose(0, 1).reshape(-1, D), "S*B, 8"),
    "sequence first, and back": (
        lambda w, x: x.transpose(0, 1).reshape(-1, D).view(x.shape[1], x.shape[0], D).transpose(0, 1),
        "B, S, 8",
    ),
    "heads": (lambda w, x: x.view(*size(x), H, -1).transpose(1, 2), "B, 2, S, 4"),
    "heads in the batch": (
        lambda w, x: x.view(*size(x), H, -1).transpose(1, 2).reshape(-1, x.shape[1], D // H),
        "B*2, S, 4",
    ),
    "rows for each of three experts": (
        lambda w, x: x.view(-1, D).repeat(3, 1) * x[..., :3].reshape(-1, 3).transpose(0, 1).reshape(-1, 1),
        "3*B*S, 8",
    ),
    "repeated key heads": (
        lambda w, x: x.view(*size(x), H, -1).transpose(1, 2).repeat_interleave(3, 1),
        "B, 6, S, 4",
    ),
    "feature softmax": (lambda w, x: x.softmax(-1), "B, S, 8"),
    "feature cumsum": (lambda w, x: x.cumsum(-1), "B, S, 8"),
    "feature flip": (lambda w, x: x.flip(-1), "B, S, 8"),
    "feature sort": (lambda w, x: x.sort(-1)[0], "B, S, 8"),
    "feature mean": (lambda w, x: x.mean(-1, keepdim=True), "B, S, 1"),
    "feature concatenation": (lambda w, x: torch.cat([x, x * 2], -1), "B, S, 16"),
    "joined to nothing": (lambda w, x: torch.cat([x.new_empty(0), x], 1), "B, S, 8"),
    "noise": (lambda w, x: x + torch.empty_like(x).exponential_().log(), "B, S, 8"),
    "one hot": (lambda w, x: F.one_hot(x.argmax(-1), D), "B, S, 8"),
    "features split": (lambda w, x: x.chunk(2, -1)[1], "B, S, 4"),
    "in-place, part by part": (written_in_parts, "B, S, 8"),
    "in-place scatter": (scattered_features, "B, S, 8"),
    "half tokens": (lambda w, x: x.view(x.shape[0], -1, D // 2), "B, S*2, 4"),
    "per position": (lambda w, x: x * w.table[: x.shape[1]], "B, S, 8"),
    "per position, shifted table": (lambda w, x: x * w.table[2 : x.shape[1] + 2], "B, S, 8"),
    "positions": (lambda w, x: x * torch.arange(x.shape[1])[:, None], "B, S, 8"),
    "a row for all positions": (lambda w, x: x + w.bias.expand(x.shape[1], D), "B, S, 8"),
    "whole slice": (lambda w, x: x[:, : x.shape[1]], "B, S, 8"),
    "expert dispatch": (dispatched, "B, S, 8"),
    "expert dispatch without absent experts": (dispatched_without_absent_experts, "B, S, 8"),
    "attention over heads": (lambda w, x: heads_attention(x), "B, S, 2, 4"),
    "embedded row numbers": (
        lambda w, x: x * F.embedding(torch.arange(x.shape[0] * x.shape[1]), w.table).view(x.shape),
        "B, S, 8",
    ),
    "sum over all tokens": (lambda w, x: x.sum((0, 1)), "8"),
}


def heads_attention(x: Tensor) -> Tensor:
    y = x.view(*size(x), H, -1)
    return F.scaled_dot_product_attention(y, y, y)


PAIRS: dict[str, tuple[Entry, str]] = {
    "scores": (lambda w, x: x @ x.mT, "B, S, S"),
    "softmax over keys": (lambda w, x: (x @ x.mT).softmax(-1), "B, S, S"),
    "sum over keys": (lambda w, x: (x @ x.mT).exp().sum(-1), "B, S"),
    "log of a sum over keys": (lambda w, x: (x @ x.mT).logsumexp(-1, keepdim=True), "B, S, 1"),
    "weights times values": (lambda w, x: (x @ x.mT).softmax(-1) @ x, "B, S, 8"),
    "linear over heads of scores": (
        lambda w, x: F.linear(
            (x.view(*size(x), H, -1).transpose(1, 2) @ x.view(*size(x), H, -1).permute(0, 2, 3, 1)).permute(
                0, 2, 3, 1
            ),
            w.weight[:, :H],
        ),
        "B, S, S, 8",
    ),
    "einsum scores": (lambda w, x: torch.einsum("bqd,bkd->bqk", x, x), "B, S, S"),
    "distances": (lambda w, x: (x[:, :, None] - x[:, None]).pow(2).sum(-1), "B, S, S"),
    "three-dimensional attention": (lambda w, x: F.scaled_dot_product_attention(x, x, x), "B, S, 8"),
}


def boolean_rows(w: Weights, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0.0
    return y


def pooled(w: Weights, x: Tensor) -> Tensor:
    return x.mean((0, 1))


REFUSED: dict[str, tuple[Entry, str, str]] = {
    "convolution": (lambda w, x: w.conv(x.transpose(1, 2)), "mixes-tokens", "aten.conv1d"),
    "stretched convolution": (
        lambda w, x: F.conv1d(x.mT, w.weight[..., None], stride=2),
        "mixes-tokens",
        "aten.conv1d",
    ),
    "einsum with a table over pairs": (
        lambda w, x: torch.einsum("bqd,qkd->bqk", x, w.table[: x.shape[1], None] * w.table[: x.shape[1]]),
        "einsum",
        "all samples share",
    ),
    "cumulative sum": (lambda w, x: x.cumsum(1), "mixes-tokens", "aten.cumsum"),
    "cumulative product": (lambda w, x: x.cumprod(1), "mixes-tokens", "aten.cumprod"),
    "flip": (lambda w, x: x.flip(1), "mixes-tokens", "aten.flip"),
    "roll": (lambda w, x: x.roll(1, 1), "mixes-tokens", "aten.roll"),
    "roll over everything": (lambda w, x: x.roll(1), "mixes-tokens", "aten.roll"),
    "token shift": (lambda w, x: F.pad(x, (0, 0, 1, -1)), "cuts-tokens", "pad"),
    "mean over positions": (lambda w, x: x + x.mean(1, keepdim=True), "mixes-tokens", "aten.mean"),
    "maximum over positions": (lambda w, x: x - x.max(1, keepdim=True)[0], "mixes-tokens", "aten.max"),
    "norm over positions": (lambda w, x: F.normalize(x, dim=1), "mixes-tokens", "norm"),
    "mean over the batch": (lambda w, x: x - x.mean(0), "mixes-tokens", "aten.mean"),
    "batch norm": (lambda w, x: w.batch_norm(x.view(-1, D)), "unknown-operator", "batch_norm"),
    "softmax over positions": (lambda w, x: x.softmax(1), "mixes-tokens", "aten.softmax"),
    "softmax over samples": (lambda w, x: x.softmax(0), "mixes-tokens", "aten.softmax"),
    "picked by index": (lambda w, x: x[:, [0, 2]], "mixes-tokens", "aten.index"),
    "picked rows": (lambda w, x: x.view(-1, D)[torch.tensor([1, 0])], "mixes-tokens", "aten.index"),
    "last position": (lambda w, x: x[:, -1], "cuts-tokens", "aten.select"),
    "first positions": (lambda w, x: x * x[:, :1], "cuts-tokens", "aten.slice"),
    "neighbours": (lambda w, x: x[:, 1:] - x[:, :-1], "cuts-tokens", "aten.sub"),
    "gather along positions": (
        lambda w, x: x.gather(1, (x.shape[1] - 1 - torch.arange(x.shape[1]))[None, :, None].expand(x.shape)),
        "mixes-tokens",
        "aten.gather",
    ),
    "concatenation": (lambda w, x: torch.cat([x, x], 1), "joins-tokens", "aten.cat"),
    "repetition": (lambda w, x: x.repeat(1, x.shape[1], 1), "cuts-tokens", "aten.repeat"),
    "unfold": (lambda w, x: x.unfold(1, 2, 1), "unknown-operator", "aten.unfold"),
    "sort": (lambda w, x: x.sort(1)[0], "mixes-tokens", "aten.sort"),
    "largest": (lambda w, x: x.topk(2, 1)[0], "mixes-tokens", "aten.topk"),
    "write to a position": (boolean_rows, "cuts-tokens", "aten.select"),
    "regrouping": (lambda w, x: x.transpose(1, 2).reshape(x.shape), "view", "aten."),
    "regrouping samples": (lambda w, x: x.transpose(0, 1).reshape(x.shape), "view", "aten."),
    "position-wise matrix": (
        lambda w, x: F.linear(x.transpose(1, 2), w.table[: x.shape[1], :1].expand(-1, x.shape[1])),
        "mixes-tokens",
        "aten.linear",
    ),
    "cross-sample product": (
        lambda w, x: x.transpose(0, 1) @ x.permute(1, 2, 0),
        "mixes-tokens",
        "aten.matmul",
    ),
    "product of all tokens": (lambda w, x: x.view(-1, D) @ x.view(-1, D).T, "mixes-tokens", "aten.m"),
    "cross-sample attention": (
        lambda w, x: cross_sample(x),
        "attention",
        "aten.scaled_dot_product_attention",
    ),
    "attention over all samples' tokens": (
        lambda w, x: flat_attention(x),
        "attention",
        "aten.scaled_dot_product_attention",
    ),
    "mean over keys": (lambda w, x: (x @ x.mT).mean(-1), "mixes-tokens", "aten.mean"),
    "maximum over keys": (lambda w, x: (x @ x.mT).max(-1)[0], "mixes-tokens", "aten.max"),
    "deviation over keys": (lambda w, x: (x @ x.mT).std(-1), "mixes-tokens", "aten.std"),
    "cumulative sum over keys": (lambda w, x: (x @ x.mT).cumsum(-1), "mixes-tokens", "aten.cumsum"),
    "a column for all keys": (lambda w, x: (x @ x.mT)[..., 0], "cuts-tokens", "aten.select"),
    "diagonal of pairs": (lambda w, x: torch.einsum("bqq->bq", x @ x.mT), "", "aten."),
    "triangle of pairs": (lambda w, x: (x @ x.mT).tril(), "unknown-operator", "aten.tril"),
    "key axis cut out of features": (
        lambda w, x: F.linear(x, w.table)[..., : x.shape[1]],
        "cuts-tokens",
        "aten.slice",
    ),
    "key axis padded onto features": (
        lambda w, x: F.pad(x, (0, x.shape[1] - D)),
        "cuts-tokens",
        "aten.",
    ),
    "pooled, added": (lambda w, x: x + pooled(w, x), "mixes-tokens", "aten.add"),
    "pooled, multiplied and added": (lambda w, x: x + pooled(w, x) @ w.weight, "mixes-tokens", "aten."),
    "pooled as a bias": (lambda w, x: F.linear(x, w.weight, pooled(w, x)), "mixes-tokens", "aten.linear"),
    "pooled as a weight": (lambda w, x: F.linear(x, w.weight * x.mean()), "mixes-tokens", "aten.linear"),
    "pooled as a norm's weight": (
        lambda w, x: F.layer_norm(x, (D,), pooled(w, x)),
        "mixes-tokens",
        "aten.layer_norm",
    ),
    "pooled as a table": (
        lambda w, x: F.embedding(x.argmax(-1), w.table * x.mean()),
        "mixes-tokens",
        "aten.embedding",
    ),
    "pooled, expanded": (lambda w, x: x.mean((0, 1)).expand(x.shape), "mixes-tokens", "aten.expand"),
    "pooled, repeated": (lambda w, x: x * pooled(w, x).repeat(*size(x), 1), "mixes-tokens", "aten."),
}


def cross_sample(x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    return F.scaled_dot_product_attention(y, y, y)


def flat_attention(x: Tensor) -> Tensor:
    y = x.view(1, -1, D)
    return F.scaled_dot_product_attention(y, y, y)
