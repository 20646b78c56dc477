"""Writes to what was detached: the history begins anew in one value and stays as it is in the other.

Shapes: B samples, S positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captured import run_until
from normalising import Small, assert_as_eager
from torch import Tensor

from regate_fx.passes import functionalize
from regate_fx.passes.base import Refused

Body = Callable[[Small, Tensor], Tensor]


def added_to(w: Small, x: Tensor) -> Tensor:
    y = x.sin().detach()
    y += w.up(x)
    return y * x


def part_of_a_view(w: Small, x: Tensor) -> Tensor:
    y = x.sin().detach()
    y.flatten(0, 1)[:, 1:3] = w.up(x).flatten(0, 1)[:, :2]
    y.mul_(w.up(x))
    return y * x


def by_data(w: Small, x: Tensor) -> Tensor:
    y = torch.zeros_like(x).data
    return y.add_(w.up(x)) * x


def without_history(w: Small, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.detach().add_(1.5)  # reaches y, which has no history to lose
    return y * w.up(x)


@pytest.mark.parametrize("body", [added_to, part_of_a_view, by_data, without_history])
def test_values_and_gradients_are_those_of_eager(body: Body, ids: dict[str, Tensor]) -> None:
    assert_as_eager(Small(body), ids)


@pytest.mark.parametrize("body", [added_to, part_of_a_view])
def test_without_the_cure_gradients_are_missing(
    body: Body, ids: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functionalize, "part_detached", lambda gm: 0)
    with pytest.raises(AssertionError):
        assert_as_eager(Small(body), ids)


def reaches_back(w: Small, x: Tensor) -> Tensor:
    y = x.sin()
    y.detach().add_(w.up(x))
    return y


def changes_a_value_with_history(w: Small, x: Tensor) -> Tensor:
    y = w.up(x)
    y.detach().mul_(2)
    return y


def changes_a_parameter(w: Small, x: Tensor) -> Tensor:
    w.up.weight.data.mul_(0.5)
    return w.up(x)


def source_is_written_first(w: Small, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    z = y.detach()
    y.add_(2.0)
    z += w.up(x)
    return z * x


def source_is_read_between_two_writes(w: Small, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    z = y.detach()
    z.add_(1.0)
    read = y * x
    z += w.up(x)
    return z + read


def through_a_list(w: Small, x: Tensor) -> Tensor:
    y, z = w.up(x), x.sin()
    torch._foreach_mul_([y.detach(), z.detach()], 2.0)
    return y + z


REFUSED = [
    through_a_list, reaches_back, changes_a_value_with_history, changes_a_parameter, source_is_written_first,
    source_is_read_between_two_writes,
]  # fmt: skip


@pytest.mark.parametrize("body", REFUSED)
def test_a_write_that_reaches_what_it_was_detached_from_is_refused(
    body: Body, ids: dict[str, Tensor]
) -> None:
    with pytest.raises(Refused, match=r"writes to \w+, which was detached from") as caught:
        run_until("functionalize", Small(body), ids)
    assert caught.value.code == "detached-write"
