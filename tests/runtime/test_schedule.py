"""The dual cycle against Eq. 4 restated, and its share of computed candidates."""

from __future__ import annotations

from typing import Any

import pytest
import restatement as plain
from hypothesis import given, settings
from hypothesis import strategies as st

from regate_fx.errors import InvalidInput
from regate_fx.runtime import DualCycle


@settings(max_examples=300)
@given(
    keep=st.floats(0, 1),
    warmup=st.integers(0, 20),
    cycle=st.integers(1, 20),
    dense=st.integers(0, 20),
    step=st.integers(0, 200),
)
def test_every_step(keep: float, warmup: int, cycle: int, dense: int, step: int) -> None:
    dense = min(dense, cycle)
    schedule = DualCycle(keep, warmup, cycle, dense)
    assert schedule.ratio(step) == plain.keep_ratio(step, keep, warmup, cycle, dense)


def test_the_paper_computes_56_percent_of_the_candidates() -> None:
    schedule = DualCycle()
    assert {schedule.ratio(step) for step in range(100)} == {1.0}
    assert sum(schedule.ratio(100 + step) for step in range(128)) / 128 == 0.5625


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"keep": -0.01}, "keep"),
        ({"keep": 1.01}, "keep"),
        ({"keep": float("nan")}, "keep"),
        ({"warmup": -1}, "warmup"),
        ({"cycle": 0}, "cycle"),
        ({"dense": -1}, "dense"),
        ({"dense": 129}, "dense"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{name}: "):
        DualCycle(**arguments)
