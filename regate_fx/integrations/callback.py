"""Follow a Trainer's optimizer steps, and see that none is taken on a loss that the gate had no part in."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regate_fx.errors import Bypassed
from regate_fx.integrations.tally import Tally
from regate_fx.runtime import ReGate


class GateCallback(TrainerCallback):
    """Counts the gate's steps: those that the optimizer took, not those that a gradient scaler skipped. At the end of
    each epoch, ranks learn what the others have observed.

    window: batches of the optimizer step under way. `tally` has to watch the gate.
    """

    def __init__(self, gate: ReGate, tally: Tally) -> None:
        self.gate = gate
        self.window = 0
        self._tally = tally
        self._seen = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.gate.follows_optimizer = False
        self._seen = self._tally.batches

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Resumed from a checkpoint of an epoch's last step, the end of that epoch does not come again.
        if float(state.epoch or 0.0).is_integer():
            self.gate.exchange()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gated, self._seen = self._tally.batches - self._seen, self._tally.batches
        if gated != self.window:
            missing = self.window - gated
            raise Bypassed(
                f"optimizer step {state.global_step}: {missing} of {self.window} batches were computed"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.gate.step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.gate.exchange()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.gate.follows_optimizer = True
