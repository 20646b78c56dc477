"""What happens to tokens outside attention: to each by itself, or across positions, where no gated layer may do it.

Shapes: B samples, S positions, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST = 16  # positions that tables have rows for


class Mix(nn.Module):
    """[B, S, D] to [B, S, D] by one of the functions below, which take their weights from here."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.taps = nn.Parameter(torch.randn(width, 1, 3))
        self.weight = nn.Parameter(torch.randn(width, width))
        self.scorer = nn.Linear(width, 3)
        self.table = nn.Parameter(torch.randn(LONGEST, LONGEST))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return MIXES[self.kind](self, x, padding)


def _convolution(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.mT, (2, 0)), m.taps, groups=x.shape[-1]).mT


def _shift_by_padding(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return x + F.pad(x, (0, 0, 1, 0))[:, :-1] @ m.weight


def _shift_by_joining(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1) @ m.weight


def _shift_by_index(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    before = (torch.arange(x.shape[1]) - 1).clamp(min=0)
    return x + x[:, before] @ m.weight


def _differences(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return F.pad(x[:, 1:] - x[:, :-1], (0, 0, 1, 0))


def _running_mean(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def _linear_attention(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    q, k = F.elu(x @ m.weight) + 1, F.elu(x @ m.weight.mT) + 1
    states = (k[..., None] * x[..., None, :]).cumsum(1)
    return (q[..., None] * states).sum(-2) / (q * k.cumsum(1)).sum(-1, keepdim=True)


def _less_mean(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def _less_real_mean(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    weights = padding[..., None].to(x.dtype)
    return x - (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def _topk(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    scores = m.scorer(x)[..., 0]
    least = scores.topk(x.shape[1] // 2, dim=1).values[:, -1:]
    return torch.where((scores >= least)[..., None], x * scores[..., None], 0.0 * x)


def _batch_statistics(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    return F.batch_norm(flat, None, None, training=True).view(x.shape)


def _sequence_norm(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return x / (x.norm(dim=1, keepdim=True) + 1)


def _layer_norm_over_sequence(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return F.layer_norm(x.mT, (x.shape[1],)).mT


def _times_log_length(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return x * torch.log(torch.tensor(float(x.shape[1]), dtype=x.dtype))


def _learned_table(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    S = x.shape[1]
    return m.table[:S, :S].tril() @ x / S


def _pooling(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    weights = m.scorer(x)[..., :1].softmax(1)
    return x + (weights * x).sum(1, keepdim=True)


def _fourier(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return torch.fft.fft(x, dim=1).real


def _maximum_pool(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return F.max_pool1d(F.pad(x.mT, (1, 0)), 2, 1).mT


def _scan(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    decay = torch.sigmoid(m.scorer(x)[..., :1])
    logs = decay.log().cumsum(1)
    return logs.exp() * (x / logs.exp()).cumsum(1)


def _write_first(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = x.sum(1)
    return y


def _gram(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return x @ (x.mT @ x) / x.shape[1]


def _router_capacity(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    expert = F.one_hot(m.scorer(x.flatten(0, 1)).argmax(-1), 3)  # [B*S, E]
    place = (expert.cumsum(0) * expert).sum(-1)
    return x * (place < 4).view(x.shape[:2])[..., None]


def _segment_sum(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    group = m.scorer(x.flatten(0, 1)).argmax(-1)
    sums = torch.zeros(3, x.shape[-1], dtype=x.dtype).index_add(0, group, x.flatten(0, 1))
    return x + sums[group].view(x.shape)


def _over_number(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    return x / (1 + x.detach().square().mean().item())


def _uniform(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    """Attention without scores."""
    S = x.shape[1]
    seen = torch.ones(S, S, dtype=x.dtype).tril() * padding[:, None, :].to(x.dtype)
    return (seen / seen.sum(-1, keepdim=True).clamp(min=1)) @ (x @ m.weight)


def _features_as_long(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    """Every token by itself, but by as many features as there are positions."""
    return x + (x[..., None] * m.table[: x.shape[1], 0]).sum(-1) / 4


def _query_softmax(m: Any, x: Tensor, padding: Tensor) -> Tensor:
    """Attention normalised over the wrong axis."""
    scores = x @ m.weight @ x.mT
    visible = torch.ones_like(scores, dtype=torch.bool).tril()
    return scores.masked_fill(~visible, -1e4).softmax(-2) @ x


Function = Callable[[Any, Tensor, Tensor], Tensor]
MIXES: dict[str, Function] = {
    "convolution": _convolution,
    "shift_by_padding": _shift_by_padding,
    "shift_by_joining": _shift_by_joining,
    "shift_by_index": _shift_by_index,
    "differences": _differences,
    "running_mean": _running_mean,
    "linear_attention": _linear_attention,
    "less_mean": _less_mean,
    "less_real_mean": _less_real_mean,
    "roll": lambda m, x, p: x + x.roll(1, 1) @ m.weight,
    "sort": lambda m, x, p: x.sort(1).values,
    "topk": _topk,
    "batch_statistics": _batch_statistics,
    "sequence_norm": _sequence_norm,
    "sequence_softmax": lambda m, x, p: x * x.softmax(1),
    "layer_norm_over_sequence": _layer_norm_over_sequence,
    "times_length": lambda m, x, p: x * x.shape[1] * 0.1,
    "times_log_length": _times_log_length,
    "plus_last": lambda m, x, p: x + x[:, -1:] @ m.weight,
    "plus_first": lambda m, x, p: x + x[:, 0].unsqueeze(1) @ m.weight,
    "plus_largest": lambda m, x, p: x + x.amax(1, keepdim=True),
    "flip": lambda m, x, p: x + x.flip(1) @ m.weight,
    "learned_table": _learned_table,
    "pooling": _pooling,
    "fourier": _fourier,
    "maximum_pool": _maximum_pool,
    "scan": _scan,
    "write_first": _write_first,
    "gram": _gram,
    "next_in_batch": lambda m, x, p: x + x.roll(1, 0),
    "router_capacity": _router_capacity,
    "segment_sum": _segment_sum,
    "less_sample_mean": lambda m, x, p: x - x.mean(0, keepdim=True),
    "over_total": lambda m, x, p: x / (1 + x.square().sum() / x.numel()),
    "over_number": _over_number,
    "uniform": _uniform,
    "features_as_long": _features_as_long,
    "query_softmax": _query_softmax,
}


class Odd(nn.Module):
    """[B, S, D] to [B, S, D]: something unusual that every token undergoes by itself."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(width))
        self.table = nn.Parameter(torch.randn(LONGEST, width))

    def forward(self, x: Tensor, padding: Tensor, ids: Tensor) -> Tensor:
        S = x.shape[1]
        index = torch.arange(S)
        if self.kind == "by_position":
            return x * (1 + index.to(x.dtype)[:, None] / 4)
        if self.kind == "by_padding":
            return x * padding[..., None].to(x.dtype)
        if self.kind == "by_id":
            return torch.where((ids == 5)[..., None], self.weight, x)
        if self.kind == "by_sample":
            return x / padding.sum(1).to(x.dtype).sqrt()[:, None, None]
        if self.kind == "from_position":
            return x + self.table[:S] * (index % 2 == 0)[:, None]
        if self.kind == "set_rows":
            y = x.clone()
            y[ids == 5] = self.weight
            return y
        if self.kind == "by_count":
            return x * padding.cumsum(1)[..., None].to(x.dtype).log1p()
        if self.kind == "zeroed":
            return torch.where(padding[..., None].bool(), x, torch.zeros((), dtype=x.dtype))
        assert self.kind == "by_row_number"
        rows = x.flatten(0, 1)
        return rows[torch.arange(rows.shape[0])].view(x.shape)
