"""Which samples a process has observed in this epoch, so that one that comes again does not go unnoticed.

Shapes: n samples of the data set, G documents of a batch.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from regate_fx.runtime import ranks
from regate_fx.runtime.store import ReferenceLosses

logger = logging.getLogger("regate_fx")

_MESSAGE = (
    "sample %d was observed again by this process since the last gate.exchange(): its difficulty has taken in both "
    "losses. If an epoch has passed in between, call gate.exchange() on every process at its end; until then none "
    "learns what the others observed. Else the data set or the sampler has the sample twice. This is said once; "
    "gate.difficulty.repeats counts on."
)


class Visits:
    """A bit a sample on the host, set when it is observed and cleared at each exchange.

    One process that never exchanges does not say when its epochs end; then nothing is counted.

    repeats: how often a sample came again within an epoch
    """

    def __init__(self, losses: ReferenceLosses) -> None:
        self._losses = losses
        self._seen: Tensor | None = None
        self._epochs_are_told = False
        self._has_warned = False
        self.repeats = 0

    def begin(self) -> None:
        """An epoch begins."""
        self._epochs_are_told = True
        self.forget()

    def forget(self) -> None:
        """Nothing is known of the samples observed so far: a state was loaded."""
        self._seen = None

    def note(self, rows: Tensor) -> None:
        """Samples are observed; rows: int64 [G], on the host, where they are in the store, -1 for none."""
        if ranks.count() == 1 and not self._epochs_are_told:
            return
        if self._seen is None:
            self._seen = torch.zeros(len(self._losses), dtype=torch.bool)
        found, times = rows[rows >= 0].unique(return_counts=True)
        again = self._seen[found] | (times > 1)
        self._seen[found] = True
        if not bool(again.any()):
            return
        self.repeats += int(again.sum())
        if not self._has_warned:
            self._has_warned = True
            logger.warning(_MESSAGE, int(self._losses.ids[found[again][0]]))
