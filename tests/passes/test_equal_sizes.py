"""Axes that happen to have the size of another one are not taken for it.

Shapes: B samples, S positions, K positions of a memory, D hidden size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gating import assert_all_active_is_eager, assert_is_key_masked, gate
from small_decoder import (
    Block,
    D,
    Decoder,
    H,
    V,
    batch,
    causal_mask,
    decoder,
    hide,
    sequence_first_attention,
    some_active,
)
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput


class CrossAttends(Decoder):
    """Besides its own tokens, a layer attends over a memory [B, K, D] that the caller gives."""

    def forward(
        self, input_ids: Tensor, memory: Tensor, labels: Tensor | None = None, attention_mask: Any = None
    ) -> Any:
        S = input_ids.shape[1]
        mask = causal_mask(attention_mask, S)
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
            x = x + F.scaled_dot_product_attention(layer.norm(x), memory, memory)
        logits = self.head(self.final_norm(x))
        return CausalLMOutput(loss=None if labels is None else self.loss(logits, labels), logits=logits)


@pytest.mark.parametrize("B", [1, 2])
def test_a_memory_as_long_as_the_sequence_is_not_taken_for_it(B: int) -> None:
    """Sizes that happen to be equal are no proof of being the same axis, nor are symbols that Dynamo lets coincide."""
    torch.manual_seed(0)
    model = CrossAttends([Block(), Block()])
    gated = gate(model)
    for K in (5, 6, 7, 7, 4):
        inputs = {**batch(B, 7, seed=K), "memory": torch.randn(B, K, D)}
        assert_all_active_is_eager(gated, model, inputs)
        assert_is_key_masked(gated, model, inputs, some_active(B, 7, seed=K))
        assert [layer.kind for layer in gated.report.layers] == ["varlen"] * 2


class IdsAsMemory(CrossAttends):
    """The memory is given as ids [B, K], which look like one more input over positions."""

    def forward(
        self, input_ids: Tensor, prompt: Tensor, labels: Tensor | None = None, attention_mask: Any = None
    ) -> Any:
        return super().forward(input_ids, self.embedding(prompt), labels, attention_mask)


@pytest.mark.parametrize("lengths", [(7, 7), (4, 6), (5, 7), (7, 5)])
def test_other_ids_as_long_as_the_sequence_are_not_taken_for_it(lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = IdsAsMemory([Block(), Block()])
    gated = gate(model)
    for K in lengths:
        inputs = {**batch(2, 7, seed=K), "prompt": torch.randint(V, (2, K))}
        assert_all_active_is_eager(gated, model, inputs)
        assert_is_key_masked(gated, model, inputs, some_active(2, 7, seed=K))
        assert [layer.kind for layer in gated.report.layers] == ["varlen"] * 2


@pytest.mark.parametrize("S", [H, D, D // H, V])
def test_a_sequence_as_long_as_a_feature_axis(S: int) -> None:
    model = decoder(sequence_first_attention)
    active = torch.rand(H, S) < 0.5
    active[:, 0] = True
    active[0, 1] = False
    gated = gate(model)
    assert_is_key_masked(gated, model, batch(H, S), active)


def test_a_batch_as_large_as_the_sequence_is_long() -> None:
    model = decoder(alibi)
    gated = gate(model)
    for size in (5, 6):
        assert_is_key_masked(gated, model, batch(size, size), some_active(size, size))


def alibi(b: Block, x: Tensor, m: Any) -> Tensor:
    i = torch.arange(x.shape[1])
    return hide(x @ x.mT - 0.3 * (i[:, None] - i).abs(), m).softmax(-1) @ x
