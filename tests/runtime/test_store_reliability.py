"""A few of the kills and mutations that `crash_store.py` and `fuzz_store.py` make by the thousand."""

from __future__ import annotations

import os

import pytest
from crash_store import torment_made_up, torment_model
from fuzz_store import fuzz

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_killed_passes() -> None:
    assert torment_made_up(kills=10, seed=1).kills >= 10


def test_a_process_whose_companion_is_killed() -> None:
    assert torment_made_up(kills=2, seed=2, processes=2).kills >= 2


def test_killed_teachers() -> None:
    assert torment_model(kills=2, seed=3).kills >= 2


def test_mutated_files() -> None:
    found = fuzz(250, seed=4)
    assert sum(found.values()) == 250
    assert {outcome for *_, outcome in found} >= {"StoreDamaged", "right"}
