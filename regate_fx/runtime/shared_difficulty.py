"""Difficulties of a run with several ranks: each observes its own samples, all agree at the end of an epoch.

Shapes: B rows, S positions, n samples and T labels in the data set, k labels that one rank observed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from regate_fx.errors import InvalidInput, Unsupported
from regate_fx.runtime import ranks
from regate_fx.runtime.difficulty import Difficulty
from regate_fx.runtime.late import OnTheWay
from regate_fx.runtime.late_losses import LateLosses, LateQueue
from regate_fx.runtime.samples import Samples
from regate_fx.runtime.store import ReferenceLosses
from regate_fx.runtime.visits import Visits

logger = logging.getLogger("regate_fx")

Observed = Sequence[tuple[Tensor, Tensor]]
"""What each rank observed since the last exchange: int64 [k] labels, float32 [k] running means."""


class SharedDifficulty(Difficulty):
    """`Difficulty` of one process or of several, with a state that any number of them can go on from.

    With `on_host` the table stays in the host's memory. Losses are copied there through pinned memory and taken in when
    they have come, at the latest when one of their samples is looked up again: no step waits for the device for that,
    unless the same sample is in two steps in a row.
    """

    def __init__(self, losses: ReferenceLosses, beta: float = 0.9, on_host: bool = False) -> None:
        super().__init__(losses.labels, beta)
        self._queue = LateQueue() if on_host else None
        self._broken: InvalidInput | None = None
        self._losses = losses
        self._gathered: Observed | None = None
        self._visits = Visits(losses)
        self._is_loaded = False

    @property
    def repeats(self) -> int:
        """How often this rank observed a sample again within an epoch, as far as `exchange` told epochs apart."""
        return self._visits.repeats

    def known(self, samples: Samples) -> Tensor:
        """float32 [B, S]: `look_up` of the labels of a batch, on its device."""
        device = samples.slot.device
        if self._queue is None:
            return self.look_up(samples.slot)
        self._take_in(self._queue.up_to(samples.rows))
        found = self.look_up(samples.host_slot)
        return found if device.type == "cpu" else found.pin_memory().to(device, non_blocking=True)

    def observe(self, samples: Samples, loss: Tensor, counted: Tensor) -> None:
        """`update`, of which other ranks learn by `exchange`. loss: float [B, S]; counted: bool [B, S]."""
        self._gathered = None
        observed, apart = counted & samples.observed, ranks.count() > 1
        if self._queue is None:
            self.update(samples.slot, loss, observed, samples.ids, apart)
        else:
            coming = OnTheWay(loss.detach().float(), observed)
            self._queue.add(LateLosses(samples.host_slot, samples.ids, samples.rows, coming, apart))
            self._take_in(self._queue.arrived())
            self._raise_if_broken()
        self._visits.note(samples.rows)

    def settle(self) -> None:
        self._take_in_all()
        self._raise_if_broken()
        super().settle()

    def exchange(self) -> None:
        """Let every rank know what the others observed; a collective. Tells one process that an epoch has ended."""
        self._visits.begin()
        if ranks.count() == 1:
            self.settle()
            return
        self._take_in_all()
        observed, repeated = by_sample(ranks.gather_labels(*self.own), self._losses.starts)
        self._warn_of_repeats(repeated)
        self.merge(observed)
        self._gathered = None

    def gather(self) -> None:
        """Make `state` complete; a collective."""
        if ranks.count() > 1:
            self._take_in_all()
            self._gathered = ranks.gather_labels(*self.own)

    def state(self) -> dict[str, Any]:
        """ema: float32 [T] on the host; pending: bytes, what each rank observed since the last exchange.

        Raises `InvalidInput` for broken losses of the last batches, and `Unsupported` where several ranks train and
        `gather` was not called since the last batch.
        """
        self.settle()
        if ranks.count() > 1 and self._gathered is None:
            raise Unsupported(
                "the state of one rank",
                "what the others have observed since the last exchange would be lost.",
                "Call gate.gather() on every rank right before gate.state_dict(), or use gate.save().",
            )
        return {"ema": self.ema.detach().cpu().clone(), "pending": pack(self._gathered or [])}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, also of another number of ranks. Raises `InvalidInput` for one of other labels."""
        self._take_in_all()
        self._broken = None
        pending = unpack(state["pending"])
        same_ranks = len(pending) == ranks.count()
        self.load(state["ema"], pending[ranks.rank()] if same_ranks else None)
        if not same_ranks:
            self.merge(by_sample(pending, self._losses.starts)[0])
        self._gathered = None
        self._is_loaded = True
        self._visits.forget()

    def digest(self) -> str | None:
        """Tells states apart that were loaded; of what all ranks know. None where none was."""
        if not self._is_loaded:
            return None
        return hashlib.sha256(self.ema.cpu().contiguous().numpy().data).hexdigest()

    def _take_in_all(self) -> None:
        if self._queue is not None:
            self._take_in(self._queue.all())

    def _take_in(self, batches: Iterable[LateLosses]) -> None:
        """Raises nothing: in the middle of a collective the other ranks would wait for this one."""
        for batch in batches:
            loss, observed = batch.coming.wait()
            try:
                self.update(batch.slot, loss, observed, batch.ids, batch.apart)
            except InvalidInput as error:
                self._broken = self._broken or error

    def _raise_if_broken(self) -> None:
        broken, self._broken = self._broken, None
        if broken is not None:
            raise broken

    def _warn_of_repeats(self, rows: Tensor) -> None:
        samples = self._losses.ids[rows].tolist()
        if samples:
            logger.warning(
                "%d samples were observed by several ranks since the last exchange (ids %s%s); the lowest rank's "
                "losses count.",
                len(samples),
                samples[:5],
                ", ..." if len(samples) > 5 else "",
            )


def by_sample(observed: Observed, starts: Tensor) -> tuple[Observed, Tensor]:
    """What ranks observed, of a sample that several did only what the lowest of them did: its labels belong together.

    starts: int64 [n+1], each sample's first label; labels of a rank are ascending. Also the rows of such samples, on
    the host.
    """
    kept, device = [], observed[0][0].device if observed else starts.device
    starts = starts.to(device)
    taken = torch.zeros(len(starts) - 1, dtype=torch.bool, device=device)
    repeated = torch.zeros_like(taken)
    for slots, values in observed:
        bounds = torch.searchsorted(slots, starts)
        has = bounds[1:] > bounds[:-1]
        again = has & taken
        if bool(again.any()):
            others = ~again[torch.searchsorted(starts, slots, right=True) - 1]
            slots, values = slots[others], values[others]
        kept.append((slots, values))
        taken |= has
        repeated |= again
    return kept, repeated.nonzero().flatten().cpu()


def whole_ema(state: Mapping[str, Any], starts: Tensor | None = None) -> Tensor:
    """float32 [T]: the running means in a state, with what no rank has told the others yet.

    starts: of the reference losses, where they are at hand; see `by_sample`.
    """
    difficulty = Difficulty(len(state["ema"]))
    difficulty.load(state["ema"])
    pending = unpack(state["pending"])
    difficulty.merge(pending if starts is None else by_sample(pending, starts)[0])
    return difficulty.ema


def pack(observed: Observed) -> bytes:
    # Bytes, because checkpoints keep objects of any size, but tensors of one size only.
    tensors: dict[str, Tensor] = {}
    for rank, (slots, values) in enumerate(observed):
        tensors |= {f"{rank}.labels": slots.cpu().contiguous(), f"{rank}.ema": values.cpu().contiguous()}
    return safetensors.torch.save(tensors)


def unpack(packed: bytes) -> list[tuple[Tensor, Tensor]]:
    tensors = safetensors.torch.load(packed)
    return [(tensors[f"{rank}.labels"], tensors[f"{rank}.ema"]) for rank in range(len(tensors) // 2)]
