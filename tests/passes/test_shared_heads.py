"""Copies of key heads are seen through where each stands beside its own, and only there.

Shapes: B samples, S positions, K key heads, G query heads to each, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captured import calls, operators, run_until
from gating import assert_all_active_is_eager, assert_is_key_masked, gate
from small_decoder import Block, D, batch, decoder, merge_heads, some_active
from test_elide import Loss
from torch import Tensor, nn

K, G, d = 2, 3, 4

Repeat = Callable[[Tensor], Tensor]


def beside(x: Tensor) -> Tensor:
    B, _, S, _ = x.shape
    return x[:, :, None, :, :].expand(B, K, G, S, d).reshape(B, K * G, S, d)


def flattened(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, G, -1, -1).flatten(1, 2)


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(G, dim=1)


def tiled(x: Tensor) -> Tensor:
    return x.repeat(1, G, 1, 1)


def in_turns(x: Tensor) -> Tensor:
    B, _, S, _ = x.shape
    return x.unsqueeze(1).expand(B, G, K, S, d).reshape(B, G * K, S, d)


def scaled(x: Tensor) -> Tensor:
    return beside(x) * 0.5


class Grouped(nn.Module):
    """Attention in which G query heads share keys and values."""

    def __init__(self, keys: Repeat, values: Repeat) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(D, K * G * d), nn.Linear(D, K * d)
        self.v, self.o = nn.Linear(D, K * d), nn.Linear(K * G * d, D)
        self.keys, self.values = keys, values

    def forward(self, block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, d)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = self.keys(k), self.values(v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(merge_heads(y))


def grouped(keys: Repeat, values: Repeat) -> nn.Module:
    torch.manual_seed(2)
    model = decoder()
    for layer in model.layers:
        layer.extra = Grouped(keys, values)
    return model


CASES = {
    "beside": (beside, beside, K),
    "flattened": (flattened, interleaved, K),
    "tiled": (tiled, tiled, K * G),
    "in turns": (in_turns, in_turns, K * G),
    "scaled": (beside, scaled, K * G),
}


@pytest.mark.parametrize("name", CASES)
def test_heads_that_the_operator_is_given(name: str) -> None:
    keys, values, heads = CASES[name]
    model = grouped(keys, values)
    run = run_until("remove_unused", Loss(model), batch(padded=True), some_active())
    attentions = calls(run.graph_module, "regate_fx.varlen_attention")
    given = [[n.meta["val"].shape[1] for n in node.args[:3]] for node in attentions]
    assert given == [[2, 2, 2], [K * G, heads, heads]] * 2
    if heads == K:
        after = operators(run.graph_module)
        assert not after["aten.expand"] and not after["aten.repeat_interleave"]


@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str) -> None:
    model = grouped(*CASES[name][:2])
    gated = gate(model)
    assert_is_key_masked(gated, model, batch(padded=True), some_active())
    assert_all_active_is_eager(gated, model, batch())
