"""ReGATE as in the paper's VideoChat2: a frozen language backbone in bfloat16 with LoRA, and a trained projector.

python examples/frozen_backbone.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from small_chat import arguments
from small_pictures import make_processor, pictures, small_llava
from transformers import Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import regate_fx
from regate_fx.integrations import attach
from regate_fx.runtime import DualCycle, ReGate, teacher_losses


def main(args: argparse.Namespace, **training: Any) -> Trainer:
    torch.manual_seed(0)
    processor = make_processor()
    model = small_llava(processor)
    model.model.language_model.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    data = pictures(args.samples)
    collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    folder = f"{args.folder}/losses"
    losses = teacher_losses(model, data, folder, tokenizer=processor.tokenizer, collator=collator)

    targets = r".*language_model.*(q_proj|v_proj|up_proj|down_proj)"
    lora = LoraConfig(r=8, target_modules=targets, modules_to_save=["multi_modal_projector"])
    gate = ReGate(losses, schedule=DualCycle(keep=0.5, warmup=4, cycle=8, dense=2))
    trainer = Trainer(
        regate_fx.compile(get_peft_model(model, lora), backend=args.backend, gate=gate),
        TrainingArguments(
            f"{args.folder}/checkpoints",
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            gradient_checkpointing=args.gradient_checkpointing,
            learning_rate=1e-2,
            logging_steps=4,
            use_cpu=args.cpu,
            remove_unused_columns=False,  # the collator reads messages and images, not what the model takes
            **training,
        ),
        data_collator=collator,
        train_dataset=data,
    )
    attach(trainer)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(arguments("ReGATE with a frozen backbone"), report_to="none")
