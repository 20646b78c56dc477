"""ReGATE in Hugging Face's Trainer, in one process or several.

python examples/hf_trainer.py
accelerate launch --multi_gpu --num_processes 2 examples/hf_trainer.py
torchrun --nproc_per_node 2 examples/hf_trainer.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import PartialState
from small_chat import arguments, conversations, make_tokenizer, small_llama, tokenized
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import regate_fx
from regate_fx.integrations import attach
from regate_fx.runtime import DualCycle, ReGate, teacher_losses


def main(args: argparse.Namespace, **training: Any) -> Trainer:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = small_llama(tokenizer)
    data = tokenized(tokenizer, conversations(args.samples))
    held_out = tokenized(tokenizer, conversations(16, seed=1).remove_columns("sample_id"))
    collator = DataCollatorForSeq2Seq(tokenizer)
    with PartialState().main_process_first():
        losses = teacher_losses(model, data, f"{args.folder}/losses", tokenizer=tokenizer, collator=collator)

    gate = ReGate(losses, schedule=DualCycle(keep=0.5, warmup=4, cycle=8, dense=2))
    trainer = Trainer(
        regate_fx.compile(model, backend=args.backend, gate=gate),
        TrainingArguments(
            f"{args.folder}/checkpoints",
            num_train_epochs=args.epochs,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=args.gradient_checkpointing,
            learning_rate=3e-3,
            logging_steps=4,
            use_cpu=args.cpu,
            eval_strategy="epoch",
            **training,
        ),
        data_collator=collator,
        train_dataset=data,
        eval_dataset=held_out,
    )
    attach(trainer)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(arguments("ReGATE in Trainer"), report_to="none")
