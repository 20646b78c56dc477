"""ReGATE in a training loop of one's own on accelerate.

python examples/accelerate_loop.py
accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator, PartialState
from small_chat import arguments, conversations, make_tokenizer, small_llama, tokenized
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

import regate_fx
from regate_fx.integrations import register
from regate_fx.runtime import DualCycle, ReGate, teacher_losses


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    tokenizer = make_tokenizer()
    model = small_llama(tokenizer)
    data = tokenized(tokenizer, conversations(args.samples))
    held_out = tokenized(tokenizer, conversations(16, seed=1).remove_columns("sample_id"))
    collator = DataCollatorForSeq2Seq(tokenizer)
    with accelerator.main_process_first():
        losses = teacher_losses(model, data, f"{args.folder}/losses", tokenizer=tokenizer, collator=collator)

    gate = ReGate(losses, schedule=DualCycle(keep=0.5, warmup=4, cycle=8, dense=2), collator=collator)
    gated = regate_fx.compile(model, backend=args.backend, gate=gate)
    if args.gradient_checkpointing:
        gated.gradient_checkpointing_enable()
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=gate.collate)
    held_out_loader = DataLoader(held_out, batch_size=4, collate_fn=collator)
    optimizer = torch.optim.AdamW(gated.parameters(), lr=3e-3)
    gated, optimizer, loader, held_out_loader = accelerator.prepare(gated, optimizer, loader, held_out_loader)
    register(accelerator, gate)  # save_state and load_state take the gate along

    for _ in range(args.epochs):
        for batch in loader:
            with accelerator.accumulate(gated):
                accelerator.backward(gated(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
        gate.exchange()
    gated.eval()
    with torch.no_grad():
        found = [accelerator.gather_for_metrics(gated(**batch).loss[None]) for batch in held_out_loader]
    accelerator.save_state(f"{args.folder}/state")
    accelerator.print(f"held-out loss {torch.cat(found).mean():.3f} after {gate.global_step} steps")


if __name__ == "__main__":
    main(arguments("ReGATE in a loop on accelerate"))
    PartialState().destroy_process_group()  # not in main: DDP may hang where its group is gone before it
