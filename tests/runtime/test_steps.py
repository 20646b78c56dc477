"""Optimizer steps are noticed whatever the optimizer does, and nothing else is."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from regate_fx.runtime.steps import OptimizerSteps

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
}


def backward(model: nn.Module) -> None:
    model(torch.ones(1, 3)).sum().backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_counts_once(name: str) -> None:
    model, steps = nn.Linear(3, 2), OptimizerSteps()
    optimizer = OPTIMIZERS[name](model.parameters())
    found = []
    for accumulated in (1, 3, 2):
        for _ in range(accumulated):
            found.append(steps.count(model, found[-1] if found else 0))
            backward(model)
        optimizer.step()
        optimizer.zero_grad()
    assert found == [0, 1, 1, 1, 2, 2]
    assert steps.count(model, found[-1]) == 3


def test_an_optimizer_that_torch_does_not_know() -> None:
    model, steps = nn.Linear(3, 2), OptimizerSteps()
    assert steps.count(model, 0) == 0
    with torch.no_grad():
        model.weight.sub_(0.1)
    assert steps.count(model, 0) == 1


def test_two_optimizers_of_one_model_count_once() -> None:
    model, steps = nn.Linear(3, 2), OptimizerSteps()
    optimizers = [torch.optim.AdamW([p], fused=True) for p in model.parameters()]
    steps.count(model, 0)
    backward(model)
    for optimizer in optimizers:
        optimizer.step()
    assert steps.count(model, 0) == 1
    assert steps.count(model, 1) == 1


def test_the_step_of_another_model_does_not_count() -> None:
    model, other, steps = nn.Linear(3, 2), nn.Linear(3, 2), OptimizerSteps()
    steps.count(model, 0)
    backward(other)
    torch.optim.AdamW(other.parameters(), fused=True).step()
    assert steps.count(model, 0) == 0


def test_what_its_owner_counted_is_not_counted_again() -> None:
    model, steps = nn.Linear(3, 2), OptimizerSteps()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps.count(model, 0)
    backward(model)
    optimizer.step()
    assert steps.count(model, 1) == 1
    optimizer.step()
    assert steps.count(model, 1) == 2


def test_a_step_that_a_scaler_skips_does_not_count() -> None:
    model, steps = nn.Linear(3, 2), OptimizerSteps()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    steps.count(model, 0)
    scaler.scale(model(torch.full((1, 3), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert steps.count(model, 0) == 0


def test_nothing_stays_registered() -> None:
    before = len(torch_optimizer._global_optimizer_post_hooks)
    steps = OptimizerSteps()
    steps.count(nn.Linear(3, 2), 0)
    assert len(torch_optimizer._global_optimizer_post_hooks) == before + 1
    del steps
    gc.collect()
    assert len(torch_optimizer._global_optimizer_post_hooks) == before
