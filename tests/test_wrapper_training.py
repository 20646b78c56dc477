"""Gated models with PEFT adapters and in Trainer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from key_masked_engine import B, S, batch, engine_of, gate, gradients, is_gated, without_mask
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import build
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

import regate_fx
from regate_fx.errors import Unsupported
from regate_fx.wrapper import ungated

LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def _adapted(order: str) -> tuple[Any, Any]:
    """A LoRA model and the gated part of it, adapters on either side of gating."""
    torch.manual_seed(0)
    if order == "adapters around":
        gated, _ = gate(build("llama"))
        adapted = get_peft_model(gated, LORA)
        return adapted, gated
    adapted, _ = gate(get_peft_model(build("llama"), LORA))
    return adapted, adapted


@pytest.mark.parametrize("order", ["adapters around", "adapters inside"])
def test_peft(order: str, tmp_path: Path) -> None:
    adapted, gated = _adapted(order)
    assert isinstance(adapted, PeftModel)
    inputs = batch()
    output = adapted(**inputs)
    assert set(engine_of(gated).seen[0]) == {"input_ids", "labels"}
    output.loss.backward()
    trained = gradients(adapted)
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(gradient.abs().sum() > 0 for gradient in trained.values())
    with torch.no_grad():
        assert adapted(**without_mask(inputs)).loss != output.loss
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(**inputs).loss, output.loss)
    assert len(engine_of(gated).seen) == 2
    prompt = inputs["input_ids"]
    assert adapted.generate(input_ids=prompt, max_new_tokens=3, do_sample=False).shape == (B, S + 3)

    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(
        adapted.eval()(**without_mask(inputs)).loss, loaded.eval()(**without_mask(inputs)).loss
    )


def test_both_orders_of_adapters_and_gating_agree() -> None:
    losses = [_adapted(order)[0](**batch()).loss for order in ("adapters around", "adapters inside")]
    torch.testing.assert_close(losses[0], losses[1])


def test_merged_adapters_leave_a_gated_model() -> None:
    adapted, _ = _adapted("adapters around")
    merged = adapted.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert is_gated(merged)


def test_the_base_of_a_gated_adapter_model_is_gated() -> None:
    adapted, _ = gate(get_peft_model(build("llama"), LORA))
    base = adapted.get_base_model()
    assert {"token_mask", "sample_id"} <= set(inspect.signature(base.forward).parameters)
    assert base is adapted.get_base_model()
    assert ungated(base) is ungated(adapted).get_base_model()
    assert is_gated(base)


class Rows(torch.utils.data.Dataset):
    """Four samples with a column that no model takes."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: value[index % B] for name, value in batch(index).items()}
        row |= {"sample_id": torch.tensor(index), "unknown_column": torch.tensor(index)}
        return {name: row[name] for name in ("input_ids", "labels", "unknown_column", *self.columns)}


def train(
    model: nn.Module, output_dir: Path, *columns: str, resume: str | None = None, **options: Any
) -> Trainer:
    defaults = {"max_steps": 1, "save_strategy": "no", "learning_rate": 0.1, "seed": 0}
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=B,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **(defaults | options),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(*columns), eval_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("masked", [True, False])
def test_trainer_takes_a_step(masked: bool, tmp_path: Path) -> None:
    gated, engine = gate(build("llama"))
    before = {name: p.detach().clone() for name, p in gated.named_parameters()}
    trainer = train(gated, tmp_path, *(["token_mask"] if masked else []))
    assert len(engine.seen) == int(masked)
    if masked:
        assert set(engine.seen[0]) == {"input_ids", "labels", "num_items_in_batch"}
    assert any(not torch.equal(p, before[name]) for name, p in gated.named_parameters())
    assert trainer.evaluate()["eval_loss"] > 0
    assert len(engine.seen) == int(masked)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.lm_head.weight, gated.lm_head.weight)
    assert type(loaded) is type(ungated(gated))


@pytest.mark.parametrize("order", ["adapters around", "adapters inside"])
def test_trainer_with_adapters(order: str, tmp_path: Path) -> None:
    adapted, gated = _adapted(order)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    train(adapted, tmp_path, "token_mask")
    assert len(engine_of(gated).seen) == 1
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_trainer_resumes_from_a_checkpoint_in_mixed_precision(tmp_path: Path) -> None:
    options = {"bf16": True, "gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 1}
    straight, _ = gate(build("llama"))
    train(straight, tmp_path / "straight", "token_mask", max_steps=2, **options)
    first, _ = gate(build("llama"))
    train(first, tmp_path / "halves", "token_mask", max_steps=2, **options)
    resumed, engine = gate(build("llama", seed=1))
    checkpoint = str(tmp_path / "halves" / "checkpoint-1")
    train(resumed, tmp_path / "resumed", "token_mask", max_steps=2, resume=checkpoint, **options)
    assert len(engine.seen) == 1
    for (name, mine), theirs in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_trainer_keeps_the_column_of_sample_ids(tmp_path: Path) -> None:
    gated, _ = gate(build("llama"))
    with pytest.raises(Unsupported, match="sample_id"):
        train(gated, tmp_path, "sample_id")


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_batch_without_padding_mask_is_known_to_have_no_padding_through_peft(task: str | None) -> None:
    """PEFT's model names no arguments of its own where it is told no task; its attention mask is the model's."""
    lora = LoraConfig(task_type=task, r=2, target_modules=["q_proj", "v_proj"])
    gated = regate_fx.compile(get_peft_model(build("llama"), lora), backend="eager")
    ids = torch.randint(3, 90, (2, 9))
    gated(input_ids=ids, labels=ids, token_mask=torch.rand(2, 9) < 0.7)
    assert {layer.attention for layer in gated.report.layers} == {"causal, proven from the mask"}
