"""Norms and MLPs that programs are built from.

Shapes: ... any layout of tokens, D width, F inner width, N tokens, E experts, K experts of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPERTS, CHOSEN = 4, 2


class HandwrittenRMSNorm(nn.Module):
    """As Llama writes it; in float32 where asked to."""

    def __init__(self, width: int, float32: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.float32 = float32

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32) if self.float32 else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class UnitNorm(nn.Module):
    """Every token divided by its length."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale


def norm(kind: str, width: int, float32: bool = False) -> nn.Module:
    if kind == "layer":
        return nn.LayerNorm(width)
    if kind == "rms":
        return HandwrittenRMSNorm(width, float32)
    if kind == "rms_module":
        return nn.RMSNorm(width, eps=1e-6)
    return UnitNorm(width) if kind == "l2" else nn.Identity()


class Gelu(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it."""

    def __init__(self, width: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, outer))
        self.bias = nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(size)


class Addmm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = Conv1D(width, 2 * width), Conv1D(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).square())


class Experts(nn.Module):
    """Several MLPs, of which a router chooses; `kind` says how the tokens get to theirs."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.router = nn.Linear(width, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.empty(EXPERTS, width, 2 * width))
        self.down = nn.Parameter(torch.empty(EXPERTS, 2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [N, D]
        shares = self.router(tokens).softmax(-1)
        if self.kind == "soft_experts":
            inner = torch.einsum("nd,edf->nef", tokens, self.up)
            return torch.einsum("nef,efd,ne->nd", F.silu(inner), self.down, shares).view(x.shape)
        weights, chosen = shares.topk(CHOSEN, dim=-1)  # [N, K]
        weights = weights / weights.sum(-1, keepdim=True)
        compute = {
            "loop_experts": self._looped,
            "where_experts": self._added_up,
            "masked_experts": self._masked,
            "placed_experts": self._placed,
            "counted_experts": self._counted,
            "dense_experts": self._dense,
            "bmm_experts": self._batched,
            "picked_experts": self._picked,
            "sorted_experts": self._sorted,
        }[self.kind]
        return compute(tokens, weights, chosen).view(x.shape)

    def _expert(self, index: int, tokens: Tensor) -> Tensor:
        return F.silu(tokens @ self.up[index]) @ self.down[index]

    def _looped(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Mixtral's way."""
        result = torch.zeros_like(tokens)
        mask = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)  # [E, K, N]
        for index in range(EXPERTS):
            choice, token = torch.where(mask[index])
            computed = self._expert(index, tokens[token]) * weights[token, choice, None]
            result.index_add_(0, token, computed)
        return result

    def _added_up(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Each expert's tokens found among the choices, its results added to their rows."""
        result = torch.zeros_like(tokens)
        for index in range(EXPERTS):
            token, choice = torch.where(chosen == index)
            result[token] += self._expert(index, tokens[token]) * weights[token, choice, None]
        return result

    def _masked(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Each expert's tokens picked by a mask over tokens."""
        result = torch.zeros_like(tokens)
        for index in range(EXPERTS):
            taken = chosen == index
            mask = taken.any(dim=-1)
            share = (weights * taken).sum(-1, keepdim=True)
            result[mask] = result[mask] + self._expert(index, tokens[mask]) * share[mask]
        return result

    def _placed(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """DeepSeek's way in training: a row for each choice of a token, filled by its expert."""
        rows, ids = tokens.repeat_interleave(CHOSEN, dim=0), chosen.view(-1)
        filled = torch.empty_like(rows)
        for index in range(EXPERTS):
            filled[ids == index] = self._expert(index, rows[ids == index])
        return (filled.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)

    def _counted(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Rows sorted by expert and cut where the next expert's begin."""
        ids = chosen.flatten()
        order = ids.argsort()
        counts = F.one_hot(ids, EXPERTS).sum(dim=0).tolist()
        parts = tokens[order // CHOSEN].split(counts)
        computed = torch.cat([self._expert(index, part) for index, part in enumerate(parts)])
        shares = weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, order // CHOSEN, computed * shares)

    def _dense(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Every expert on every token, weighted with zero where it was not chosen."""
        spread = torch.zeros(tokens.shape[0], EXPERTS, dtype=weights.dtype).scatter(1, chosen, weights)
        result = torch.zeros_like(tokens)
        for index in range(EXPERTS):
            result += self._expert(index, tokens) * spread[:, index, None]
        return result

    def _batched(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Llama 4's way: all tokens repeated for each expert, one batched product."""
        spread = torch.zeros(tokens.shape[0], EXPERTS, dtype=weights.dtype).scatter_(1, chosen, weights)
        repeated = tokens.repeat(EXPERTS, 1).view(EXPERTS, -1, tokens.shape[-1])
        computed = torch.bmm(F.silu(torch.bmm(repeated, self.up)), self.down)
        return (computed * spread.transpose(0, 1).unsqueeze(-1)).sum(0)

    def _sorted(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """(token, choice) rows sorted by expert, computed, and put back."""
        ids = chosen.reshape(-1)
        order = torch.argsort(ids)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        rows = tokens[order // CHOSEN]
        inner = F.silu(torch.bmm(rows[:, None], self.up[ids[order]]))
        computed = torch.bmm(inner, self.down[ids[order]])[:, 0]
        return (computed[inverse].view(*chosen.shape, -1) * weights[..., None]).sum(1)

    def _picked(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The weights of each token's experts looked up."""
        up, down = self.up[chosen], self.down[chosen]  # [N, K, D, F], [N, K, F, D]
        inner = F.silu(torch.matmul(tokens[:, None, None, :], up))
        return (torch.matmul(inner, down).squeeze(-2) * weights[..., None]).sum(1)


class Pointwise(nn.Module):
    """A convolution over single positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.dim() == 3 else x[None]
        return self.down(F.gelu(self.up(rows.mT))).mT.reshape(x.shape)


def mlp(kind: str, width: int) -> nn.Module:
    plain = {"gelu": Gelu, "swiglu": SwiGLU, "addmm": Addmm, "pointwise": Pointwise}
    if kind == "none":
        return nn.Identity()
    return plain[kind](width) if kind in plain else Experts(kind, width)
