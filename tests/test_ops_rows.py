"""`regate_fx::take_rows`: gather, scatter, spread and pack are one operator and each other's backward.

Shapes: R source rows, M output rows.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regate_fx.ops.rows import take_rows
from regate_fx.plan import make_plan


def maps(sources: int, outputs: int, shared: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return index [M] and inverse [R] that pair `shared` random rows."""
    generator = torch.Generator().manual_seed(seed)
    taken = torch.randperm(sources, generator=generator)[:shared]
    filled = torch.randperm(outputs, generator=generator)[:shared]
    index, inverse = torch.full((outputs,), -1), torch.full((sources,), -1)
    index[filled], inverse[taken] = taken, filled
    return index, inverse


def by_loop(x: Tensor, index: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(x[0]) if i < 0 else x[i] for i in index.tolist()])


CASES = [(5, 5, 5), (6, 4, 4), (4, 6, 4), (5, 6, 3), (5, 6, 0)]


def arguments(x: Tensor, index: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor, bool, bool]:
    return x, index, inverse, bool((index >= 0).all()), bool((inverse >= 0).all())


@pytest.mark.parametrize(("sources", "outputs", "shared"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_takes_the_rows_that_the_index_names(
    sources: int, outputs: int, shared: int, dtype: torch.dtype
) -> None:
    index, inverse = maps(sources, outputs, shared)
    x = torch.randn(sources, 2, 3).mul(3).to(dtype)
    out = take_rows(*arguments(x, index, inverse))
    assert out.dtype == dtype
    assert torch.equal(out, by_loop(x, index))


@given(st.integers(1, 6), st.integers(1, 6), st.data())
@settings(max_examples=50)
def test_promises_change_no_result(sources: int, outputs: int, data: st.DataObject) -> None:
    shared = data.draw(st.integers(0, min(sources, outputs)))
    index, inverse = maps(sources, outputs, shared, seed=data.draw(st.integers(0, 99)))
    x = torch.randn(sources, 2)
    _, _, _, total, inverse_total = arguments(x, index, inverse)
    expected = take_rows(x, index, inverse, False, False)
    assert torch.equal(expected, by_loop(x, index))
    assert torch.equal(take_rows(x, index, inverse, total, inverse_total), expected)


@pytest.mark.parametrize(("sources", "outputs", "shared"), CASES)
@pytest.mark.parametrize("width", [(), (3,), (2, 3)])
def test_gradient(sources: int, outputs: int, shared: int, width: tuple[int, ...]) -> None:
    index, inverse = maps(sources, outputs, shared)
    x = torch.randn(sources, *width, dtype=torch.float64, requires_grad=True)
    _, *rest = arguments(x, index, inverse)
    assert torch.autograd.gradcheck(lambda x: take_rows(x, *rest), (x,))


@pytest.mark.parametrize(("sources", "outputs", "shared"), CASES)
def test_any_strides_in_contiguous_out(sources: int, outputs: int, shared: int) -> None:
    index, inverse = maps(sources, outputs, shared)
    for x in (
        torch.randn(4, sources).t(),
        torch.randn(sources, 8)[:, ::2],
        torch.randn(4).expand(sources, 4),
    ):
        out = take_rows(*arguments(x, index, inverse))
        assert out.is_contiguous()
        assert torch.equal(out, by_loop(x, index))


@pytest.mark.parametrize("empty_sources", [True, False])
def test_no_rows(empty_sources: bool) -> None:
    sources, outputs = (0, 3) if empty_sources else (3, 0)
    index, inverse = torch.full((outputs,), -1), torch.full((sources,), -1)
    out = take_rows(*arguments(torch.randn(sources, 2), index, inverse))
    assert torch.equal(out, torch.zeros(outputs, 2))


def test_nan_in_a_row_that_is_not_taken_stays_out() -> None:
    x = torch.full((2, 3), float("nan"))
    x[1] = 1.0
    out = take_rows(x, torch.tensor([-1, 1]), torch.tensor([-1, 1]), False, False)
    assert out.tolist() == [[0.0] * 3, [1.0] * 3]


def test_the_plan_moves_rows_between_its_three_layouts() -> None:
    active = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    plan = make_plan(active)
    dense = torch.randn(8, 5)
    packed = take_rows(dense, plan.rows, plan.row_of.flatten(), True, False)
    assert torch.equal(packed, dense[active.flatten()])
    scattered = take_rows(packed, plan.row_of.flatten(), plan.rows, False, True)
    assert torch.equal(scattered, dense * active.flatten()[:, None])
    compact = take_rows(packed, plan.slot_rows.flatten(), plan.row_slots, False, True)
    assert torch.equal(compact.view(2, 3, 5)[1], torch.cat([packed[3:], torch.zeros(2, 5)]))
    assert torch.equal(take_rows(compact, plan.row_slots, plan.slot_rows.flatten(), True, False), packed)


@pytest.mark.parametrize(("sources", "outputs", "shared"), CASES)
def test_opcheck(sources: int, outputs: int, shared: int) -> None:
    index, inverse = maps(sources, outputs, shared)
    for x in (torch.randn(sources, 3, requires_grad=True), torch.randn(3, sources).t().requires_grad_()):
        torch.library.opcheck(take_rows, arguments(x, index, inverse))


@pytest.mark.cuda
@pytest.mark.parametrize(("sources", "outputs", "shared"), CASES)
def test_cuda_equals_cpu(sources: int, outputs: int, shared: int) -> None:
    index, inverse = maps(sources, outputs, shared)
    on_cpu = torch.randn(sources, 3, requires_grad=True)
    on_cuda = on_cpu.detach().cuda().requires_grad_()
    flags = arguments(on_cpu, index, inverse)[3:]
    expected = take_rows(on_cpu, index, inverse, *flags)
    out = take_rows(on_cuda, index.cuda(), inverse.cuda(), *flags)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    out.backward(grad.cuda())
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(on_cuda.grad.cpu(), on_cpu.grad)
