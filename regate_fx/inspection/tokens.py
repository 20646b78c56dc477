"""One sample, token by token: what was kept, and why the rest was not.

Shapes: S positions, k labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.inspection.data import TokenTexts
from regate_fx.inspection.run import Run, labels_of_row, reference_of_row
from regate_fx.runtime import DualCycle, Policy, ReferenceLosses, ReGate, Signals
from regate_fx.runtime.label_table import has_teacher
from regate_fx.runtime.policies import policy_named, policy_of, policy_settings
from regate_fx.runtime.select import keep_top, kept_counts, places, scores


class Standing(StrEnum):
    """What a token is to selection."""

    PROMPT = "prompt"
    VISUAL = "visual"
    SPECIAL = "special"
    FREE = "free"
    UNPREDICTED = "unpredicted"
    KEPT = "kept"
    DROPPED = "dropped"
    LABEL = "label"


@dataclass(frozen=True)
class TokenView:
    """One token. Of a prompt or visual token all that follows `standing` is None or empty.

    position:  in the sequence; without the data set, number of the label in its sample
    computed:  its own position goes through the decoder
    counted:   its label is in the loss
    reference: the teacher's loss; ema: the student's running mean, None where never observed
    rank:      from 1, among the labels that compete
    """

    position: int
    text: str
    standing: Standing
    computed: bool | None = None
    counted: bool | None = None
    reference: float | None = None
    ema: float | None = None
    score: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class SampleView:
    """One sample. competing: labels that are ranked; kept: how many of them; keep: their share."""

    sample_id: int
    tokens: tuple[TokenView, ...]
    competing: int
    kept: int
    keep: float
    policy: str

    @property
    def labels(self) -> list[TokenView]:
        return [token for token in self.tokens if token.standing not in (Standing.PROMPT, Standing.VISUAL)]

    def reason(self, token: TokenView) -> str:
        """Why a token is computed or not, as a sentence."""
        place = f"rank {token.rank} of {self.competing} by {self.policy}, and the first {self.kept} are kept"
        return {
            Standing.PROMPT: "No label: always computed.",
            Standing.VISUAL: "Stands for a picture: always computed.",
            Standing.SPECIAL: "A special label: always in the loss.",
            Standing.FREE: "In the loss at no cost: its prediction is computed in any case.",
            Standing.UNPREDICTED: "No position predicts it: never in the loss.",
            Standing.KEPT: f"Kept: {place}.",
            Standing.DROPPED: f"Dropped: {place}.",
            Standing.LABEL: f"Rank {token.rank} of {self.competing} by {self.policy}; which labels compete and "
            "are kept can be told with the data set.",
        }[token.standing]


class SampleViewer:
    """Makes `SampleView`s of a run, at a share and by a policy that may be other than the run's own."""

    def __init__(
        self,
        run: Run,
        losses: ReferenceLosses,
        *,
        keep: float | None = None,
        policy: str | Policy | None = None,
        collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        """By default the run's own share and policy, else half and "regate". Raises `InvalidInput`."""
        self._losses = losses
        self._keep = float(run.setting("keep", 0.5)) if keep is None else keep
        chosen = _policy(run, losses) if policy is None else policy
        self._policy = policy_named(chosen) if isinstance(chosen, str) else chosen
        self.gate = ReGate(
            losses,
            schedule=DualCycle(keep=self._keep, warmup=0, cycle=1, dense=0),
            policy=self._policy,
            special_ids=run.setting("special_ids", ()),
            visual_ids=run.setting("visual_ids", ()),
            align=run.setting("align", "predictor"),
            shifted=run.setting("shifted", True),
            collator=collator,
        )
        if run.state is not None:
            self.gate.difficulty.load(run.state.ema)
            self.gate.global_step = run.state.step

    def bare(self, sample_id: int) -> SampleView:
        """A sample of which only the store and the state are known. Raises `InvalidInput` for an unknown id."""
        row = int(self._losses.find(torch.tensor([sample_id])))
        at, reference = labels_of_row(self._losses, row), reference_of_row(self._losses, row)
        ema = self.gate.difficulty.ema[at].cpu()
        signals = Signals(
            ema=ema[None],
            teacher=reference[None] if has_teacher(self._losses) else None,
            slot=torch.arange(at.start, at.stop)[None],
            sample_id=torch.tensor([[sample_id]]),
            step=self.gate.global_step,
        )
        score = scores(self._policy, signals) if len(reference) else torch.zeros(1, 0, dtype=torch.float64)
        place = places(score, torch.ones_like(score, dtype=torch.bool))
        tokens = tuple(
            TokenView(
                position=number,
                text=f"{number} ",
                standing=Standing.LABEL,
                reference=float(reference[number]),
                ema=_known(ema[number]),
                score=float(score[0, number]),
                rank=int(place[0, number]) + 1,
            )
            for number in range(len(reference))
        )
        count = math.ceil(self._keep * len(tokens))
        return SampleView(sample_id, tokens, len(tokens), count, self._keep, self._name)

    def whole(self, example: Mapping[str, Any], texts: TokenTexts) -> SampleView:
        """An example of the data set, as training would select from it now.

        Raises `InvalidInput` where its labels are not those the teacher saw.
        """
        batch = self.gate.collate([example])
        found = self._columns(batch)
        positions = found["real"].nonzero().flatten()
        named = zip(positions.tolist(), texts.of_sequence(found["shown"][positions].tolist()), strict=True)
        tokens = tuple(self._token(position, text, found) for position, text in named)
        competing = int(found["candidate"].sum())
        kept = int(found["chosen"].sum())
        return SampleView(int(example["sample_id"]), tokens, competing, kept, self._keep, self._name)

    def label_signals(self, example: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each label of an example: its token int64 [k], the teacher's loss and the running mean float32 [k].

        Raises `InvalidInput` where the labels are not those the teacher saw.
        """
        batch = self.gate.collate([example])
        samples = batch["sample_id"]
        label = samples.slot >= 0
        ema = self.gate.difficulty.look_up(samples.slot)
        return batch["labels"][label], samples.reference[label], ema[label]

    @property
    def _name(self) -> str:
        return str(policy_settings(self._policy)["policy"])

    def _columns(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """By name, [S]: everything that is known of the positions and labels of one row."""
        choice, rules = self.gate.choose(batch), self.gate.rules
        samples, score = choice.samples, self.gate.score(batch)
        label, candidate = samples.slot >= 0, samples.candidate
        place = places(score, candidate)
        labels, ids = batch["labels"], batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.shape != labels.shape:
            ids = torch.full_like(labels, -1)
        columns = {
            "shown": torch.where(label, labels, ids),
            "real": samples.real,
            "label": label,
            "candidate": candidate,
            "chosen": keep_top(score, candidate, kept_counts(samples.candidates, self._keep)),
            "computed": choice.token_mask,
            "counted": rules.predicted(choice.token_mask) & label,
            "predicted": rules.predicted(samples.real) & label,
            "special": torch.isin(labels, torch.tensor(rules.special_ids, dtype=torch.int64)),
            "visual": torch.isin(ids, torch.tensor(rules.visual_ids, dtype=torch.int64)),
            "reference": samples.reference,
            "ema": self.gate.difficulty.look_up(samples.slot),
            "score": score,
            "rank": place + 1,
        }
        return {name: values[0] for name, values in columns.items()}

    def _token(self, position: int, text: str, found: dict[str, Tensor]) -> TokenView:
        def flag(name: str) -> bool:
            return bool(found[name][position])

        standing = _standing(flag)
        if standing in (Standing.PROMPT, Standing.VISUAL):
            return TokenView(position, text, standing)
        return TokenView(
            position,
            text,
            standing,
            computed=flag("computed"),
            counted=flag("counted"),
            reference=float(found["reference"][position]),
            ema=_known(found["ema"][position]),
            score=float(found["score"][position]),
            rank=int(found["rank"][position]) if flag("candidate") else None,
        )


def _standing(flag: Callable[[str], bool]) -> Standing:
    if not flag("label"):
        return Standing.VISUAL if flag("visual") else Standing.PROMPT
    if flag("candidate"):
        return Standing.KEPT if flag("chosen") else Standing.DROPPED
    if not flag("predicted"):
        return Standing.UNPREDICTED
    return Standing.SPECIAL if flag("special") else Standing.FREE


def _known(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def _policy(run: Run, losses: ReferenceLosses) -> Policy:
    """The run's own policy. Raises `InvalidInput` where it is one of the user's."""
    if run.state is None or "policy" not in run.state.settings:
        return policy_named("regate" if has_teacher(losses) else "random")
    try:
        return policy_of(run.state.settings)
    except InvalidInput as error:
        raise InvalidInput(
            "policy",
            f"of the run is {run.state.settings['policy']!r}, one of your own.",
            "Name it as module:object.",
        ) from error
