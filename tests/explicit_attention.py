"""Attention by an explicit softmax over all N x N pairs of packed rows: what the operator is tested against.

Shapes: N packed rows, S positions, Hq query heads, Hk key heads, d width of a query and key, dv of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regate_fx.ops.attention import varlen_attention

S = 11
SCALE = 0.4


@dataclass(frozen=True)
class Case:
    """One attention: `lengths` active rows of each sample; `mask` is None, "bool" or "float"; `sinks`: with some."""

    lengths: tuple[int, ...] = (4, 0, 1, S, 7)
    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (8, 8)
    causal: bool = True
    window: int = 0
    mask: str | None = None
    mask_shape: tuple[bool, bool] = (False, False)
    softcap: float = 0.0
    sinks: bool = False


class Batch:
    """Random operands of a case, the values representable in `dtype`."""

    def __init__(self, case: Case, dtype: torch.dtype, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        random = torch.rand(len(case.lengths), S, generator=generator)
        ranks = random.argsort(1).argsort(1)
        active = ranks < torch.tensor(case.lengths)[:, None]
        self.sample, self.positions = active.nonzero(as_tuple=True)
        self.cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)
        (Hq, Hk), (d, dv), N = case.heads, case.widths, len(self.positions)
        self.qkv = [
            torch.randn(1, N, H, w, generator=generator).to(dtype).transpose(1, 2)
            for H, w in ((Hq, d), (Hk, d), (Hk, dv))
        ]
        self.grad_out = torch.randn(1, Hq, N, dv, generator=generator).to(dtype)
        self.mask = None
        if case.mask is not None:
            per_sample, per_head = case.mask_shape
            shape = (len(case.lengths) if per_sample else 1, Hq if per_head else 1, S, S)
            self.mask = torch.randn(shape, generator=generator).to(dtype)
            if case.mask == "bool":
                self.mask = self.mask > -0.3
        self.sinks = torch.randn(Hq, generator=generator).to(dtype) if case.sinks else None

    def to(self, device: str) -> Batch:
        for name in ("grad_out", "cu_seqlens", "positions", "mask", "sinks"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))
        self.qkv = [t.to(device) for t in self.qkv]
        return self

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """q, k, v, and the sinks of a case that has some."""
        given = self.qkv if self.sinks is None else [*self.qkv, self.sinks]
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in given]

    def arguments(self, leaves: list[Tensor], dropout_p: float = 0.0, seed: int | None = None) -> tuple:
        """All that the operator takes."""
        case = self.case
        q, k, v, *sinks = leaves
        seed_tensor = None if seed is None else torch.tensor([seed])
        return (
            *(q, k, v, self.cu_seqlens, max(case.lengths), self.positions, self.mask),
            *(case.causal, case.window, SCALE, dropout_p, seed_tensor, "auto", case.softcap),
            sinks[0] if sinks else None,
        )

    def op(self, dtype: torch.dtype | None = None, **dropout: float) -> list[Tensor]:
        """Return out and the gradients of the leaves."""
        leaves = self.leaves(dtype)
        out, _ = varlen_attention(*self.arguments(leaves, **dropout))
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad_out.to(out.dtype))]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores [Hq, N, N] of all pairs, -inf where the query does not see the key."""
        groups = q.shape[1] // k.shape[1]
        scores = torch.einsum("hid,hjd->hij", q[0], k[0].repeat_interleave(groups, 0)) * SCALE
        if self.case.softcap:
            scores = self.case.softcap * torch.tanh(scores / self.case.softcap)
        at, case = self.positions, self.case
        visible = (self.sample[:, None] == self.sample).expand_as(scores).clone()
        if case.causal:
            visible &= at <= at[:, None]
        if case.window:
            visible &= at > at[:, None] - case.window
        if self.mask is not None:
            samples = self.sample[:, None].clamp(max=self.mask.shape[0] - 1)
            of_pairs = self.mask[samples, :, at[:, None], at].permute(2, 0, 1)
            if case.mask == "bool":
                visible &= of_pairs
            else:
                scores = scores + of_pairs.to(scores.dtype)
        return scores.masked_fill(~visible, float("-inf"))

    def weights(self, q: Tensor, k: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Return [Hq, N, N], zeros where the query does not see the key."""
        scores = self.scores(q, k)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
        return scores.softmax(-1).nan_to_num(0.0)[..., : q.shape[2]]

    def explicit(self, dtype: torch.dtype, factors: Tensor | None = None) -> list[Tensor]:
        """What `op` returns, by plain operators in `dtype`; `factors` multiply the weights [Hq, N, N]."""
        q, k, v, *sinks = leaves = self.leaves(dtype)
        weights = self.weights(q, k, *sinks)
        if factors is not None:
            weights = weights * factors
        out = torch.einsum("hij,hjd->hid", weights, v[0].repeat_interleave(q.shape[1] // v.shape[1], 0))[None]
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad_out.to(dtype))]


def assert_as_good_as(actual: list[Tensor], plain: list[Tensor], golden: list[Tensor]) -> None:
    """The error against the float64 golden is at most twice that of the plain computation in its dtype.

    Errors are norms over a whole tensor: the worst single element of a few hundred is mostly luck. The floor,
    one rounding of the largest tensor, is for gradients whose terms cancel to 0.
    """
    floor = torch.finfo(actual[0].dtype).eps * max(exact.norm() for exact in golden)
    for ours, theirs, exact in zip(actual, plain, golden, strict=True):
        assert ours.shape == exact.shape
        assert (ours.double() - exact).norm() <= 2 * (theirs.double() - exact).norm() + floor
