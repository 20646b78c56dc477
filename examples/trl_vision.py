"""ReGATE in TRL's SFTTrainer, on conversations about pictures.

python examples/trl_vision.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from small_chat import arguments
from small_pictures import make_processor, pictures, small_llava
from trl import SFTConfig, SFTTrainer

import regate_fx
from regate_fx.integrations import attach
from regate_fx.runtime import DualCycle, ReGate, teacher_losses


def main(args: argparse.Namespace, **training: Any) -> SFTTrainer:
    torch.manual_seed(0)
    processor = make_processor()
    model = small_llava(processor)
    trainer = SFTTrainer(
        regate_fx.compile(model, backend=args.backend),
        SFTConfig(
            f"{args.folder}/checkpoints",
            assistant_only_loss=True,
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
        train_dataset=pictures(args.samples),
        processing_class=processor,
    )
    data, collator, folder = trainer.train_dataset, trainer.data_collator, f"{args.folder}/losses"
    losses = teacher_losses(model, data, folder, tokenizer=processor.tokenizer, collator=collator)
    attach(trainer, ReGate(losses, schedule=DualCycle(keep=0.5, warmup=4, cycle=8, dense=2)))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(arguments("ReGATE in SFTTrainer, with pictures"), report_to="none")
