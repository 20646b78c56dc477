"""The gate in Hugging Face's Trainer: what is counted, logged, refused, and left alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from small_models import build
from test_gate import docs, examples, losses, make, pad_right
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

import regate_fx
from regate_fx.errors import Bypassed, InvalidInput, Unsupported
from regate_fx.integrations import attach
from regate_fx.integrations.callback import GateCallback
from regate_fx.integrations.tally import Tally
from regate_fx.runtime import DualCycle, ReGate
from regate_fx.runtime.late import LateChecks

__all__ = ["docs", "losses"]
SOON_SPARSE = DualCycle(keep=0.5, warmup=1, cycle=1, dense=0)


def compiled(model: Any, **options: Any) -> Any:
    return regate_fx.compile(model, backend="eager", validate=False, **options)


def trainer_of(gated: Any, docs: Any, folder: Path, collator: Any = pad_right, **arguments: Any) -> Trainer:
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        **arguments,
    }
    rest = {name: settings.pop(name) for name in ("callbacks", "eval_dataset") if name in settings}
    trainer = Trainer(
        gated,
        TrainingArguments(str(folder), **settings),
        data_collator=collator,
        train_dataset=Dataset.from_list(examples(docs)),
        **rest,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def fresh(losses: Any, **settings: Any) -> ReGate:
    return make(losses, **{"schedule": SOON_SPARSE, "collator": None, **settings})


def trained(docs: Any, losses: Any, folder: Path, **arguments: Any) -> tuple[dict[str, Tensor], Trainer]:
    trainer = trainer_of(compiled(build("llama")), docs, folder, **arguments)
    attach(trainer, fresh(losses))
    trainer.train()
    return weights(trainer.model), trainer


def test_accumulated_batches_make_the_step_of_one_large_batch(docs: Any, losses: Any, tmp_path: Path) -> None:
    """The samples' answers differ in length, so means of means would differ."""
    whole, large = trained(docs, losses, tmp_path, per_device_train_batch_size=4)
    parts, small = trained(
        docs, losses, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert large.regate.gate.global_step == small.regate.gate.global_step == 3
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight)
    for one, other in zip(large.state.log_history[:-1], small.state.log_history[:-1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"])
        assert one["regate/active_tokens"] == other["regate/active_tokens"]


def test_the_loss_is_the_mean_over_the_counted_labels_of_the_window(
    docs: Any, losses: Any, tmp_path: Path
) -> None:
    gated = compiled(build("llama"))
    gate = fresh(losses)
    seen: list[Any] = []
    gate.watchers.append(lambda choice, output: seen.append(output))
    trainer = trainer_of(gated, docs, tmp_path, gradient_accumulation_steps=2)
    attach(trainer, gate)
    trainer.train()
    for step in range(3):
        outs = seen[2 * step : 2 * step + 2]
        mean = sum(out.token_loss.sum() for out in outs) / sum(out.counted.sum() for out in outs)
        assert trainer.state.log_history[step]["loss"] == pytest.approx(float(mean), rel=1e-5)


def test_without_attaching_a_gate_the_number_of_labels_is_refused(
    docs: Any, losses: Any, tmp_path: Path
) -> None:
    gate = fresh(losses, collator=pad_right)
    trainer = trainer_of(compiled(build("llama"), gate=gate), docs, tmp_path, gate.collate)
    with pytest.raises(Unsupported, match=r"num_items_in_batch .* regate_fx\.integrations\.attach"):
        trainer.train()


@pytest.mark.parametrize("model", ["plain", "adapters inside", "adapters around"])
def test_ids_survive_the_removal_of_unused_columns(
    model: str, docs: Any, losses: Any, tmp_path: Path
) -> None:
    lora = LoraConfig(target_modules=["q_proj"])
    gated = {
        "plain": lambda: compiled(build("llama")),
        "adapters inside": lambda: compiled(get_peft_model(build("llama"), lora)),
        "adapters around": lambda: get_peft_model(compiled(build("llama")), lora),
    }[model]()
    trainer = trainer_of(gated, docs, tmp_path)
    trainer.train_dataset = trainer.train_dataset.add_column("remark", ["none"] * len(docs))
    gate = fresh(losses)
    attach(trainer, gate)
    trainer.train()
    assert gate.global_step == 3
    assert not gate.difficulty.ema.isnan().all()
    assert [entry["regate/keep_ratio"] for entry in trainer.state.log_history[:-1]] == [1.0, 0.5, 0.5]


def test_evaluation_is_that_of_the_untouched_model_and_needs_no_ids(
    docs: Any, losses: Any, tmp_path: Path
) -> None:
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in examples(docs)]
    held_out = Dataset.from_list(rows)
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"hits": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    gated = compiled(build("llama"))
    trainer = trainer_of(gated, docs, tmp_path, eval_strategy="epoch", eval_dataset=held_out)
    trainer.compute_metrics = metrics
    gate = fresh(losses)
    attach(trainer, gate)
    trainer.train()
    seen = gate.difficulty.ema.clone()
    found = trainer.evaluate()
    with_ids = trainer.evaluate(Dataset.from_list(examples(docs)))
    dense = trainer_of(build("llama"), docs, tmp_path)
    dense.model.load_state_dict(gated.state_dict())
    expected = dense.evaluate(held_out)
    assert found["eval_loss"] == with_ids["eval_loss"] == expected["eval_loss"]
    assert "eval_hits" in found
    assert len(shapes[0]) == 3
    assert torch.equal(gate.difficulty.ema.nan_to_num(-1), seen.nan_to_num(-1))
    prompt = torch.tensor([[3, 4, 5]])
    made = gated.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, dense.model.generate(prompt, max_new_tokens=4, do_sample=False))


def test_other_callbacks_get_the_metrics_and_they_are_what_was_computed(
    docs: Any, losses: Any, tmp_path: Path
) -> None:
    logged: list[dict[str, float]] = []

    class Listening(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logged.append(dict(logs))

    gated = compiled(build("llama"))
    gate = fresh(losses)
    reports = []
    gate.watchers.append(lambda choice, output: reports.append(gated.report))
    trainer = trainer_of(
        gated,
        docs,
        tmp_path,
        max_steps=4,
        logging_steps=2,
        gradient_accumulation_steps=2,
        callbacks=[Listening()],
    )
    attach(trainer, gate)
    trainer.train()
    for log, first in ((logged[0], 0), (logged[1], 4)):
        batches = reports[first : first + 4]
        assert log["regate/active_tokens"] == sum(sum(report.batch.active) for report in batches)
        gated_flops, dense = (
            sum(getattr(report.cost, name) for report in batches) for name in ("gated", "dense")
        )
        assert log["regate/flops_saved"] == pytest.approx(1 - gated_flops / dense)
    assert logged[0]["regate/keep_ratio"] == 0.75
    assert logged[1]["regate/keep_ratio"] == 0.5
    assert logged[1]["regate/flops_saved"] > logged[0]["regate/flops_saved"] > 0


def test_a_resumed_run_goes_on_with_the_schedule(docs: Any, losses: Any, tmp_path: Path) -> None:
    schedule = DualCycle(keep=0.5, warmup=3, cycle=1, dense=0)
    arguments = {"save_steps": 2, "max_steps": 5}
    for resumed in (False, True):
        trainer = trainer_of(compiled(build("llama")), docs, tmp_path, **arguments)
        gate = fresh(losses, schedule=schedule)
        attach(trainer, gate)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        assert gate.global_step == 5
        ratios = [e["regate/keep_ratio"] for e in trainer.state.log_history if "loss" in e]
        assert ratios == [1.0, 1.0, 1.0, 0.5, 0.5]


def test_a_step_that_the_scaler_skipped_does_not_count(losses: Any) -> None:
    gate = fresh(losses)
    callback = GateCallback(gate, Tally())
    for skipped in (False, True, False):
        callback.on_step_end(None, None, None, optimizer=SimpleNamespace(step_was_skipped=skipped))
    assert gate.global_step == 2


def past_the_gate(gated: Any, labels: Any, items: Any, **inputs: Any) -> Tensor:
    """The loss as trainers with a fused loss compute it: backbone, head, and all labels."""
    logits = gated.lm_head(gated.model(**inputs).last_hidden_state)
    return gated.loss_function(logits, labels, 97, num_items_in_batch=items)


@pytest.mark.parametrize("gated_batches", [0, 1])
def test_a_loss_past_the_gate_stops_before_the_optimizer_steps(
    docs: Any, losses: Any, tmp_path: Path, gated_batches: int
) -> None:
    gated = compiled(build("llama"))
    before = weights(gated)
    trainer = trainer_of(gated, docs, tmp_path, gradient_accumulation_steps=2)
    attach(trainer, fresh(losses))
    own, calls = trainer.compute_loss, []

    def fused(model: Any, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        calls.append(model)
        if len(calls) <= gated_batches:
            return own(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)
        inputs = {name: value for name, value in inputs.items() if name != "sample_id"}
        return past_the_gate(model, items=num_items_in_batch, **inputs)

    trainer.compute_loss = fused
    missing = 2 - gated_batches
    with pytest.raises(Bypassed, match=f"step 0: {missing} of 2 batches were computed without the gate"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(gated).items())


def test_a_replaced_forward_may_not_forget_the_gated_one(docs: Any, losses: Any) -> None:
    gate = fresh(losses, collator=pad_right)
    gated = compiled(build("llama"), gate=gate)
    batch = gate.collate(examples(docs))
    own = gated.forward
    gated.forward = lambda **inputs: own(**inputs)
    assert gated(**batch).counted is not None
    gated.forward = lambda sample_id, labels, **inputs: past_the_gate(gated, labels, None, **inputs)
    with pytest.raises(
        Bypassed, match="a training call was computed without the gate: somebody has replaced"
    ):
        gated(**batch)
    assert gated.eval()(**batch).dim() == 0
    gated.train().gating = False
    assert gated(**batch).dim() == 0


class Scalars:
    """Stands in for the SummaryWriter of tensorboardX."""

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir

    scalars: ClassVar[dict[str, list[tuple[int, Any]]]] = {}

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        self.scalars.setdefault(name, []).append((step, value))

    def add_text(self, *_: Any) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_tensorboard_draws_what_the_gate_logs(
    docs: Any, losses: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Trainer's own callback, which takes numbers and drops tensors."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Scalars))
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(Scalars, "scalars", {})
    _, trainer = trained(docs, losses, tmp_path, report_to="tensorboard")
    assert [step for step, _ in Scalars.scalars["train/regate/keep_ratio"]] == [1, 2, 3]
    for name in ("active_tokens", "keep_ratio", "flops_saved"):
        drawn = [value for _, value in Scalars.scalars[f"train/regate/{name}"]]
        assert all(type(value) in (int, float) for value in drawn)
        assert drawn == [entry[f"regate/{name}"] for entry in trainer.state.log_history[:-1]]


def test_gating_switched_off_is_dense_training(docs: Any, losses: Any, tmp_path: Path) -> None:
    dense = trainer_of(build("llama"), docs, tmp_path)
    dense.train()
    gated = compiled(build("llama"))
    gated.gating = False
    trainer = trainer_of(gated, docs, tmp_path)
    attach(trainer, fresh(losses))
    trainer.train()
    expected = weights(dense.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(gated).items())
    assert not any("regate/keep_ratio" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("noticed", ["at once", "late, as on an accelerator"])
def test_labels_changed_after_they_were_counted(
    noticed: str, docs: Any, losses: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(compiled(build("llama")), docs, tmp_path)
    attach(trainer, fresh(losses, schedule=DualCycle()))
    own = trainer._prepare_inputs

    def changed(inputs: dict[str, Any]) -> dict[str, Any]:
        labels = inputs["labels"].clone()
        labels[0, 5] = -100
        return own({**inputs, "labels": labels})

    trainer._prepare_inputs = changed
    problem = r"sample_id: row 0 of the batch holds other tokens"
    if noticed != "at once":
        monkeypatch.setattr(LateChecks, "check", lambda *_: None)
        problem = r"labels: (\d+) were to count .* the model counted \d+"
    with pytest.raises(InvalidInput, match=problem):
        trainer.train()


def test_what_cannot_be_attached(docs: Any, losses: Any, tmp_path: Path) -> None:
    gate = fresh(losses)
    with pytest.raises(InvalidInput, match=r"trainer: is int\. Pass a transformers\.Trainer"):
        attach(3)
    with pytest.raises(InvalidInput, match="its model, LlamaForCausalLM, is not gated"):
        attach(trainer_of(build("llama"), docs, tmp_path), gate)
    with pytest.raises(InvalidInput, match=r"gate: is NoneType\. Pass a regate_fx\.runtime\.ReGate"):
        attach(trainer_of(compiled(build("llama")), docs, tmp_path))
    with pytest.raises(InvalidInput, match="gate: is not the one that the model was compiled with"):
        attach(trainer_of(compiled(build("llama"), gate=fresh(losses)), docs, tmp_path), gate)
    with pytest.raises(InvalidInput, match="data_collator: the trainer has one and the gate another"):
        attach(trainer_of(compiled(build("llama")), docs, tmp_path, lambda rows: {}), make(losses))
    smoothed = trainer_of(compiled(build("llama")), docs, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(Unsupported, match="a loss computed outside the model is not supported"):
        attach(smoothed, gate)
    trainer = trainer_of(compiled(build("llama")), docs, tmp_path)
    attach(trainer, gate)
    with pytest.raises(InvalidInput, match=r"trainer: has a gate already\. Call attach once"):
        attach(trainer, gate)


def test_batches_dispatched_by_one_process_are_refused(
    docs: Any, losses: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate does by default with a stream of examples and several processes."""
    trainer = trainer_of(compiled(build("llama")), docs, tmp_path)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    attach(trainer, fresh(losses))
    trainer.train()
    monkeypatch.setitem(AcceleratorState._shared_state, "num_processes", 2)
    with pytest.raises(Unsupported, match=r"one process that reads .*'dispatch_batches': False"):
        trainer.get_train_dataloader()


@pytest.mark.parametrize("passed", ["the gate's", "the gate's inner"])
def test_the_collator_of_the_gate(docs: Any, losses: Any, tmp_path: Path, passed: str) -> None:
    gate = make(losses, schedule=SOON_SPARSE)
    collator = gate.collate if passed == "the gate's" else pad_right
    trainer = trainer_of(compiled(build("llama"), gate=gate), docs, tmp_path, collator)
    attach(trainer)
    trainer.train()
    assert gate.global_step == 3
