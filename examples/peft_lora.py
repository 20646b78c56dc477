"""ReGATE with LoRA adapters, in Hugging Face's Trainer.

python examples/peft_lora.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
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
    collator = DataCollatorForSeq2Seq(tokenizer)
    losses = teacher_losses(model, data, f"{args.folder}/losses", tokenizer=tokenizer, collator=collator)

    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    gate = ReGate(losses, schedule=DualCycle(keep=0.5, warmup=4, cycle=8, dense=2))
    trainer = Trainer(
        regate_fx.compile(adapted, backend=args.backend, gate=gate),
        TrainingArguments(
            f"{args.folder}/checkpoints",
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            gradient_checkpointing=args.gradient_checkpointing,
            learning_rate=1e-2,
            logging_steps=4,
            use_cpu=args.cpu,
            **training,
        ),
        data_collator=collator,
        train_dataset=data,
    )
    attach(trainer)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(arguments("ReGATE with LoRA"), report_to="none")
