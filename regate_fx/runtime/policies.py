"""Which labels are worth training on: the policies that ship, and what one of your own has to be.

Shapes: S positions, G documents (one a row of the batch, or several in a packed row).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.runtime.schedule import check_share

Combination = Literal["additive", "convex"]
PolicyName = Literal["regate", "random", "loss", "reference", "rho1"]


@dataclass(frozen=True)
class Signals:
    """What a policy may go by. Every document has a row of its own; all tensors are on the same device.

    ema:       float32 [G, S]  running mean of the student's losses on each label, NaN where there is none yet
    teacher:   float32 [G, S]  the teacher's losses, 0 where there is no label; None without a teacher pass
    slot:      int64 [G, S]    number of each label in the data set, -1 where there is no label
    sample_id: int64 [G, 1]
    step:      optimizer steps done so far
    """

    ema: Tensor
    teacher: Tensor | None
    slot: Tensor
    sample_id: Tensor
    step: int

    @property
    def reference(self) -> Tensor:
        """`teacher`. Raises `InvalidInput` where no teacher has looked at the data."""
        if self.teacher is None:
            raise InvalidInput(
                "policy",
                "needs a teacher's losses, and a table of labels has none.",
                "Run teacher_losses, or choose 'random' or 'loss'.",
            )
        return self.teacher

    @property
    def label(self) -> Tensor:
        """int64 [G, S]: number of each label in its sample, from 0 on; below 0 where there is no label."""
        labelled = self.slot >= 0
        first = self.slot.masked_fill(~labelled, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        return torch.where(labelled, self.slot - first, -1)


class Policy(Protocol):
    """Scores labels. The highest scores of each sample are kept.

    It has to be a dataclass, best a frozen one: its fields, plain values, go into the gate's state, so that a run goes
    on with the policy it began with.
    """

    def score(self, signals: Signals) -> Tensor:
        """float [G, S]; NaN where the policy cannot say: such a label ranks with the mean of the others of its
        document. Scores of positions without label are not looked at.

        It must depend on nothing but its fields and the signals, so that a resumed run and every rank choose alike:
        no generator, no state, no order of the batch.
        """
        ...


@dataclass(frozen=True)
class TwoSignals:
    """ReGATE's own score (arXiv 2507.21420, Eq. 3), policy "regate".

    combine: "additive": `ema + weight * reference`, Eq. 3; "convex": `(1 - weight) * ema + weight * reference`, with
             which 1 means reference only and 0 difficulty only, as in the paper's ablation
    weight:  lambda, at least 0, and at most 1 where convex

    A label not seen yet counts with the mean `ema` of the seen ones of its sample, 0 if there is none.
    """

    combine: Combination = "additive"
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.combine not in ("additive", "convex"):
            raise InvalidInput("combine", f"is {self.combine!r}.", "Use 'additive' or 'convex'.")
        if self.combine == "convex":
            check_share("weight", self.weight)
        elif not 0.0 <= self.weight < float("inf"):
            raise InvalidInput("weight", f"is {self.weight}.", "Give a finite number of at least 0.")

    def score(self, signals: Signals) -> Tensor:
        ema = unknown_as_mean(signals.ema.double()).nan_to_num()
        own = 1.0 - self.weight if self.combine == "convex" else 1.0
        return own * ema + self.weight * signals.reference.double()


@dataclass(frozen=True)
class Random:
    """A random subset, policy "random": the baseline that every other one has to beat.

    It is the choice of random-LTD (arXiv 2211.11586), a uniform draw, made for output tokens only, and once a step for
    all layers. random-LTD draws anew in every middle layer, from all tokens, and raises their number along the run.

    The draw is a hash of seed, sample, label and optimizer step: the same on every device, after a resume, and for any
    number of ranks. A sample gets another draw in each step, and the same one if it comes twice within a step.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int):
            raise InvalidInput("seed", f"is {self.seed!r}.", "Give an integer.")

    def score(self, signals: Signals) -> Tensor:
        # Absorbed one after the other, so that (1, 0) and (0, 1) are two inputs.
        state = _mixed(signals.sample_id + _mixed_number(self.seed, signals.step))
        # 53 bits are what a float64 holds exactly.
        return (_mixed(state + signals.label) & (2**53 - 1)).double()


@dataclass(frozen=True)
class Loss:
    """The student's difficulty alone, policy "loss": what ReGATE is without its teacher.

    Nothing is known of a sample before its first visit; a sparse step then keeps its earliest labels. Choose a schedule
    whose warm-up covers the first epoch.
    """

    def score(self, signals: Signals) -> Tensor:
        return signals.ema


@dataclass(frozen=True)
class Reference:
    """The teacher's loss alone, policy "reference": the same labels in every visit."""

    def score(self, signals: Signals) -> Tensor:
        return signals.reference


@dataclass(frozen=True)
class ExcessLoss:
    """The student's loss minus the teacher's, policy "rho1".

    RHO-1 (arXiv 2404.07965) ranks the tokens of a batch by the loss of the model as it is in this step minus that of
    a reference model trained on clean text, and takes the top share into the loss: high where the model is behind what
    can be learned, low on noise, which the reference model does not predict either. Here the student's side is the
    running mean, because selection comes before the step that would tell its loss; the reference side is the teacher
    pass; and the share is kept per sample. A label not seen yet ranks with the mean excess of the seen ones of its
    sample; see `Loss` for what that means in the first epoch.

    With the default teacher, the text half of the model itself, words that need the picture rank LAST, the opposite of
    ReGATE. For what RHO-1 is about, give `teacher_losses` a `teacher=` that was trained on text you trust.
    """

    def score(self, signals: Signals) -> Tensor:
        return signals.ema.double() - signals.reference.double()


_SHIPPED: Mapping[str, type[Policy]] = {
    "regate": TwoSignals,
    "random": Random,
    "loss": Loss,
    "reference": Reference,
    "rho1": ExcessLoss,
}


def policy_named(name: str, **fields: Any) -> Policy:
    """One of the policies that ship. Raises `InvalidInput`."""
    if name not in _SHIPPED:
        raise InvalidInput(
            "policy", f"is {name!r}.", f"Use one of {sorted(_SHIPPED)}, or an object with a score method."
        )
    return _SHIPPED[name](**fields)


def chosen_policy(policy: PolicyName | Policy, weight: float | None, combine: Combination | None) -> Policy:
    """A policy by its name or as it is; weight and combine: settings of "regate". Raises `InvalidInput` where they are
    given for another."""
    own = {name: value for name, value in (("combine", combine), ("weight", weight)) if value is not None}
    if isinstance(policy, str):
        if own and policy != "regate":
            raise InvalidInput(
                next(iter(own)), f"is a setting of policy 'regate', not of {policy!r}.", "Leave it out."
            )
        return policy_named(policy, **own)
    if own:
        raise InvalidInput(
            next(iter(own)), "is a setting of policy 'regate'.", "Leave it out, or set it in your own policy."
        )
    return policy


def policy_settings(policy: Policy) -> dict[str, Any]:
    """What a policy adds to the gate's state: its name under `policy`, and each field under `policy.<field>`.

    Raises `InvalidInput` where it is no dataclass, or a field cannot be compared with a saved one.
    """
    if not is_dataclass(policy) or isinstance(policy, type) or not callable(getattr(policy, "score", None)):
        raise InvalidInput(
            "policy",
            f"is {policy!r}, which is no dataclass object with a score method.",
            f"Use one of {sorted(_SHIPPED)}, or an object of a class of your own under @dataclass(frozen=True).",
        )
    fields = asdict(policy)
    for field, value in fields.items():
        if not _is_plain(value):
            raise InvalidInput(
                "policy",
                f"{type(policy).__name__}.{field} is a {type(value).__name__}, which a checkpoint cannot be "
                "compared by.",
                "Use numbers, strings, None, or tuples of them.",
            )
    names = {shipped: name for name, shipped in _SHIPPED.items()}
    name = names.get(type(policy), type(policy).__name__)
    return {"policy": name} | {f"policy.{field}": value for field, value in fields.items()}


def policy_of(settings: Mapping[str, Any]) -> Policy:
    """The inverse of `policy_settings`, for policies that ship. Raises `InvalidInput` for any other."""
    prefix = "policy."
    fields = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
    return policy_named(settings["policy"], **fields)


def unknown_as_mean(values: Tensor) -> Tensor:
    """[G, S] with the mean of the other entries of the row for NaN; NaN where there are no others."""
    return torch.where(values.isnan(), values.nanmean(1, keepdim=True), values)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _mixed(values: Tensor) -> Tensor:
    """A 64-bit finaliser (splitmix64's constants); products wrap around, shifts bring in zeros."""
    values = (values ^ (values >> 30 & 2**34 - 1)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> 27 & 2**37 - 1)) * _signed(0x94D049BB133111EB)
    return values ^ (values >> 31 & 2**33 - 1)


def _mixed_number(seed: int, step: int) -> int:
    """A hash of two numbers, as a signed 64-bit integer."""
    mixed = _mixed(_mixed(torch.tensor(_signed(seed))) + step)
    return int(mixed)


def _signed(number: int) -> int:
    """The signed 64-bit integer with the last 64 bits of a number."""
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number
