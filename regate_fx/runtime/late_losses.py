"""Losses on their way from a device to a table of difficulties on the host.

Shapes: B samples, S positions, G documents of a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from regate_fx.runtime.late import OnTheWay


@dataclass(frozen=True)
class LateLosses:
    """The losses of one batch, on their way to a table on the host.

    slot:     int64 [B, S], the number of each label in the data set, -1 where there is none
    ids:      int64 [B, S], the sample of each position
    rows:     int64 [G], where each document's sample is in the store, -1 for none
    coming:   float32 [B, S] losses, and bool [B, S] which of them are observed
    apart:    other ranks train as well
    """

    slot: Tensor
    ids: Tensor
    rows: Tensor
    coming: OnTheWay
    apart: bool


class LateQueue:
    """Losses of batches in the order in which these were trained on, which is that in which they are taken in."""

    def __init__(self) -> None:
        self._coming: deque[LateLosses] = deque()

    def add(self, losses: LateLosses) -> None:
        self._coming.append(losses)

    def arrived(self) -> Iterator[LateLosses]:
        """Those that have come, without waiting for any."""
        while self._coming and self._coming[0].coming.arrived():
            yield self._coming.popleft()

    def up_to(self, rows: Tensor) -> Iterator[LateLosses]:
        """Those that have come, and all up to the last one of these samples (int64 [G]), for which it waits."""
        yield from self.arrived()
        last = max((at for at, losses in enumerate(self._coming) if _share(losses.rows, rows)), default=-1)
        for _ in range(last + 1):
            yield self._coming.popleft()

    def all(self) -> Iterator[LateLosses]:
        """All of them; waits for the last."""
        while self._coming:
            yield self._coming.popleft()


def _share(some: Tensor, others: Tensor) -> bool:
    return bool(torch.isin(some[some >= 0], others).any())
