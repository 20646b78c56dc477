"""`autograd.Function`s inside a layer: gated where forward and backward treat every token by itself, else refused.

Shapes: B samples, S positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gating import assert_all_active_is_eager, assert_elided_ids_do_not_matter, assert_is_key_masked, gate
from small_decoder import Block, batch, decoder, some_active
from tiers import tiers
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


class Linear(Function):
    """To another width; the gradient of its weight is one of all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, (grad[..., :, None] * x[..., None, :]).sum((0, 1))


def function(
    forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Any]
) -> type[Function]:
    """An `autograd.Function` of one input; `backward` takes the gradient and that input."""

    class Made(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return backward(grad, *ctx.saved_tensors)

    return Made


def weighted(weight_gradient: Callable[[Tensor, Tensor], Tensor]) -> type[Function]:
    """`x * weight`, with a gradient of the weight to be tried."""

    class Made(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, weight = ctx.saved_tensors
            return grad * weight, weight_gradient(grad, x)

    return Made


def normed(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return RMSNorm.apply(x, block.scale)


def best_only(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return BestOnly.apply(block.up(x))[..., : x.shape[-1]]


def widened(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return block.down(Linear.apply(x, block.up.weight))


NUMBERS = [(extra, backend) for extra in (normed, best_only, widened) for backend in ("eager", "aot_eager")]


@pytest.mark.parametrize(
    "case", tiers(NUMBERS, (normed, "aot_eager"), (best_only, "aot_eager"), (widened, "eager"))
)
def test_numbers(case: tuple[Any, str]) -> None:
    extra, backend = case
    model = decoder(extra)
    gated = gate(model, backend)
    inputs, active = batch(padded=True), some_active()
    assert_is_key_masked(gated, model, inputs, active)
    assert_elided_ids_do_not_matter(gated, inputs, active)
    assert_all_active_is_eager(gated, model, batch())
    assert {layer.kind for layer in gated.report.layers} == {"varlen"}


def double(x: Tensor) -> Tensor:
    return x * 2


def same(grad: Tensor, x: Tensor) -> Tensor:
    return grad


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (function(lambda x: x.cumsum(1), same), "cumsum"),
        (function(lambda x: x * torch.arange(x.shape[1])[None, :, None], same), "arange"),
        (function(lambda x: x * x.shape[1], same), "computes with the batch or sequence size"),
        (function(double, lambda grad, x: grad - grad.sum((0, 1))), "spreads a sum over tokens"),
        (function(double, lambda grad, x: grad - grad.mean((0, 1))), "does not add up"),
        (function(double, lambda grad, x: grad.sum((0, 1), keepdim=True)), "gradients"),
        (function(double, lambda grad, x: grad / x.shape[0]), "computes with the batch or sequence size"),
    ],
)
def test_refused(made: Any, words: str) -> None:
    gated = gate(decoder(lambda block, x, mask: made.apply(x)))
    with pytest.raises(NotGateable, match=words) as caught:
        gated(**batch(), token_mask=some_active())
    assert any(refusal.code == "function" for refusal in caught.value.refusals)


WEIGHT_GRADIENTS = {
    "summed": (lambda grad, x: (grad * x).sum((0, 1)), None),
    "summed, scaled": (lambda grad, x: ((-grad.float() / 2 + grad * x) * x.abs()).sum((0, 1)) * 0.5, None),
    "mean": (lambda grad, x: (grad * x).mean((0, 1)), "does not add up"),
    "largest": (lambda grad, x: (grad * x).amax((0, 1)), "reduces over all tokens"),
    "of states alone": (lambda grad, x: x.sum((0, 1)), "does not add up"),
    "shifted": (lambda grad, x: (grad + x).sum((0, 1)), "does not add up"),
    "counted": (
        lambda grad, x: (grad * x).sum((0, 1)) / x.shape[1],
        "computes with the batch or sequence size",
    ),
}


@pytest.mark.parametrize("name", WEIGHT_GRADIENTS)
def test_a_gradient_of_a_weight_adds_up_what_vanishes_with_the_gradient(name: str) -> None:
    """Anything else would count the tokens, or read those that are not computed."""
    gradient, words = WEIGHT_GRADIENTS[name]
    made = weighted(gradient)
    model = decoder(lambda block, x, mask: made.apply(x, block.scale))
    gated = gate(model)
    if words is None:
        assert_is_key_masked(gated, model, batch(padded=True), some_active())
        return
    with pytest.raises(NotGateable, match=words):
        gated(**batch(padded=True), token_mask=some_active())
