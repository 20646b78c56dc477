"""Difficulties of a run with several ranks: each observes its own samples, all agree at the end of an epoch.

Shapes: B rows, S positions, T labels in the data set, k labels that one rank observed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from regate_fx.errors import Unsupported
from regate_fx.runtime import ranks
from regate_fx.runtime.difficulty import Difficulty
from regate_fx.runtime.store import ReferenceLosses

logger = logging.getLogger("regate_fx")

Observed = Sequence[tuple[Tensor, Tensor]]
"""What each rank observed since the last exchange: int64 [k] labels, float32 [k] running means."""


class SharedDifficulty(Difficulty):
    """`Difficulty` of one process or of several, with a state that any number of them can go on from."""

    def __init__(self, losses: ReferenceLosses, beta: float = 0.9) -> None:
        super().__init__(losses.labels, beta)
        self._losses = losses
        self._gathered: Observed | None = None

    def observe(self, slot: Tensor, loss: Tensor, observed: Tensor, ids: Tensor) -> None:
        """`update`, of which other ranks learn by `exchange`."""
        self._gathered = None
        self.update(slot, loss, observed, ids, apart=ranks.count() > 1)

    def exchange(self) -> None:
        """Let every rank know what the others observed; a collective."""
        if ranks.count() == 1:
            return
        observed = ranks.gather_labels(*self.own)
        self._warn_of_repeats(observed)
        self.merge(observed)
        self._gathered = None

    def gather(self) -> None:
        """Make `state` complete; a collective."""
        if ranks.count() > 1:
            self._gathered = ranks.gather_labels(*self.own)

    def state(self) -> dict[str, Any]:
        """ema: float32 [T] on the host; pending: bytes, what each rank observed since the last exchange.

        Raises `Unsupported` where several ranks train and `gather` was not called since the last batch.
        """
        if ranks.count() > 1 and self._gathered is None:
            raise Unsupported(
                "the state of one rank",
                "what the others have observed since the last exchange would be lost.",
                "Call gate.gather() on every rank right before gate.state_dict(), or use gate.save().",
            )
        return {"ema": self.ema.detach().cpu().clone(), "pending": pack(self._gathered or [])}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, also of another number of ranks. Raises `InvalidInput` for one of other labels."""
        pending = unpack(state["pending"])
        same_ranks = len(pending) == ranks.count()
        self.load(state["ema"], pending[ranks.rank()] if same_ranks else None)
        if not same_ranks:
            self.merge(pending)
        self._gathered = None

    def _warn_of_repeats(self, observed: Observed) -> None:
        slots, times = torch.cat([slots for slots, _ in observed]).unique(return_counts=True)
        rows = torch.searchsorted(self._losses.starts, slots[times > 1].cpu(), right=True) - 1
        samples = self._losses.ids[rows.unique()].tolist()
        if samples:
            logger.warning(
                "%d samples were observed by several ranks since the last exchange (ids %s%s); the lowest rank's "
                "losses count.",
                len(samples),
                samples[:5],
                ", ..." if len(samples) > 5 else "",
            )


def whole_ema(state: Mapping[str, Any]) -> Tensor:
    """float32 [T]: the running means in a state, with what no rank has told the others yet."""
    difficulty = Difficulty(len(state["ema"]))
    difficulty.load(state["ema"])
    difficulty.merge(unpack(state["pending"]))
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
