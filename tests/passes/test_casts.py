"""Autocast, ambient and inside the graph: dtypes are those that eager has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captured import capture, operators, run_until
from normalising import Small, assert_as_eager, normalise
from torch import Tensor

from regate_fx.passes import functionalize


def unchanged(w: Small, x: Tensor) -> Tensor:
    return w.up(x) * x


def wide_inside(w: Small, x: Tensor) -> Tensor:
    y = w.up(x)
    with torch.autocast("cpu", enabled=False):
        z = F.linear(y.float(), w.up.weight.float())
    return F.linear(z, w.up.weight)


def wide_twice(w: Small, x: Tensor) -> Tensor:
    """The second `float()` does nothing, but only Dynamo knows."""
    with torch.autocast("cpu", enabled=False):
        z = F.linear(x.float(), w.up.weight.float())
    return z.float() * 2


def narrow_inside(w: Small, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = w.up(x)
    return w.up(y.float())


def rounded_after_wide(w: Small, x: Tensor) -> Tensor:
    y = w.up(x)
    with torch.autocast("cpu", enabled=False):
        z = F.linear(y.float(), w.up.weight.float())
    return (z * 1.01).bfloat16().float() * 1.1


def widened_after_narrow(w: Small, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = w.up(x)
    return y.float() * 1.01


def widened_in_narrow(w: Small, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = w.up(x).float() * 1.01
    return y * 1.01


AUTOCAST = (
    wide_inside,
    wide_twice,
    narrow_inside,
    rounded_after_wide,
    widened_after_narrow,
    widened_in_narrow,
    unchanged,
)


@pytest.mark.parametrize("ambient", [True, False], ids=["ambient", "no ambient"])
@pytest.mark.parametrize("body", AUTOCAST, ids=lambda body: body.__name__)
def test_autocast_keeps_its_dtypes(
    body: Callable[..., Tensor], ambient: bool, ids: dict[str, Tensor]
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        assert_as_eager(Small(body), ids)


def test_without_pinning_casts_a_cast_is_lost(
    ids: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functionalize, "pin_casts", lambda gm: 0)
    module = Small(widened_after_narrow)
    assert module(**ids).dtype == torch.float32
    assert capture(module, ids, rewrite=normalise).outputs[0].dtype == torch.bfloat16


def test_without_dropping_asserts_in_graph_autocast_fails(
    ids: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functionalize, "_drop_asserts", lambda gm: 0)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
        assert_as_eager(Small(wide_twice), ids)


def test_casts_are_pinned_only_where_the_graph_switches_autocast(ids: dict[str, Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        plain = run_until("functionalize", Small(lambda w, x: w.up(x).float()), ids).graph_module
        switched = run_until("functionalize", Small(rounded_after_wide), ids).graph_module
    assert operators(plain)["aten._to_copy"] == 1
    assert operators(switched)["aten._to_copy"] == 3
    assert operators(plain)["regate_fx.cast"] == operators(switched)["regate_fx.cast"] == 0
