"""The gate in TRL's SFTTrainer, whose own loss would go past it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_chat import conversations, make_tokenizer, small_llama
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import regate_fx
from regate_fx.errors import Bypassed, Unsupported
from regate_fx.integrations import attach
from regate_fx.runtime import DualCycle, ReGate, teacher_losses

SOON_SPARSE = DualCycle(keep=0.5, warmup=1, cycle=1, dense=0)


def trainer_of(folder: Path, around: Any = None, wrap: Any = None, **arguments: Any) -> SFTTrainer:
    """around: what is done to the model before it is gated; wrap: SFTTrainer's peft_config."""
    torch.manual_seed(0)
    model = small_llama(make_tokenizer())
    settings = {
        "assistant_only_loss": True,
        "max_length": None,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        **arguments,
    }
    return SFTTrainer(
        regate_fx.compile(around(model) if around else model, backend="eager", validate=False),
        SFTConfig(str(folder), **settings),
        train_dataset=conversations(12),
        eval_dataset=conversations(4, seed=1),
        processing_class=make_tokenizer(),
        peft_config=wrap,
    )


def gate_for(trainer: SFTTrainer, folder: Path) -> ReGate:
    tokenizer = make_tokenizer()
    model, data = small_llama(tokenizer), trainer.train_dataset
    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    losses = teacher_losses(
        model, data, folder / "losses", tokenizer=tokenizer, collator=collator, progress=False
    )
    return ReGate(losses, schedule=SOON_SPARSE)


def weights(trainer: SFTTrainer) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def trained(folder: Path, **arguments: Any) -> SFTTrainer:
    trainer = trainer_of(folder, **arguments)
    attach(trainer, gate_for(trainer, folder))
    trainer.train()
    return trainer


def keep_ratios(trainer: SFTTrainer) -> list[float]:
    return [entry["regate/keep_ratio"] for entry in trainer.state.log_history if "loss" in entry]


def test_padding_free_training_is_the_same_training(tmp_path: Path) -> None:
    padded = trained(tmp_path / "padded")
    free = trained(tmp_path / "free", padding_free=True)
    assert keep_ratios(padded) == keep_ratios(free) == [1.0, 0.5, 0.5]
    expected = weights(padded)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(free).items())
    assert free.data_collator.inner.padding_free


def test_a_dense_step_is_trls_own(tmp_path: Path) -> None:
    """Where everything counts, the model's loss and TRL's fused one are the same."""
    own = trainer_of(tmp_path, gradient_accumulation_steps=2)
    gated = trainer_of(tmp_path, gradient_accumulation_steps=2)
    attach(gated, gate_for(gated, tmp_path))
    gated.regate.gate.schedule = DualCycle()
    for trainer in (own, gated):
        trainer.train()
    expected = weights(own)
    for name, weight in weights(gated).items():
        torch.testing.assert_close(weight, expected[name])
    # Evaluation is TRL's own as well, with its metrics.
    found, wanted = gated.evaluate(), own.evaluate()
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-4)


@pytest.mark.parametrize("adapters", [None, LoraConfig(target_modules=["q_proj"])])
def test_without_attaching_the_fused_loss_past_the_gate_is_noticed(tmp_path: Path, adapters: Any) -> None:
    trainer = trainer_of(tmp_path, wrap=adapters)
    before = weights(trainer)
    regate_fx.find_gated(trainer.model).gate = gate_for(trainer, tmp_path)
    with pytest.raises(Bypassed, match="a training call was computed without the gate"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())


def test_adapters_around_the_gated_model(tmp_path: Path) -> None:
    trainer = trained(tmp_path, wrap=LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert keep_ratios(trainer) == [1.0, 0.5, 0.5]
    assert trainer.evaluate()["eval_mean_token_accuracy"] >= 0


def test_adapters_inside_the_gated_model_are_refused(tmp_path: Path) -> None:
    adapters = LoraConfig(target_modules=["q_proj"])
    trainer = trainer_of(tmp_path, around=lambda model: get_peft_model(model, adapters))
    with pytest.raises(Unsupported, match=r"TRL replaces the forward inside .* Gate the model first"):
        attach(trainer, gate_for(trainer, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "dft"}, r"loss_type='dft' is not supported: it is computed outside"),
        ({"packing": True, "max_length": 64}, r"packing=True is not supported: it drops the samples' ids"),
        ({"label_smoothing_factor": 0.1}, "a loss computed outside the model is not supported"),
    ],
)
def test_losses_of_trls_own_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    gate = gate_for(trainer_of(tmp_path), tmp_path)
    with pytest.raises(Unsupported, match=message):
        attach(trainer_of(tmp_path, **arguments), gate)


def test_gating_switched_off_is_trls_own_training(tmp_path: Path) -> None:
    own, gated = trainer_of(tmp_path), trainer_of(tmp_path)
    attach(gated, gate_for(gated, tmp_path))
    gated.model.gating = False
    for trainer in (own, gated):
        trainer.train()
    expected = weights(own)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(gated).items())
