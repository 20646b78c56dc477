"""A device that is busy until it is waited for, stood in for by the host: what comes late can be tested without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regate_fx.runtime import difficulty, late


class OnDevice:
    """A tensor as on an accelerator: its device is not the host's, and it has to be copied."""

    device = torch.device("meta")

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def detach(self) -> OnDevice:
        return self

    def float(self) -> OnDevice:
        return OnDevice(self._values.float())

    def to(self, device: str, non_blocking: bool) -> Tensor:
        assert device == "cpu" and non_blocking
        return self._values


class BusyDevice:
    """is_done: whether the copies so far have come, as far as `query` tells; waits: how often somebody waited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_done = False
        self.waits = 0
        device = self

        class Event:
            def __init__(self, on: torch.device) -> None:
                assert on == OnDevice.device

            def record(self) -> None:
                pass

            def query(self) -> bool:
                return device.is_done

            def synchronize(self) -> None:
                device.waits += not device.is_done

        monkeypatch.setattr(late.torch, "Event", Event)
        monkeypatch.setattr(difficulty, "_wait_for", self._finish)

    def _finish(self, device: torch.device) -> None:
        self.is_done = True
