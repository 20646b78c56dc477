"""One thread, fixed seeds and empty compiler caches for every test."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch._dynamo.utils import counters

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
# Shrinking a failure compiles hundreds of models: HYPOTHESIS_PROFILE=search does it, the suite does not.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=4,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=_SLOW,
)
settings.register_profile("search", deadline=None, max_examples=100, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

torch.set_num_threads(1)
# pytest listens to loggers that do not propagate, and Dynamo writes out graphs and stacks where anybody listens.
logging.getLogger("torch.__trace").propagate = True
# Its keys are made of symbols, and cost more than it saves where a model has a few layers only: 16 % of a run.
torch._dynamo.config.fake_tensor_cache_enabled = False
# Compilers make objects by the million and hardly any garbage; searching them for it takes 15 % of a run. Every test
# that compiles is followed by a collection.
gc.set_threshold(100_000, 50, 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    compiled = bool(counters["stats"])
    torch._dynamo.reset()
    if compiled:
        # What compilers keep for good, hundreds of thousands of objects, would be searched at every collection.
        gc.collect()
        gc.freeze()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)
