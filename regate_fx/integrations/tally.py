"""What a gate chose and a model counted since somebody last asked. Nothing waits for the device until then.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regate_fx.report import BatchTokens, Report
from regate_fx.runtime.gate import Choice


@dataclass(frozen=True)
class _Chosen:
    """One batch: its length S, each row's tokens and active positions (int64 [B] where only the mask tells)."""

    length: int
    real: tuple[int, ...]
    active: tuple[int, ...] | Tensor
    ratio: float

    def tokens(self) -> BatchTokens:
        active = tuple(self.active.tolist()) if isinstance(self.active, Tensor) else self.active
        return BatchTokens(self.length, self.real, active)


@dataclass(frozen=True)
class Totals:
    """Sums over batches; of several ranks they add up.

    batches: how many; ratios: of the shares of candidates that the schedule kept; active: positions computed;
    dense, gated: estimated forward FLOPs of the untouched model and of the gated one; expected, counted: labels, as
    counted on the host beforehand and by the model.
    """

    batches: float = 0.0
    ratios: float = 0.0
    active: float = 0.0
    dense: float = 0.0
    gated: float = 0.0
    expected: float = 0.0
    counted: float = 0.0

    def metrics(self) -> dict[str, float]:
        """For a log; empty where nothing was chosen."""
        if not self.batches:
            return {}
        saved = {"regate/flops_saved": 1 - self.gated / self.dense} if self.dense else {}
        return {"regate/active_tokens": self.active, "regate/keep_ratio": self.ratios / self.batches, **saved}


class Tally:
    """Remembers what a gate chose; a watcher of it.

    batches: training calls so far. remember: False where nobody will ask for totals.
    """

    def __init__(self, remember: bool = True) -> None:
        self.batches = 0
        self._remember = remember
        self._chosen: list[_Chosen] = []
        self._expected = 0
        self._counted: Tensor | int = 0

    def __call__(self, choice: Choice, output: Any) -> None:
        self.batches += 1
        if not self._remember:
            return
        counts = choice.samples.counts
        rows = counts.rows(choice.ratio)
        active = choice.token_mask.sum(1) if rows is None else rows
        self._chosen.append(_Chosen(choice.token_mask.shape[1], counts.real, active, choice.ratio))
        expected = counts.counted(choice.ratio)
        if expected is not None:
            self._expected += expected
            self._counted = self._counted + output.counted.sum()

    def totals(self, report: Report | None) -> Totals:
        """The sums since the last call, and begin anew. report: of the model, for the FLOPs."""
        batches = [chosen.tokens() for chosen in self._chosen]
        costs = [report.cost_of(tokens) for tokens in batches] if report and report.cost_of else []
        totals = Totals(
            batches=len(batches),
            ratios=sum(chosen.ratio for chosen in self._chosen),
            active=sum(sum(tokens.active) for tokens in batches),
            dense=sum(cost.dense for cost in costs),
            gated=sum(cost.gated for cost in costs),
            expected=self._expected,
            counted=int(self._counted),
        )
        self._chosen, self._expected, self._counted = [], 0, 0
        return totals
