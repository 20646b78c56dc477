"""Writes to what dropout returned: its own tensor, or the very one it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from captured import operators, run_until
from normalising import Small, assert_as_eager
from torch import Tensor

from regate_fx.errors import PassFailed
from regate_fx.passes import functionalize


def written(p: float, training: bool) -> Any:
    def body(w: Small, x: Tensor) -> Tensor:
        up = w.up(x)
        dropped = F.dropout(up, p, training)
        dropped *= x
        return dropped + up  # `up` has been written to where dropout did nothing

    return body


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.3, False), (0.3, True)])
def test_a_write_reaches_what_it_reaches_in_eager(p: float, training: bool, ids: dict[str, Tensor]) -> None:
    module = Small(written(p, training))
    assert_as_eager(module, ids)
    seen = operators(run_until("functionalize", module, ids).graph_module)
    assert seen["aten.dropout"] == (1 if p and training else 0)


def method(w: Small, x: Tensor) -> Tensor:
    return F.dropout(w.up(x), 0.3).mul_(x)


def part(w: Small, x: Tensor) -> Tensor:
    y = F.dropout(w.up(x), 0.3)
    y[..., :2] = x[..., :2]
    return y


@pytest.mark.parametrize("body", [method, part])
def test_other_ways_to_write(body: Any, ids: dict[str, Tensor]) -> None:
    assert_as_eager(Small(body), ids)


def test_without_the_cure_a_write_is_an_error(
    ids: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functionalize, "free_dropouts", lambda gm: 0)
    with pytest.raises(PassFailed, match="frozen storage"):
        run_until("functionalize", Small(written(0.3, True)), ids)
