"""When to keep all labels and when only a share of them (ReGATE, arXiv 2507.21420, Eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass

from regate_fx.errors import InvalidInput


@dataclass(frozen=True)
class DualCycle:
    """A dense warm-up, then cycles that begin with dense steps and go on with sparse ones.

    keep:   share of the candidate labels kept in a sparse step, between 0 and 1
    warmup: steps before the first cycle, all dense
    cycle:  steps in a cycle
    dense:  steps at the beginning of each cycle that keep everything

    Steps are optimizer steps, however many batches each accumulates. The defaults are the paper's: they keep
    (16 + 112 * 0.5) / 128 = 56 % of the candidates after the warm-up. Raises `InvalidInput`.
    """

    keep: float = 0.5
    warmup: int = 100
    cycle: int = 128
    dense: int = 16

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        if self.warmup < 0:
            raise InvalidInput("warmup", f"is {self.warmup} steps.", "Give 0 or more.")
        if self.cycle < 1:
            raise InvalidInput("cycle", f"is {self.cycle} steps.", "Give 1 or more.")
        if not 0 <= self.dense <= self.cycle:
            raise InvalidInput(
                "dense", f"is {self.dense} of the {self.cycle} steps of a cycle.", "Give 0 to that many."
            )

    def ratio(self, step: int) -> float:
        """The share of the candidates to keep in optimizer step `step`, counted from 0."""
        if step < self.warmup or (step - self.warmup) % self.cycle < self.dense:
            return 1.0
        return self.keep


def check_share(name: str, value: float) -> None:
    """Raise `InvalidInput` unless `value` lies between 0 and 1."""
    if not 0.0 <= value <= 1.0:
        raise InvalidInput(name, f"is {value}.", "Give a number between 0 and 1.")
