"""How hard each label still is for the student: a running mean of its losses (ReGATE, Eq. 2).

Shapes: B samples, S positions, T labels in the data set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regate_fx.errors import InvalidInput


class Difficulty:
    """Exponential moving average of the student's loss on every label of the data set.

    `ema <- beta * ema + (1 - beta) * loss`; the first observation of a label sets it. One float32 a label, NaN
    where the label was never observed. The table moves once to the device of the losses that it is given.
    """

    def __init__(self, labels: int, beta: float = 0.9) -> None:
        """labels: T; beta: decay, at least 0 and below 1. Raises `InvalidInput`."""
        if not 0.0 <= beta < 1.0:
            raise InvalidInput("beta", f"is {beta}.", "Give a decay of at least 0 and below 1.")
        self.beta = beta
        # The last entry belongs to no label and stays NaN; slot -1 reads it.
        self._table = torch.full((labels + 1,), torch.nan)
        self._unchecked: _BrokenLosses | None = None

    @property
    def ema(self) -> Tensor:
        """float32 [T]: the running mean of each label, NaN where it was never observed."""
        return self._table[:-1]

    def load(self, ema: Tensor) -> None:
        """Take over a table float32 [T]. Raises `InvalidInput` where its length differs."""
        if ema.shape != self.ema.shape:
            raise InvalidInput(
                "ema",
                f"has {list(ema.shape)} entries, the data set {list(self.ema.shape)} labels.",
                "Load the state of a run over the same data set.",
            )
        self.ema.copy_(ema)

    def look_up(self, slot: Tensor) -> Tensor:
        """float32 [B, S]: the running mean of each label, NaN where there is none.

        slot: int64 [B, S], the number of each label in the data set, -1 where there is no label.
        """
        self._table = self._table.to(slot.device)
        return self._table[slot]

    def update(self, slot: Tensor, loss: Tensor, observed: Tensor, ids: Tensor) -> None:
        """Take in the losses of one batch.

        slot: int64 [B, S], unique where `observed`; loss: float [B, S]; observed: bool [B, S]; ids: int64 [B, S] on
        the host, the sample of each position.
        Raises `InvalidInput` that names the sample where an observed loss is NaN or infinite, and changes nothing
        then. On an accelerator nothing changes either, but the error comes with a later batch: none waits for
        the device.
        """
        observed = observed & (slot >= 0)
        loss = loss.detach().float()
        broken = observed & ~loss.isfinite()
        self._check(broken, ids)
        before = self.look_up(slot)
        after = torch.where(before.isnan(), loss, torch.lerp(loss, before, self.beta))
        stored = observed & ~broken.any()
        self._table[torch.where(stored, slot, -1)] = torch.where(stored, after, torch.nan)

    def _check(self, broken: Tensor, ids: Tensor) -> None:
        if broken.device.type == "cpu":
            _BrokenLosses(broken, ids).check()
            return
        if self._unchecked is not None:
            if not self._unchecked.arrived():
                return
            self._unchecked.check()
        self._unchecked = _BrokenLosses(broken, ids)


class _BrokenLosses:
    """Which losses of a batch are NaN or infinite, on their way from the device to the host."""

    def __init__(self, broken: Tensor, ids: Tensor) -> None:
        self._ids = ids
        self._broken = broken.to("cpu", non_blocking=True)
        self._copied = None if broken.device.type == "cpu" else torch.Event(broken.device)
        if self._copied is not None:
            self._copied.record()

    def arrived(self) -> bool:
        return self._copied is None or self._copied.query()

    def check(self) -> None:
        if not bool(self._broken.any()):
            return
        row, position = self._broken.nonzero()[0].tolist()
        raise InvalidInput(
            "token_loss",
            f"the loss of sample {int(self._ids[row, position])} is NaN or infinite at label {position} of "
            f"its row ({int(self._broken.sum())} such labels in the batch); no difficulty was changed.",
            "Look at this sample, the learning rate and the precision before training on.",
        )
