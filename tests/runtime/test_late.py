"""Errors that come later than the batch they are about: every batch is judged, the last one too."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from busy_device import BusyDevice, OnDevice
from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.runtime import late
from regate_fx.runtime.difficulty import Difficulty
from regate_fx.runtime.late import LateChecks


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> BusyDevice:
    return BusyDevice(monkeypatch)


def error(wrong: Tensor) -> InvalidInput:
    return InvalidInput("rows", f"{wrong.nonzero().flatten().tolist()} are wrong.", "Mend them.")


def flags(*wrong: bool) -> Tensor:
    return OnDevice(torch.tensor(wrong))  # type: ignore[return-value]


def test_on_the_host_it_is_raised_at_once() -> None:
    checks = LateChecks()
    checks.check(torch.zeros(2, dtype=torch.bool), error)
    with pytest.raises(InvalidInput, match=r"rows: \[1\] are wrong"):
        checks.check(torch.tensor([False, True]), error)


def test_on_a_device_every_error_is_raised_when_it_has_come(busy: BusyDevice) -> None:
    checks = LateChecks()
    for wrong in ((False, False), (True, False), (False, False), (False, True)):
        checks.check(flags(*wrong), error)
    pickle.loads(pickle.dumps(checks)).check(flags(False), error)
    busy.is_done = True
    for place in (0, 1):
        with pytest.raises(InvalidInput, match=rf"rows: \[{place}\] are wrong"):
            checks.check(flags(False), error)
    checks.check(flags(False), error)
    assert not busy.waits


@pytest.fixture
def flags_on_device(monkeypatch: pytest.MonkeyPatch, busy: BusyDevice) -> None:
    check = late.LateChecks.check

    def check_on_device(checks: late.LateChecks, wrong: Tensor, error: late.Error) -> None:
        check(checks, OnDevice(wrong), error)  # type: ignore[arg-type]

    monkeypatch.setattr(late.LateChecks, "check", check_on_device)


def update(table: Difficulty, sample: int, loss: float) -> None:
    everything = torch.ones(1, 1, dtype=torch.bool)
    ids = torch.tensor([[sample]])
    table.update(torch.tensor([[sample]]), torch.tensor([[loss]]), everything, ids)


@pytest.mark.usefixtures("flags_on_device")
def test_every_batch_of_losses_is_judged_while_the_device_is_busy() -> None:
    table = Difficulty(5)
    for sample, loss in enumerate((1.0, math.nan, 2.0, math.inf, 3.0)):
        update(table, sample, loss)
    assert table.ema.isfinite().tolist() == [True, False, True, False, True]
    for sample in (1, 3):
        with pytest.raises(InvalidInput, match=f"the loss of sample {sample} "):
            table.settle()
    table.settle()


@pytest.mark.usefixtures("flags_on_device")
def test_the_last_batch_of_losses_is_judged_where_ranks_exchange() -> None:
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
