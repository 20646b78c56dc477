"""Linear layers of bitsandbytes inside a layer: their rows are proven to be independent, or they are refused.

Shapes: B samples, S positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from gating import (
    assert_all_active_is_eager,
    assert_elided_ids_do_not_matter,
    assert_is_key_masked,
    gate,
)
from small_decoder import Block, D, batch, decoder, some_active
from torch import Tensor, nn

from regate_fx.errors import NotGateable


def four_bit(nested: bool, bias: bool) -> nn.Module:
    layer = Linear4bit(D, 2 * D, bias, torch.float32, compress_statistics=nested, quant_type="nf4")
    weight = torch.randn(2 * D, D)
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=nested, quant_type="nf4")
    return layer.to("cpu").requires_grad_(False)


def eight_bit(threshold: float) -> Callable[[Block, Tensor, Tensor | None], Tensor]:
    """Rows and weight in int8, as its layers compute on a GPU."""
    weight, scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(torch.randn(D, D).half())

    def extra(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
        rows, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(
            x.detach().half().flatten(0, 1), threshold
        )
        y = torch.ops.bitsandbytes.int8_scaled_mm(rows, weight, scales, scale, dtype=torch.float16)
        return block.o(y.float().view(x.shape))

    return extra


@pytest.mark.parametrize(("nested", "bias"), [(False, True), (True, False)])
def test_four_bit_weights(nested: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer = four_bit(nested, bias)
    model = decoder(lambda block, x, mask: block.down(layer(x)))
    model.quantised = layer
    gated = gate(model)
    inputs, active = batch(padded=True), some_active()
    assert_is_key_masked(gated, model, inputs, active)
    assert_elided_ids_do_not_matter(gated, inputs, active)
    assert_all_active_is_eager(gated, model, batch(3, 5))
    assert {layer.kind for layer in gated.report.layers} == {"varlen"}


def test_eight_bit_rows() -> None:
    torch.manual_seed(0)
    model = decoder(eight_bit(0.0))
    gated = gate(model)
    assert_is_key_masked(gated, model, batch(padded=True), some_active())
    assert {layer.kind for layer in gated.report.layers} == {"varlen"}


def test_outliers_that_are_looked_for_among_all_tokens_are_refused() -> None:
    gated = gate(decoder(eight_bit(6.0)))
    with pytest.raises(
        NotGateable, match=r"int8_vectorwise_quant looks for outlying features among all tokens"
    ):
        gated(**batch(), token_mask=some_active())


def test_new_memory_for_a_weight_is_refused() -> None:
    """What 8-bit layers of bitsandbytes do in every call."""
    layer = Linear8bitLt(D, D, False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(D, D), requires_grad=False, has_fp16_weights=False)
    model = decoder(lambda block, x, mask: layer(x))
    model.quantised = layer.to("cpu")
    with pytest.raises(NotGateable, match=r"the memory of another tensor, as `x.data = y` does"):
        gate(model)(**batch(), token_mask=some_active())
