"""The loss of a linear head by chunks of rows is that of all logits at once, gradients with weights per row included.

Shapes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regate_fx.ops import head_loss as module
from regate_fx.ops.head_loss import head_loss

IGNORED = -100


def operands(
    N: int, D: int, V: int, dtype: torch.dtype, has_bias: bool, seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows, weight and bias, all with gradients; targets of which some are ignored; a weight for each row."""
    generator = torch.Generator().manual_seed(seed)
    rows, weight = (torch.randn(n, D, generator=generator).to(dtype) for n in (N, V))
    bias = [torch.randn(V, generator=generator).to(dtype)] if has_bias else []
    target = torch.randint(V, (N,), generator=generator)
    target[torch.rand(N, generator=generator) < 0.3] = IGNORED
    per_row = torch.rand(N, generator=generator)
    return [value.requires_grad_() for value in (rows, weight, *bias)], target, per_row


def by_logits(rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return F.cross_entropy(F.linear(rows, weight, bias).to(wide), target, reduction="none")


def loss_and_gradients(
    losses: Tensor, per_row: Tensor, inputs: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    total = (losses * per_row.to(losses.dtype)).sum()
    return losses.detach(), torch.autograd.grad(total, inputs)


@given(
    N=st.sampled_from([0, 1, 5, 256, 257, 700]), D=st.integers(1, 24), V=st.integers(1, 40), has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=40)
def test_it_is_the_cross_entropy_of_the_logits(N: int, D: int, V: int, has_bias: bool, seed: int) -> None:
    inputs, target, per_row = operands(N, D, V, torch.float64, has_bias, seed)
    rows, weight, bias = (*inputs, None)[:3]
    seen = loss_and_gradients(head_loss(rows, weight, bias, target, IGNORED)[0], per_row, inputs)
    wanted = loss_and_gradients(by_logits(rows, weight, bias, target), per_row, inputs)
    torch.testing.assert_close(seen, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("scale", "cap"), [(0.25, 0.0), (1.0, 3.0), (0.5, 2.0), (-1.5, -2.0)])
def test_logits_are_scaled_and_capped(scale: float, cap: float) -> None:
    inputs, target, per_row = operands(300, 8, 13, torch.float64, has_bias=True)
    logits = F.linear(*inputs) * scale
    changed = cap * logits.tanh() if cap else logits
    wanted = loss_and_gradients(F.cross_entropy(changed, target, reduction="none"), per_row, inputs)
    seen = loss_and_gradients(head_loss(*inputs, target, IGNORED, scale, cap)[0], per_row, inputs)
    torch.testing.assert_close(seen, wanted, rtol=1e-10, atol=1e-10)


def test_half_precision_is_rounded_where_the_logits_are() -> None:
    """Losses as exact as float32; the weight's gradient is summed in float32, and so closer than by one product."""
    inputs, target, per_row = operands(900, 48, 61, torch.bfloat16, has_bias=True)
    rows, weight, bias = inputs
    losses, seen = loss_and_gradients(head_loss(rows, weight, bias, target, IGNORED)[0], per_row, inputs)
    reference, wanted = loss_and_gradients(by_logits(rows, weight, bias, target), per_row, inputs)
    assert losses.dtype is torch.float32
    torch.testing.assert_close(losses, reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen[0], wanted[0], rtol=1e-2, atol=1e-3)
    for a, b in zip(seen[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_learned_gets_a_gradient(frozen: tuple[int, ...]) -> None:
    inputs, target, _ = operands(300, 8, 13, torch.float64, has_bias=True)
    wanted = torch.autograd.grad(by_logits(*inputs, target).sum(), inputs)
    for index in frozen:
        inputs[index].requires_grad_(False)
    head_loss(*inputs, target, IGNORED)[0].sum().backward()
    for index, (value, grad) in enumerate(zip(inputs, wanted, strict=True)):
        if index in frozen:
            assert value.grad is None
        else:
            torch.testing.assert_close(value.grad, grad)


def test_rows_without_a_label_have_no_part_in_it() -> None:
    inputs, _, _ = operands(300, 8, 13, torch.float64, has_bias=True)
    losses = head_loss(*inputs, torch.full((300,), IGNORED), IGNORED)[0]
    losses.sum().backward()
    assert not losses.any()
    assert not any(value.grad.any() for value in inputs)


def test_logits_are_made_for_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    original = module._logits

    def counted(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        counts.append(rows.shape[0])
        return original(rows, weight, bias)

    monkeypatch.setattr(module, "_logits", counted)
    inputs, target, _ = operands(700, 8, 13, torch.float64, has_bias=False)
    head_loss(*inputs, None, target, IGNORED)[0].sum().backward()
    assert counts == [256, 256, 188] * 2


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_operator_is_registered_as_it_behaves(has_bias: bool) -> None:
    inputs, target, _ = operands(9, 8, 13, torch.float32, has_bias)
    torch.library.opcheck(head_loss, (*(*inputs, None)[:3], target, IGNORED))


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_cuda_equals_cpu(dtype: torch.dtype, tolerance: float) -> None:
    inputs, target, per_row = operands(900, 64, 301, dtype, has_bias=True)
    on_cuda = [value.detach().cuda().requires_grad_() for value in inputs]
    wanted = loss_and_gradients(head_loss(*inputs, target, IGNORED)[0], per_row, inputs)
    losses = head_loss(*on_cuda, target.cuda(), IGNORED)[0]
    seen = loss_and_gradients(losses, per_row.cuda(), on_cuda)
    for a, b in zip((seen[0], *seen[1]), (wanted[0], *wanted[1]), strict=True):
        assert float((a.cpu() - b).norm()) <= tolerance * float(b.norm())
