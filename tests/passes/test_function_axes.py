"""`autograd.Function`s inside a layer: gated where forward and backward treat every token by itself, else refused.

Shapes: B samples, S positions, D hidden size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gating import assert_all_active_is_eager, assert_elided_ids_do_not_matter, assert_is_key_masked, gate
from small_decoder import Block, batch, decoder, some_active
from torch import Tensor
from torch.autograd import Function

from regate_fx.errors import NotGateable


class RMSNorm(Function):
    """Reduces over features; the gradient of its weight is a sum over all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, inverse)
        return x * inverse * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, inverse = ctx.saved_tensors
        normed, inner = x * inverse, grad * weight
        grad_x = inverse * (inner - normed * (inner * normed).mean(-1, keepdim=True))
        return grad_x, (grad * normed).sum((0, 1))


class BestOnly(Function):
    """Writes to a fresh tensor in its backward, one entry of each token's features."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        best = x.argmax(-1, keepdim=True)
        ctx.save_for_backward(x, best)
        low, high = x.chunk(2, -1)
        return torch.cat((low.tanh(), high), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, best = ctx.saved_tensors
        result = grad * 0.5
        result.scatter_add_(-1, best, grad.gather(-1, best) * x.gather(-1, best))
        return result


class MixesForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class MixesBackward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean((0, 1))


class CountsPositions(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.arange(x.shape[1])[None, :, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class WrongGradient(Function):
    """Its gradient has the features of all tokens alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.sum((0, 1), keepdim=True)


def normed(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return RMSNorm.apply(x, block.scale)


def best_only(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return BestOnly.apply(block.up(x))[..., : x.shape[-1]]


@pytest.mark.parametrize("extra", [normed, best_only])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_numbers(extra: Any, backend: str) -> None:
    model = decoder(extra)
    gated = gate(model, backend)
    inputs, active = batch(padded=True), some_active()
    assert_is_key_masked(gated, model, inputs, active)
    assert_elided_ids_do_not_matter(gated, inputs, active)
    assert_all_active_is_eager(gated, model, batch())
    assert {layer.kind for layer in gated.report.layers} == {"varlen"}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (MixesForward, "cumsum"),
        (MixesBackward, "spreads a sum over tokens"),
        (CountsPositions, "arange"),
        (WrongGradient, "gradients"),
    ],
)
def test_refused(function: Any, words: str) -> None:
    gated = gate(decoder(lambda block, x, mask: function.apply(x)))
    with pytest.raises(NotGateable, match=words) as caught:
        gated(**batch(), token_mask=some_active())
    assert any(refusal.code == "function" for refusal in caught.value.refusals)
