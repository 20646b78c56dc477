"""Broken losses on an accelerator: every batch is judged, the last one too. No accelerator is needed to see it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.runtime import difficulty, late
from regate_fx.runtime.difficulty import Difficulty


class OnDevice:
    """Flags as on an accelerator: their device is not the host's, and they have to be copied."""

    device = torch.device("meta")

    def __init__(self, flags: Tensor) -> None:
        self.flags = flags

    def to(self, device: str, non_blocking: bool) -> Tensor:
        return self.flags


class Busy:
    """A device, as an event sees it, that is busy until it is waited for."""

    is_done = False

    def __init__(self, device: torch.device) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return Busy.is_done


@pytest.fixture
def busy_device(monkeypatch: pytest.MonkeyPatch) -> None:
    check = late.LateChecks.check

    def check_on_device(checks: late.LateChecks, wrong: Tensor, error: late.Error) -> None:
        check(checks, OnDevice(wrong), error)  # type: ignore[arg-type]

    monkeypatch.setattr(Busy, "is_done", False)
    monkeypatch.setattr(late.torch, "Event", Busy)
    monkeypatch.setattr(late.LateChecks, "check", check_on_device)
    monkeypatch.setattr(difficulty, "_wait_for", lambda device: monkeypatch.setattr(Busy, "is_done", True))


def update(table: Difficulty, sample: int, loss: float) -> None:
    everything = torch.ones(1, 1, dtype=torch.bool)
    ids = torch.tensor([[sample]])
    table.update(torch.tensor([[sample]]), torch.tensor([[loss]]), everything, ids)


@pytest.mark.usefixtures("busy_device")
def test_every_batch_is_judged_while_the_device_is_busy() -> None:
    table = Difficulty(5)
    for sample, loss in enumerate((1.0, math.nan, 2.0, math.inf, 3.0)):
        update(table, sample, loss)
    assert table.ema.isfinite().tolist() == [True, False, True, False, True]
    for sample in (1, 3):
        with pytest.raises(InvalidInput, match=f"the loss of sample {sample} "):
            table.settle()
    table.settle()


@pytest.mark.usefixtures("busy_device")
def test_the_last_batch_is_judged_where_ranks_exchange() -> None:
    table = Difficulty(5)
    update(table, 4, math.nan)
    observed = torch.tensor([2]), torch.tensor([0.5])
    with pytest.raises(InvalidInput, match="the loss of sample 4 "):
        table.merge([observed])
    assert table.ema.nan_to_num(-1).tolist() == [-1, -1, 0.5, -1, -1]


@pytest.mark.cuda
def test_the_last_batch_on_an_accelerator() -> None:
    table = Difficulty(5)
    slot = torch.tensor([[1, 2]], device="cuda")
    losses = torch.tensor([[1.0, math.nan]], device="cuda")
    table.update(slot, losses, slot > 0, torch.tensor([[9, 9]]))
    with pytest.raises(InvalidInput, match="the loss of sample 9 "):
        table.settle()
