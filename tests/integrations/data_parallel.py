"""The same training on one process or several, by Trainer and by a loop on accelerate. Launched by `test_launch.py`:

python tests/integrations/data_parallel.py FOLDER

Every process leaves `RANK.pt` in the folder: for each run its weights, the computed and all tokens of each of this
process's batches, and what was logged.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests" / "integrations")]

from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState  # noqa: E402
from computed import Computed  # noqa: E402
from conftest import SMALL_LLAMA  # noqa: E402
from small_chat import conversations, make_tokenizer, small_llama, tokenized  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments  # noqa: E402

import regate_fx  # noqa: E402
from regate_fx.integrations import attach  # noqa: E402
from regate_fx.integrations.accelerate import counted_labels  # noqa: E402
from regate_fx.runtime import DualCycle, ReGate, teacher_losses  # noqa: E402

SAMPLES, PER_STEP, ACCUMULATED = 32, 8, 2
SCHEDULE = DualCycle(keep=0.5, warmup=1, cycle=1, dense=0)
# Several buckets for a model of half a megabyte.
BUCKET_MB = 0.1


def start(folder: Path) -> tuple[Any, Any, ReGate, Any]:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = small_llama(tokenizer)
    data = tokenized(tokenizer, conversations(SAMPLES))
    collator = DataCollatorForSeq2Seq(tokenizer)
    with PartialState(cpu=True).main_process_first():
        losses = teacher_losses(
            model, data, folder / "losses", tokenizer=tokenizer, collator=collator, progress=False
        )
    return model, data, ReGate(losses, schedule=SCHEDULE, collator=collator), collator


def by_trainer(folder: Path, processes: int) -> tuple[Any, dict[str, Any]]:
    model, data, gate, _ = start(folder)
    trainer = Trainer(
        regate_fx.compile(model, gate=gate),
        TrainingArguments(
            str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=PER_STEP // ACCUMULATED // processes,
            gradient_accumulation_steps=ACCUMULATED,
            gradient_checkpointing=True,
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=0.1,
            logging_steps=1,
            ddp_bucket_cap_mb=BUCKET_MB,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
        ),
        data_collator=gate.collate,
        train_dataset=data,
    )
    attach(trainer)
    trainer.train()
    return trainer.model_wrapped, {"logs": trainer.state.log_history, "ema": gate.difficulty.ema}


def by_loop(folder: Path, processes: int) -> tuple[Any, dict[str, Any]]:
    model, data, gate, _ = start(folder)
    accelerator = Accelerator(
        cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=BUCKET_MB)]
    )
    gated = regate_fx.compile(model, gate=gate)
    gated.gradient_checkpointing_enable()
    loader = DataLoader(data, batch_size=PER_STEP // ACCUMULATED // processes, collate_fn=gate.collate)
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1)
    wrapped, optimizer, loader = accelerator.prepare(gated, optimizer, loader)
    batches = list(loader)
    for begin in range(0, len(batches), ACCUMULATED):
        window = batches[begin : begin + ACCUMULATED]
        items = counted_labels(accelerator, gate, window)
        for batch in window:
            # Without no_sync: gradients of every batch are averaged, which adds up to the same.
            loss = wrapped(**batch, num_items_in_batch=items).loss * accelerator.num_processes
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    gate.exchange()
    gate.gather()
    return wrapped, {"steps": gate.state_dict()["global_step"], "ema": gate.difficulty.ema}


def run(folder: Path, processes: int) -> dict[str, dict[str, Any]]:
    found = {}
    for train in (by_trainer, by_loop):
        with pytest.MonkeyPatch.context() as patch:
            computed = Computed(patch, SMALL_LLAMA)
            model, result = train(folder, processes)
        calls = [(call.computed, call.tokens) for call in computed.calls]
        weights = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
        buckets = model._get_ddp_logging_data().get("rebuilt_bucket_sizes", "") if processes > 1 else ""
        found[train.__name__] = {"weights": weights, "calls": calls, "buckets": buckets, **result}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    into = Path(sys.argv[1])
    torch.save(run(into, state.num_processes), into / f"{state.process_index}.pt")
    gc.collect()  # DDP may hang where its process group is gone before it
    state.destroy_process_group()
