"""How hard each label still is for the student: a running mean of its losses (ReGATE, Eq. 2).

Shapes: B samples, S positions, T labels in the data set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.runtime.late import LateChecks


class Difficulty:
    """Exponential moving average of the student's loss on every label of the data set.

    `ema <- beta * ema + (1 - beta) * loss`; the first observation of a label sets it. One float32 a label, NaN
    where the label was never observed. The table moves once to the device of the losses that it is given.

    Where several ranks train together, a rank sees its own observations at once and those of the others after
    `exchange`; until then they lie in a second table.
    """

    def __init__(self, labels: int, beta: float = 0.9) -> None:
        """labels: T; beta: decay, at least 0 and below 1. Raises `InvalidInput`."""
        if not 0.0 <= beta < 1.0:
            raise InvalidInput("beta", f"is {beta}.", "Give a decay of at least 0 and below 1.")
        self.beta = beta
        # The last entry belongs to no label and stays NaN; slot -1 reads it.
        self._table = torch.full((labels + 1,), torch.nan)
        self._own: Tensor | None = None
        self._late = LateChecks()

    @property
    def ema(self) -> Tensor:
        """float32 [T]: the running mean of each label, NaN where it was never observed; with several ranks, as it
        was at the last exchange."""
        return self._table[:-1]

    @property
    def late(self) -> LateChecks:
        """What the device has not judged yet of the batches so far; `settle` waits for it."""
        return self._late

    @property
    def own(self) -> tuple[Tensor, Tensor]:
        """What this rank has observed since the last exchange: int64 [k] labels and float32 [k] running means."""
        if self._own is None:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        slots = (~self._own.isnan()).nonzero().flatten()
        return slots, self._own[slots]

    def load(self, ema: Tensor, own: tuple[Tensor, Tensor] | None = None) -> None:
        """Take over a table float32 [T], and what this rank had besides. Raises `InvalidInput` where lengths
        differ."""
        if ema.shape != self.ema.shape:
            raise InvalidInput(
                "ema",
                f"has {list(ema.shape)} entries, the data set {list(self.ema.shape)} labels.",
                "Load the state of a run over the same data set.",
            )
        self.ema.copy_(ema)
        self._own, self._late = None, LateChecks()
        if own is not None and len(own[0]):
            self._apart()[own[0].to(self._table.device)] = own[1].to(self._table.device)

    def merge(self, observed: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take over what each rank observed, in the order of ranks; of a label that several have, the first.

        Raises as `settle`, after it.
        """
        for slots, values in reversed(observed):
            self._table[slots.to(self._table.device)] = values.to(self._table.device)
        if self._own is not None:
            self._own.fill_(torch.nan)
        self.settle()

    def settle(self) -> None:
        """Wait until the device has judged all losses that it was given; raises what `update` would have raised later.

        No batch need follow: at the end of an epoch, and where a state is taken, nothing may be left unsaid.
        """
        _wait_for(self._table.device)
        self._late.check(torch.zeros(0, dtype=torch.bool), lambda found: _broken_losses(found, found))

    def look_up(self, slot: Tensor) -> Tensor:
        """float32 [B, S]: the running mean of each label, NaN where there is none.

        slot: int64 [B, S], the number of each label in the data set, -1 where there is no label.
        """
        self._table = self._table.to(slot.device)
        shared = self._table[slot]
        if self._own is None:
            return shared
        own = self._apart()[slot]
        return torch.where(own.isnan(), shared, own)

    def update(self, slot: Tensor, loss: Tensor, observed: Tensor, ids: Tensor, apart: bool = False) -> None:
        """Take in the losses of one batch.

        slot: int64 [B, S], unique where `observed`; loss: float [B, S]; observed: bool [B, S]; ids: int64 [B, S] on
        the host, the sample of each position; apart: other ranks train as well, and learn of it by `merge`.
        Raises `InvalidInput` that names the sample where an observed loss is NaN or infinite, and changes nothing
        then. On an accelerator nothing changes either, but the error comes with a later batch, or from `settle`: no
        batch waits for the device.
        """
        observed = observed & (slot >= 0)
        loss = loss.detach().float()
        broken = observed & ~loss.isfinite()
        self._late.check(broken, lambda found: _broken_losses(found, ids))
        before = self.look_up(slot)
        after = torch.where(before.isnan(), loss, torch.lerp(loss, before, self.beta))
        stored = observed & ~broken.any()
        table = self._apart() if apart else self._table
        table[torch.where(stored, slot, -1)] = torch.where(stored, after, torch.nan)

    def _apart(self) -> Tensor:
        if self._own is None:
            self._own = torch.full_like(self._table, torch.nan)
        self._own = self._own.to(self._table.device)
        return self._own


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        event = torch.Event(device)
        event.record()
        event.synchronize()


def _broken_losses(broken: Tensor, ids: Tensor) -> InvalidInput:
    """broken: bool [B, S]; ids: int64 [B, S], both on the host."""
    row, position = broken.nonzero()[0].tolist()
    return InvalidInput(
        "token_loss",
        f"the loss of sample {int(ids[row, position])} is NaN or infinite at label {position} of "
        f"its row ({int(broken.sum())} such labels in the batch); no difficulty was changed.",
        "Look at this sample, the learning rate and the precision before training on.",
    )
