from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from computed import Computed

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests" / "runtime")]

SMALL_LLAMA = (128, 64)


@pytest.fixture(autouse=True)
def _own_accelerator_state() -> Iterator[None]:
    """One process has one accelerator state, and other tests ask for another."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What models with the layers of `examples/small_chat.py` compute."""
    return Computed(monkeypatch, SMALL_LLAMA)
