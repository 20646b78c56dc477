"""Errors that come later than the batch they are about."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.runtime import late
from regate_fx.runtime.late import LateChecks


def error(wrong: Tensor) -> InvalidInput:
    return InvalidInput("rows", f"{wrong.nonzero().flatten().tolist()} are wrong.", "Mend them.")


class OnDevice:
    """Stands in for a tensor on an accelerator."""

    device = torch.device("meta")

    def __init__(self, *wrong: bool) -> None:
        self.wrong = torch.tensor(wrong)

    def to(self, device: str, non_blocking: bool) -> Tensor:
        assert device == "cpu" and non_blocking
        return self.wrong


class Copying:
    """An event that has come when it is told so."""

    has_come = False

    def __init__(self, device: torch.device) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.has_come


def test_on_the_host_it_is_raised_at_once() -> None:
    checks = LateChecks()
    checks.check(torch.zeros(2, dtype=torch.bool), error)
    with pytest.raises(InvalidInput, match=r"rows: \[1\] are wrong"):
        checks.check(torch.tensor([False, True]), error)


def test_on_a_device_every_error_is_raised_when_it_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late.torch, "Event", Copying)
    checks = LateChecks()
    for wrong in ((False, False), (True, False), (False, False), (False, True)):
        checks.check(OnDevice(*wrong), error)
    pickle.loads(pickle.dumps(checks)).check(OnDevice(False), error)
    monkeypatch.setattr(Copying, "has_come", True)
    for place in (0, 1):
        with pytest.raises(InvalidInput, match=rf"rows: \[{place}\] are wrong"):
            checks.check(OnDevice(False), error)
    checks.check(OnDevice(False), error)
