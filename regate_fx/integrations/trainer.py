"""ReGATE in Hugging Face's `Trainer`.

What a callback can do is in `callback`. The rest, batches, the number of counted labels and the logs, goes through
methods that subclasses may override: `attach` gives the trainer's object such a subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor
from transformers import Trainer, default_data_collator
from transformers.trainer_utils import IntervalStrategy

from regate_fx import find_gated
from regate_fx.errors import InvalidInput, Unsupported
from regate_fx.integrations.callback import GateCallback
from regate_fx.integrations.tally import Tally, Totals
from regate_fx.runtime import ReGate
from regate_fx.runtime.checkpoint import STATE


def attach(trainer: Trainer, gate: ReGate | None = None) -> None:
    """Train `trainer.model`, a gated model, with ReGATE.

    gate: what chooses the tokens; by default the one that the model was compiled with

    Afterwards training batches carry what the gate needs of `sample_id`, which has to be a column of the training set;
    steps are counted as Trainer counts them; `num_items_in_batch` is the number of labels that the gate leaves, of all
    batches of an optimizer step and of all ranks; training logs have `regate/active_tokens` (positions computed since
    the last log, by all ranks), `regate/keep_ratio` (mean share of the candidates kept) and `regate/flops_saved`
    (estimated share of the forward's FLOPs). Evaluation is that of the untouched model and needs no ids. Checkpoints
    hold the gate's state, and `train(resume_from_checkpoint=...)` goes on from it.

    Raises `InvalidInput` for a model that is not gated or has another gate, for two different collators, and for a
    trainer that has a gate already; `Unsupported` for losses computed outside the model, for tensor, context and
    sequence parallelism, and for trainers that compute their losses themselves, `SFTTrainer` excepted. In training,
    `Bypassed` is raised before an optimizer step whose losses did not all come from the gated model.
    """
    _check_trainer(trainer)
    gated = _gated_model(trainer)
    gate = _agree(gated, gate)
    tally = Tally(remember=trainer.args.logging_strategy != IntervalStrategy.NO)
    callback = GateCallback(gate, tally)
    kind = _kind(trainer, gated)
    inner = _inner_collator(trainer, gate)
    gated.gate = gate
    gate.watchers.append(tally)
    trainer.add_callback(callback)
    trainer.data_collator = _WithoutIds(inner)
    own_class = type(trainer)
    trainer.__class__ = type(own_class.__name__, (kind, own_class), {"__module__": own_class.__module__})
    trainer.regate = _Attached(gate, gated, callback, tally, inner)


@dataclass(frozen=True)
class _Attached:
    """What belongs to one gated training. inner: collates examples without ids."""

    gate: ReGate
    gated: Any
    callback: GateCallback
    tally: Tally
    inner: Callable[[list[Any]], Mapping[str, Any]]


class GatedTrainer(Trainer):
    """The methods of a trainer that `attach` overrides."""

    regate: _Attached
    data_collator: Any
    _signature_columns: list[str]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "sample_id" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "sample_id"]

    def get_train_dataloader(self) -> Any:
        without_ids = self.data_collator
        self.data_collator = replace(
            self.regate.gate.collate, inner=self.training_collator(self.regate.inner)
        )
        try:
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = without_ids
        if self.accelerator.num_processes > 1 and isinstance(loader, DataLoaderDispatcher):
            raise Unsupported(
                "one process that reads the batches of all",
                "it would cut them up without what the gate knows of their samples.",
                "Set accelerator_config={'dispatch_batches': False} in the training arguments.",
            )
        return loader

    def training_collator(self, inner: Any) -> Any:
        """What collates training examples without their ids."""
        return inner

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | None]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        attached = self.regate
        attached.callback.window = len(batches) if attached.gated.gating else 0
        if items is None or not attached.gated.gating:
            return batches, items
        counted = torch.tensor(attached.gate.count_labels(batches), device=self.args.device)
        if self.args.average_tokens_across_devices:
            counted = self.accelerator.reduce(counted, "sum")
        # No label may be left at all; the loss is then 0, not 0 / 0.
        return batches, counted.clamp(min=1)

    def _save_rng_state(self, output_dir: str) -> None:
        # Before trainer_state.json, without which nobody resumes: what can be resumed has its gate's state.
        super()._save_rng_state(output_dir)
        self.regate.gate.save(Path(output_dir) / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.regate.gate.load(Path(checkpoint) / STATE)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._gate_totals().metrics())
        super().log(logs, *args, **kwargs)

    def _gate_totals(self) -> Totals:
        """Of all ranks since the last log. Raises `InvalidInput` where the model counted other labels than the host."""
        totals = self.regate.tally.totals(self.regate.gated.report)
        if self.accelerator.num_processes > 1:
            sums = torch.tensor(astuple(totals), dtype=torch.float64, device=self.args.device)
            totals = Totals(*self.accelerator.reduce(sums, "sum").tolist())
        if totals.counted != totals.expected:
            raise InvalidInput(
                "labels",
                f"{totals.expected:.0f} were to count since the last log, the model counted {totals.counted:.0f}: the "
                "loss was not their mean.",
                "Do not change labels or attention_mask after a batch was collated.",
            )
        return totals


class _WithoutIds:
    """Collates batches that nothing is selected from, whose examples may have ids or not."""

    def __init__(self, inner: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.inner = inner

    def __call__(self, examples: list[Any]) -> Mapping[str, Any]:
        return self.inner([_without_id(example) for example in examples])


def _without_id(example: Any) -> Any:
    if not isinstance(example, Mapping):
        return example
    return {name: value for name, value in example.items() if name != "sample_id"}


def _check_trainer(trainer: Trainer) -> None:
    if not isinstance(trainer, Trainer):
        raise InvalidInput("trainer", f"is {type(trainer).__name__}.", "Pass a transformers.Trainer.")
    if isinstance(trainer, GatedTrainer):
        raise InvalidInput("trainer", "has a gate already.", "Call attach once.")
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        raise Unsupported(
            "a loss computed outside the model",
            "it would take labels into account that the gate drops.",
            "Leave out compute_loss_func and label_smoothing_factor.",
        )
    if max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1:
        raise Unsupported(
            "tensor, context or sequence parallelism",
            "ranks would have to agree on the positions of one batch.",
            "Use data parallelism.",
        )


def _gated_model(trainer: Trainer) -> Any:
    gated = find_gated(trainer.model)
    if gated is None:
        raise InvalidInput(
            "trainer",
            f"its model, {type(trainer.model).__name__}, is not gated.",
            "Give it what regate_fx.compile(model) returns.",
        )
    return gated


def _agree(gated: Any, gate: ReGate | None) -> ReGate:
    if gate is not None and gated.gate not in (None, gate):
        raise InvalidInput(
            "gate", "is not the one that the model was compiled with.", "Give it to one of the two."
        )
    chosen = gated.gate if gate is None else gate
    if not isinstance(chosen, ReGate):
        raise InvalidInput("gate", f"is {type(chosen).__name__}.", "Pass a regate_fx.runtime.ReGate.")
    return chosen


def _kind(trainer: Trainer, gated: Any) -> type[GatedTrainer]:
    if not any(base.__module__.partition(".")[0] == "trl" for base in type(trainer).__mro__):
        return GatedTrainer
    from regate_fx.integrations.trl import sft_kind

    return sft_kind(trainer, gated)


def _inner_collator(trainer: Trainer, gate: ReGate) -> Any:
    """What collates examples without ids: the trainer's collator, or the one inside the gate's."""
    given, own = trainer.data_collator, gate.collate.inner
    if own is None and given is not gate.collate:
        return given
    if given is not gate.collate and given is not own:
        raise InvalidInput(
            "data_collator",
            "the trainer has one and the gate another.",
            "Make the trainer with data_collator=gate.collate, or the gate without collator.",
        )
    return default_data_collator if own is None else own
