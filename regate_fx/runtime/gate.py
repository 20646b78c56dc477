"""The gate: from a batch to its token mask, and from its losses back to the difficulty of its labels.

Shapes: B rows, S positions, G documents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regate_fx.errors import InvalidInput, StoreMismatch
from regate_fx.runtime import ranks
from regate_fx.runtime.accumulation import Window, check_announced, collated
from regate_fx.runtime.checkpoint import read_state, write_state
from regate_fx.runtime.collate import Collator, samples_of
from regate_fx.runtime.label_table import has_teacher
from regate_fx.runtime.policies import (
    Combination,
    Policy,
    PolicyName,
    Signals,
    chosen_policy,
    policy_settings,
)
from regate_fx.runtime.rules import Alignment, TokenRules
from regate_fx.runtime.samples import Samples
from regate_fx.runtime.schedule import DualCycle
from regate_fx.runtime.select import keep_top, kept_counts, scores, try_out
from regate_fx.runtime.shared_difficulty import SharedDifficulty
from regate_fx.runtime.steps import OptimizerSteps
from regate_fx.runtime.store import ReferenceLosses


@dataclass(frozen=True)
class Choice:
    """What a gate chose for one batch.

    token_mask: bool [B, S]
    samples:    of the batch, on the device of the mask
    ratio:      share of the candidates that was kept
    active:     number of active positions, and the most of one row, as counted on the host; None where only the
                mask can tell
    """

    token_mask: Tensor
    samples: Samples
    ratio: float
    active: tuple[int, int] | None


class ReGate:
    """Selects the tokens that teach (ReGATE, arXiv 2507.21420).

        gate = ReGate(losses, special_ids=tokenizer.all_special_ids)
        gated = regate_fx.compile(model, gate=gate)
        for batch in DataLoader(data, batch_size=8, collate_fn=gate.collate):
            gated(**batch).loss.backward()

    In training mode the gated model selects before and observes after each call, and finds out by itself when an
    optimizer has stepped. In a loop of your own, call `select`, `observe` and, after `optimizer.step()`, `step`.

    follows_optimizer: False where somebody calls `step` after every optimizer step of the compiled model
    watchers:          called with the choice and the output of every training call of the compiled model
    """

    def __init__(
        self,
        losses: ReferenceLosses,
        *,
        schedule: DualCycle | None = None,
        policy: PolicyName | Policy = "regate",
        weight: float | None = None,
        combine: Combination | None = None,
        beta: float = 0.9,
        special_ids: Iterable[int] | None = None,
        visual_ids: Iterable[int] | None = None,
        align: Alignment = "predictor",
        shifted: bool = True,
        collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        difficulty_on: Literal["device", "host"] = "device",
    ) -> None:
        """Nothing is read or computed yet.

        losses:      the teacher's, from `teacher_losses` or `ReferenceLosses.open`; or a `label_table`, for policies
                     that need none
        schedule:    when to keep which share, by default the paper's
        policy:      what ranks the labels of a sample: "regate", "random", "loss", "reference", "rho1", or an object of
                     your own, see `Policy`
        weight:      of "regate": lambda, the weight of the reference loss, by default 0.5; combine: "additive", the
                     default, or "convex", see `TwoSignals`
        beta:        decay of the running mean of the student's losses
        special_ids: labels that are always counted; by default those that the teacher pass recorded
        visual_ids:  input ids that stand for images or video; by default likewise
        align:       the position that a selected label keeps active, see `TokenRules`
        shifted:     the model predicts label t at position t - 1
        collator:    makes a batch of a list of examples without their `sample_id`; by default transformers' own
        difficulty_on: where the running means are kept, 4 bytes a label: beside the losses, or on the host, for data
                     sets of billions of labels; the values are the same

        Raises `InvalidInput` that names the argument.
        """
        recorded = losses.about
        self.losses = losses
        self.schedule = schedule or DualCycle()
        self.policy = chosen_policy(policy, weight, combine)
        self._policy_settings = policy_settings(self.policy)
        try_out(self.policy, has_teacher(losses))
        self.rules = TokenRules(
            tuple(recorded.get("special_ids", ()) if special_ids is None else special_ids),
            tuple(recorded.get("visual_ids", ()) if visual_ids is None else visual_ids),
            align,
            shifted,
        )
        if difficulty_on not in ("device", "host"):
            raise InvalidInput("difficulty_on", f"is {difficulty_on!r}.", 'Say "device" or "host".')
        self.difficulty = SharedDifficulty(losses, beta, on_host=difficulty_on == "host")
        self.global_step = 0
        self.collate = Collator(self.rules, losses, collator)
        self.follows_optimizer = True
        self.watchers: list[Callable[[Choice, Any], None]] = []
        self._steps = OptimizerSteps()
        self._window: Window | None = None
        self._last: Choice | None = None
        self._pairing_known = False
        self._agreed = False

    def __getstate__(self) -> dict[str, Any]:
        # Who watches this gate does not watch a copy of it.
        return vars(self) | {"watchers": [], "_window": None}

    def select(self, batch: Mapping[str, Any]) -> Tensor:
        """bool [B, S]: the positions to compute in this step, for `gated(..., token_mask=mask)`.

        batch: `labels`, `sample_id` and what the model takes. Deterministic. A batch from `collate` is selected
        from without waiting for the device; otherwise its labels are brought to the host first.
        Raises `InvalidInput`, see `describe`.
        """
        return self.choose(batch).token_mask

    def choose(self, batch: Mapping[str, Any]) -> Choice:
        """`select`, with what else the compiled model can use.

        Raises `Unsupported` for a `num_items_in_batch` that cannot be the number of counted labels.
        """
        self._agree()
        samples = self._samples(batch)
        if batch.get("num_items_in_batch") is not None:
            check_announced(self._window, self.global_step, samples.counts)
        ratio = self.schedule.ratio(self.global_step)
        mask = samples.real if ratio == 1.0 else self._sparse(samples, ratio)
        self._last = Choice(mask, samples, ratio, samples.counts.active(ratio))
        return self._last

    def score(self, batch: Mapping[str, Any]) -> Tensor:
        """float64 [B, S]: what the policy makes of each label of a batch, as `select` would rank it now."""
        samples = self._samples(batch)
        return samples.by_position(scores(self.policy, self._signals(samples)))

    def _sparse(self, samples: Samples, ratio: float) -> Tensor:
        candidate = samples.by_document(samples.candidate, False)
        score = scores(self.policy, self._signals(samples))
        kept = keep_top(score, candidate, kept_counts(samples.candidates, ratio))
        return samples.always | self.rules.positions(samples.by_position(kept))

    def _signals(self, samples: Samples) -> Signals:
        ids = samples.ids if samples.packed else samples.ids[:, :1]
        ids = ids.to(samples.slot.device, non_blocking=True)
        return Signals(
            ema=samples.by_document(self.difficulty.known(samples), torch.nan),
            teacher=samples.by_document(samples.reference, 0.0) if has_teacher(self.losses) else None,
            slot=samples.by_document(samples.slot, -1),
            sample_id=samples.by_document(ids, -1).amax(1, keepdim=True),
            step=self.global_step,
        )

    def observe(self, batch: Mapping[str, Any], output: Any) -> None:
        """Take in the losses of a step.

        output: what the gated model returned for `batch`, with `token_loss` and `counted`.
        Raises `InvalidInput` for losses that are NaN or infinite (see `Difficulty.update`), and at the first call
        where the model pairs labels with other positions than `shifted` says.
        """
        self._observe(self._samples(batch), output)

    def take_in(self, choice: Choice, output: Any) -> None:
        """`observe` for a batch that was chosen from with `choose`; tells the watchers."""
        self._observe(choice.samples, output)
        for watcher in self.watchers:
            watcher(choice, output)

    def count_labels(self, batches: Sequence[Mapping[str, Any]]) -> int:
        """How many labels count in the coming optimizer step, which accumulates these batches, made by `collate`.

        Until that step the model takes `num_items_in_batch` with them: this number, or its sum over all ranks.
        Raises `InvalidInput` for other batches, `Unsupported` where only the masks will tell.
        """
        self._catch_up()
        counts = [collated(batch).counts for batch in batches]
        self._window = Window(self.global_step, counts)
        return self._window.count(self.schedule.ratio(self.global_step), self.rules.align)

    def _observe(self, samples: Samples, output: Any) -> None:
        token_loss, counted = getattr(output, "token_loss", None), getattr(output, "counted", None)
        if token_loss is None or counted is None:
            raise InvalidInput(
                "output", "has no token_loss and counted.", "Pass what the gated model returned for labels."
            )
        self._check_pairing(samples, counted)
        self.difficulty.observe(samples, token_loss, counted)

    def step(self) -> None:
        """Count one optimizer step. A model compiled with this gate does it by itself."""
        self.global_step += 1

    def follow(self, model: nn.Module) -> None:
        """Count an optimizer step if `model` was written to since the last call and nobody else counted it."""
        if self.follows_optimizer:
            self.global_step = self._steps.count(model, self.global_step)

    def _catch_up(self) -> None:
        if self.follows_optimizer:
            self.global_step = self._steps.catch_up(self.global_step)

    def exchange(self) -> None:
        """Let every rank know what the others observed: call it on all ranks at the end of each epoch.

        Only labels observed since the last exchange travel. Of a sample that several ranks drew, as samplers do that
        fill up the last batch, the lowest rank's values count, and a warning says so. Another one says so, once, where
        a rank observes a sample again before the next exchange. One process needs no exchange.
        """
        self.difficulty.exchange()

    def gather(self) -> None:
        """Make `state_dict` complete: call it on all ranks right before it. One process needs it not."""
        self._catch_up()
        self.difficulty.gather()

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes in training: the step and the difficulties, with what they belong to.

        The same on all ranks. Raises `Unsupported` where several ranks train and `gather` was not called since the
        last batch: what the others observed would be lost.
        """
        self._catch_up()
        return {
            "global_step": self.global_step,
            **self.difficulty.state(),
            "fingerprint": self.losses.fingerprint,
            "settings": self._settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, also of a run with another number of ranks: call it on all of them, with the same state.

        Raises `StoreMismatch` for one of other reference losses, `InvalidInput` for one of other settings: both would
        train on another selection without a word.
        """
        if state["fingerprint"] != self.losses.fingerprint:
            raise StoreMismatch(
                "the state of the gate",
                "it belongs to other reference losses.",
                "Open the store it was trained with.",
            )
        # As they are read back from a file.
        settings = json.loads(json.dumps(self._settings()))
        saved = json.loads(json.dumps(state["settings"]))
        changed = sorted(name for name in settings | saved if saved.get(name) != settings.get(name))
        if changed:
            raise InvalidInput(
                changed[0],
                f"differs from the saved run, as does all of {changed}.",
                "Use the saved run's settings.",
            )
        self.difficulty.load_state(state)
        self.global_step = state["global_step"]
        self._steps = OptimizerSteps()
        self._agreed = False

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one file, durably: call it on all ranks, the first one writes.

        Whatever happens meanwhile, the file is the new one or the one before. Raises `StoreUnwritable`.
        """
        self.gather()
        if ranks.rank() == 0:
            write_state(Path(path), self.state_dict())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote: call it on all ranks.

        Raises `StoreMismatch` where there is no state or one of other losses, `StoreDamaged` where the file is not what
        was written, `InvalidInput` for one of other settings.
        """
        self.load_state_dict(read_state(path))

    def _agree(self) -> None:
        """Before the first batch, and the first after a state was loaded: all ranks were started alike."""
        if self._agreed or ranks.count() == 1:
            return
        known = {"losses": self.losses.fingerprint, "difficulty": self.difficulty.digest()}
        ranks.check_agreement(self._settings() | {"global_step": self.global_step} | known)
        self._agreed = True

    def _settings(self) -> dict[str, Any]:
        settings = asdict(self.schedule) | self._policy_settings | asdict(self.rules)
        return settings | {"beta": self.difficulty.beta}

    def _samples(self, batch: Mapping[str, Any]) -> Samples:
        return samples_of(batch, self.rules, self.losses, self.difficulty.late)

    def _check_pairing(self, samples: Samples, counted: Tensor) -> None:
        """Once, at the first sparse step: candidates are counted where `shifted` says that they are predicted."""
        chosen = self._last
        if self._pairing_known or chosen is None or chosen.ratio == 1.0:
            return
        if chosen.token_mask.shape != counted.shape:
            return
        expected = self.rules.predicted(chosen.token_mask)
        if bool(((counted != expected) & samples.candidate).any()):
            raise InvalidInput(
                "shifted",
                f"is {self.rules.shifted}, but the model counted other labels than those predicted at the "
                "active positions.",
                f"Make the gate with shifted={not self.rules.shifted}, and call observe after each select.",
            )
        self._pairing_known = True
