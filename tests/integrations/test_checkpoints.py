"""A loop on accelerate that is stopped in mid-epoch goes on to the very same weights and difficulties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_chat import conversations, make_tokenizer, small_llama, tokenized
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

import regate_fx
from regate_fx.errors import StoreMismatch
from regate_fx.integrations import register
from regate_fx.runtime import DualCycle, ReferenceLosses, ReGate, teacher_losses

EPOCH, STOP, END = 6, 7, 14  # in batches, two to an optimizer step


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> ReferenceLosses:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    return teacher_losses(
        small_llama(tokenizer),
        tokenized(tokenizer, conversations(4 * EPOCH)),
        tmp_path_factory.mktemp("losses"),
        tokenizer=tokenizer,
        collator=DataCollatorForSeq2Seq(tokenizer),
        progress=False,
    )


class Loop:
    """Adam on two batches at a time, in an order that differs from epoch to epoch."""

    def __init__(self, losses: ReferenceLosses) -> None:
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        model = small_llama(tokenizer)
        collator = DataCollatorForSeq2Seq(tokenizer)
        schedule = DualCycle(keep=0.5, warmup=2, cycle=2, dense=0)
        self.gate = ReGate(losses, schedule=schedule, collator=collator)
        gated = regate_fx.compile(model, backend="eager", validate=False, gate=self.gate)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.loader = DataLoader(
            tokenized(tokenizer, conversations(4 * EPOCH)), batch_size=4, collate_fn=self.gate.collate
        )
        optimizer = torch.optim.Adam(gated.parameters(), lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(gated, optimizer)
        register(self.accelerator, self.gate)

    def train(self, first: int, last: int) -> None:
        batches = list(self.loader)
        for number in range(first, last):
            epoch, place = divmod(number, EPOCH)
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batches[(place + epoch) % EPOCH]).loss
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if place == EPOCH - 1:
                self.gate.exchange()

    def found(self) -> list[Tensor]:
        return [*(p.detach().clone() for p in self.model.parameters()), self.gate.difficulty.ema.clone()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(one, other, strict=True))


def test_a_loop_goes_on_to_the_bit(losses: ReferenceLosses, tmp_path: Path) -> None:
    whole = Loop(losses)
    whole.train(0, STOP + 1)
    whole.accelerator.save_state(str(tmp_path))
    steps, then = whole.gate.global_step, whole.found()
    whole.train(STOP + 1, END)
    resumed = Loop(losses)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.gate.global_step == steps == (STOP + 1) // 2
    assert equal(resumed.found(), then)
    resumed.train(STOP + 1, END)
    assert equal(resumed.found(), whole.found())
    assert resumed.gate.global_step == whole.gate.global_step


def test_a_checkpoint_without_a_gate_is_refused(losses: ReferenceLosses, tmp_path: Path) -> None:
    loop: Any = Loop(losses)
    loop.train(0, 2)
    loop.accelerator.save_state(str(tmp_path))
    (tmp_path / "regate.safetensors").unlink()
    with pytest.raises(StoreMismatch, match="there is no state of a gate"):
        loop.accelerator.load_state(str(tmp_path))


def test_a_state_saved_in_mid_accumulation_says_what_is_lost(
    losses: ReferenceLosses, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(torch.nn.Linear(1, 1))
    gate = ReGate(losses)
    register(accelerator, gate)
    for batches in range(1, 5):
        with accelerator.accumulate(model):
            accelerator.save_state(str(tmp_path))
        warned = "saved in the middle of a gradient accumulation" in caplog.text
        assert warned == (batches % 2 == 1)
        caplog.clear()
        (tmp_path / "regate.safetensors").unlink()
