"""ReGATE in TRL's SFTTrainer, on conversations of which only the answers are learnt.

python examples/trl_sft.py
python examples/trl_sft.py --padding-free
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import PartialState
from small_chat import arguments, conversations, make_tokenizer, small_llama
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import regate_fx
from regate_fx.integrations import attach
from regate_fx.runtime import DualCycle, ReGate, teacher_losses


def main(args: argparse.Namespace, **training: Any) -> SFTTrainer:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = small_llama(tokenizer)
    trainer = SFTTrainer(
        regate_fx.compile(model, backend=args.backend),
        SFTConfig(
            f"{args.folder}/checkpoints",
            assistant_only_loss=True,
            padding_free=args.padding_free,
            max_length=None,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            gradient_checkpointing=args.gradient_checkpointing,
            learning_rate=3e-3,
            logging_steps=4,
            use_cpu=args.cpu,
            bf16=False,
            **training,
        ),
        train_dataset=conversations(args.samples),
        eval_dataset=conversations(16, seed=1),
        processing_class=tokenizer,
    )
    # The trainer has made tokens and labels of the conversations; the teacher sees those.
    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    folder, data = f"{args.folder}/losses", trainer.train_dataset
    with PartialState().main_process_first():
        losses = teacher_losses(model, data, folder, tokenizer=tokenizer, collator=collator)
    attach(trainer, ReGate(losses, schedule=DualCycle(keep=0.5, warmup=4, cycle=8, dense=2)))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(arguments("ReGATE in SFTTrainer"), report_to="none").evaluate()
