"""Every error the software raises on purpose.

Each message says what was wrong, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class RegateError(Exception):
    """Base class of everything `regate_fx` raises on purpose."""


class InvalidInput(RegateError, ValueError):
    """An argument of a gated call is wrong; raised before anything is computed.

    `argument` is the name the caller used.
    """

    def __init__(self, argument: str, problem: str, remedy: str) -> None:
        self.argument = argument
        super().__init__(f"{argument}: {problem} {remedy}")


class Unsupported(RegateError, NotImplementedError):
    """The request is understood and refused, because it cannot be answered exactly."""

    def __init__(self, what: str, why: str, remedy: str) -> None:
        self.what = what
        super().__init__(f"{what} is not supported: {why} {remedy}")


class StoreError(RegateError):
    """Something is wrong with reference losses or a saved state. `where` names the file or folder."""

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        self.where = where
        super().__init__(f"{where}: {problem} {remedy}")


class StoreMismatch(StoreError):
    """Reference losses, or a saved state, are not there or belong to something else."""


class StoreDamaged(StoreError):
    """A file of a store is missing, or is not what was written. Nothing was read from it."""


class StoreUnwritable(StoreError):
    """A file of a store could not be written: no space, no permission, no locks. What was published before stays."""


@dataclass(frozen=True)
class LayerRefusal:
    """Why one layer (or the graph as a whole, `layer=None`) is not gated.

    `code` is stable and meant for programs; `reason` is a sentence for people; `source` is the line of
    model code the offending operator came from, empty when the capture did not record one.
    """

    layer: int | None
    code: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        where = "model" if self.layer is None else f"layer {self.layer}"
        line = f" [{self.source}]" if self.source else ""
        return f"{where}: {self.reason}{line} ({self.code})"


class Bypassed(RegateError):
    """A training loss was computed without the gated model's forward; raised before an optimizer steps on it."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} without the gate: somebody has replaced the forward of the gated model, or calls its backbone and "
            "head directly, as fused losses of trainers and kernels do. Every token would be computed and trained. "
            "Use regate_fx.integrations.attach where the trainer is Trainer or SFTTrainer; else leave out the fused "
            "loss, or the gate."
        )


class NotGateable(RegateError):
    """No decoder layer of the model can be gated soundly; one reason per layer."""

    def __init__(self, refusals: Sequence[LayerRefusal]) -> None:
        self.refusals = tuple(refusals)
        lines = "\n".join(f"  - {refusal}" for refusal in self.refusals)
        super().__init__(
            "nothing in this model can be gated:\n"
            f"{lines}\n"
            "Train it without a token mask, or report the operators named above."
        )


class PassFailed(RegateError):
    """A pass broke the graph or an invariant; names the pass and those that ran before it."""

    def __init__(self, name: str, before: Sequence[str], problem: str) -> None:
        self.name = name
        self.before = tuple(before)
        ran = ", ".join(before) or "none"
        super().__init__(f"pass {name!r} failed after [{ran}]: {problem}")


class ValidationFailed(RegateError):
    """The compiled graph disagrees with the untouched model; the call was stopped before training on it."""

    def __init__(self, check: str, problem: str) -> None:
        self.check = check
        super().__init__(
            f"translation validation ({check}) failed: {problem} "
            "The model is refused rather than trained on a wrong loss or gradient; "
            "please report it. validate=False skips this check at your own risk."
        )
