"""One decoder layer of a program.

Shapes: ... any layout of tokens, B samples, S positions, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from attention import Attention
from blocks import mlp, norm
from cross import Cross
from mixing import Mix, Odd
from program import Layer, Program
from told import Pair, Told, from_grid, to_grid
from torch import Tensor, nn


class Block(nn.Module):
    """States in, states out: a tensor [..., D], one [..., 2, D] of two streams, or two tensors."""

    def __init__(self, choice: Layer, program: Program) -> None:
        super().__init__()
        self.choice, self.program = choice, program
        D = program.width
        self.norms = nn.ModuleDict(
            {
                name: norm(choice.norm, D, program.float32)
                for name in ("before", "after", "cross", "mlp", "mlp_after")
            }
        )
        self.attention = Attention(choice, program)
        self.cross = Cross(choice.cross, program) if choice.cross != "none" else None
        self.mlp = mlp(choice.mlp, D)
        self.dropout = nn.Dropout(0.0) if choice.dropout else nn.Identity()
        self.scale, self.keep = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.mix = Mix(choice.mix, D) if choice.mix_at != "values" else None
        self.odd = Odd(choice.odd, D)
        self.per_layer_gate, self.per_layer_out = nn.Linear(D, D), nn.Linear(D, D)
        self.reads, self.writes = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        self.streams = nn.Parameter(torch.eye(2))

    def forward(self, state: Any, told: Told, lent: Pair | None) -> tuple[Any, Pair | None]:
        if self.program.streams == "stacked":
            y, kept = self._computed((self.reads[:, None] * state).sum(-2), told, lent)
            return self.streams @ state + self.writes[:, None] * y[..., None, :], kept
        if self.program.streams == "two":
            a, b = state
            y, kept = self._computed(self.reads[0] * a + self.reads[1] * b, told, lent)
            m = self.streams
            return (m[0, 0] * a + m[0, 1] * b + y, m[1, 0] * a + m[1, 1] * b + self.writes[0] * y), kept
        return self._computed(state, told, lent)

    def _computed(self, x: Tensor, told: Told, lent: Pair | None) -> tuple[Tensor, Pair | None]:
        if self.program.per_layer == "added":
            x = x + told.extra
        x = self._mixed("input", x, told)
        place, norms = self.choice.place, self.norms
        if place == "post":
            y, kept = self._attend(x, told, lent)
            x = self._crossed(norms["before"](self._add(x, y)), told)
            if self.choice.mlp != "none":
                x = norms["mlp"](self._add(x, self._feed(x, told)))
        elif place == "parallel":
            inner = norms["before"](x)
            y, kept = self._attend(inner, told, lent)
            x = self._crossed(x, told)
            x = self._add(x, y if self.choice.mlp == "none" else y + self._feed(inner, told))
        else:
            around = place == "sandwich"
            y, kept = self._attend(norms["before"](x), told, lent)
            x = self._crossed(self._add(x, norms["after"](y) if around else y), told)
            if self.choice.mlp != "none":
                y = self._feed(norms["mlp"](x), told)
                x = self._add(x, norms["mlp_after"](y) if around else y)
        if self.program.per_layer == "gated":
            x = x + self.per_layer_out(F.gelu(self.per_layer_gate(x)) * told.extra)
        return self._odd("residual", x, told), kept

    def _attend(self, x: Tensor, told: Told, lent: Pair | None) -> tuple[Tensor, Pair | None]:
        x = self._odd("attention", x, told)
        if self.choice.mix != "none" and self.choice.mix_at == "attention":
            return self._mixed("attention", x, told), None
        y, kept = self.attention(x, told, lent)
        if self.choice.mix != "none" and self.choice.mix_at == "beside":
            y = y + self._mixed("beside", x, told)
        return self.dropout(y), kept

    def _crossed(self, x: Tensor, told: Told) -> Tensor:
        return x if self.cross is None else x + self.cross(self.norms["cross"](x), told)

    def _feed(self, x: Tensor, told: Told) -> Tensor:
        return self.dropout(self.mlp(self._odd("mlp", self._mixed("mlp", x, told), told)))

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual connection."""
        kind = self.choice.residual
        if kind == "scaled":
            return x + 0.5 * y
        if kind == "learned":
            return x + self.scale * y
        if kind == "mixed":
            return self.keep * x + self.scale * y
        if kind == "in_place":
            y = y * 1.0  # a result that no backward pass needs
            y.add_(x)
            return y
        return x + y

    def _mixed(self, place: str, x: Tensor, told: Told) -> Tensor:
        if self.choice.mix == "none" or self.choice.mix_at != place or self.mix is None:
            return x
        grid = to_grid(x, self.program.layout, *told.padding.shape)
        return from_grid(self.mix(grid, told.padding), self.program.layout)

    def _odd(self, place: str, x: Tensor, told: Told) -> Tensor:
        if self.choice.odd == "none" or self.choice.odd_at != place:
            return x
        grid = to_grid(x, self.program.layout, *told.padding.shape)
        return from_grid(self.odd(grid, told.padding, told.ids), self.program.layout)
