"""Two processes of a Trainer that are resumed in mid-epoch, with accumulation, end as the uninterrupted ones."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from crash_checkpoint import _documents
from datasets import Dataset
from small_models import build
from test_gate import examples, make, pad_right
from test_ranks import RANKS, bits, run_ranks
from transformers import Trainer, TrainingArguments

import regate_fx
from regate_fx.integrations import attach
from regate_fx.runtime import DualCycle

STEPS, SAVED = 4, 2  # three steps to an epoch, two batches of either rank to a step


def trained(folder: Path, resume: str | None = None) -> dict[str, Any]:
    docs, losses = _documents(4 * 3)
    torch.manual_seed(0)
    gate = make(losses, collator=None, schedule=DualCycle(keep=0.5, warmup=1, cycle=1, dense=0))
    trainer = Trainer(
        regate_fx.compile(build("llama", num_hidden_layers=1), backend="eager", validate=False, gate=gate),
        TrainingArguments(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=SAVED,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        ),
        data_collator=pad_right,
        train_dataset=Dataset.from_list(examples(docs)),
    )
    attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    assert gate.global_step == STEPS
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    return {"weights": weights, "ema": gate.difficulty.ema.clone(), "processes": trainer.args.world_size}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_ranks_resumed_in_mid_epoch_end_with_the_same_bits(tmp_path: Path) -> None:
    def work(rank: int, folder: Path) -> Any:
        # The group is there already; accelerate looks at these all the same.
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": str(RANKS)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        AcceleratorState._reset_state(True)
        whole = trained(folder / "run")
        resumed = trained(folder / "run", str(folder / "run" / f"checkpoint-{SAVED}"))
        gc.collect()  # DDP may hang where its process group is gone before it
        return whole, resumed

    both = run_ranks(work, tmp_path)
    for whole, resumed in both:
        assert whole["processes"] == RANKS
        assert bits(whole["ema"]) == bits(resumed["ema"])
        for one, other in zip(whole["weights"], resumed["weights"], strict=True):
            assert torch.equal(one, other)
        assert whole["ema"].isfinite().any()
