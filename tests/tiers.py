"""Which cases every run of the tests checks, and which only `pytest -m exhaustive` does.

The first are chosen so that each mechanism is met at least once; the others meet it again in another architecture.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

exhaustive = pytest.mark.exhaustive


def tiers(cases: Iterable[Any], *always: Any) -> list[Any]:
    """All cases of a parametrised test, with those that are not among `always` left to the exhaustive run."""
    return [case if case in always else pytest.param(case, marks=exhaustive) for case in cases]
