"""The gate inside the forward, in loops that people use: nothing but `gate.collate` is added to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from small_models import build
from test_gate import docs, examples, losses, make
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import regate_fx
from regate_fx.runtime import DualCycle

__all__ = ["docs", "losses"]
SOON_SPARSE = DualCycle(keep=0.5, warmup=1, cycle=1, dense=0)


@pytest.fixture(autouse=True)
def _own_accelerator_state() -> Iterator[None]:
    """One process has one accelerator state, and other tests ask for another."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


class Watched:
    """A model's forward, with the active share of every training call noted."""

    def __init__(self, gated: Any) -> None:
        self.shares: list[float] = []
        gated.register_forward_hook(self.note, with_kwargs=True)

    def note(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if module.training:
            self.shares.append(float(output.counted.sum() / (kwargs["labels"] != -100).sum()))

    @property
    def sparse(self) -> list[bool]:
        return [share < 1 for share in self.shares]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_trainer(docs: Any, losses: Any, tmp_path: Path, accumulated: int, workers: int) -> None:
    gate = make(losses, schedule=SOON_SPARSE)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate, validate=False)
    watched = Watched(gated)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulated,
        dataloader_num_workers=workers,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        disable_tqdm=True,
    )
    data = examples(docs)
    trainer = Trainer(gated, arguments, data_collator=gate.collate, train_dataset=data, eval_dataset=data)
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    assert watched.sparse == [False] * accumulated + [True] * 2 * accumulated
    assert gate.global_step == 2
    assert not gate.difficulty.ema.isnan().all()
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


def test_accelerate(docs: Any, losses: Any) -> None:
    gate = make(losses, schedule=SOON_SPARSE)
    gated = regate_fx.compile(build("llama"), backend="eager", gate=gate, validate=False)
    watched = Watched(gated)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(gated.parameters())
    loader = DataLoader(examples(docs), batch_size=1, collate_fn=gate.collate)
    model, optimizer, loader = accelerator.prepare(gated, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert watched.sparse == [False, False, True, True]


def test_adapters(docs: Any, losses: Any) -> None:
    """Optimizer steps are noticed where only adapters are trained."""
    gate = make(losses, schedule=SOON_SPARSE)
    adapted = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    gated = regate_fx.compile(adapted, backend="eager", gate=gate, validate=False)
    watched = Watched(gated)
    optimizer = torch.optim.SGD([p for p in gated.parameters() if p.requires_grad], lr=0.1)
    for batch in DataLoader(examples(docs), batch_size=2, collate_fn=gate.collate):
        gated(**batch).loss.backward()
        optimizer.step()
    assert watched.sparse == [False, True]
