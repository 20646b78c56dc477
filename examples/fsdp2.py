"""ReGATE with the decoder layers sharded over processes by FSDP2.

torchrun --nproc_per_node 2 examples/fsdp2.py
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from accelerate import PartialState
from small_chat import arguments, conversations, make_tokenizer, small_llama, tokenized
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import DataCollatorForSeq2Seq

import regate_fx
from regate_fx.runtime import DualCycle, ReGate, teacher_losses


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    state = PartialState(cpu=args.cpu)
    tokenizer = make_tokenizer()
    model = small_llama(tokenizer).to(state.device)
    data = tokenized(tokenizer, conversations(args.samples))
    collator = DataCollatorForSeq2Seq(tokenizer)
    with state.main_process_first():
        losses = teacher_losses(model, data, f"{args.folder}/losses", tokenizer=tokenizer, collator=collator)

    gate = ReGate(losses, schedule=DualCycle(keep=0.5, warmup=4, cycle=8, dense=2), collator=collator)
    gated = regate_fx.compile(model, backend=args.backend, gate=gate, scope="layers")
    if args.gradient_checkpointing:
        gated.gradient_checkpointing_enable()
    for layer in gated.model.layers:
        fully_shard(layer)
    fully_shard(gated)

    optimizer = torch.optim.AdamW(gated.parameters(), lr=3e-3)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=4, sampler=sampler, collate_fn=gate.collate)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            moved = {name: value.to(state.device) for name, value in batch.items()}
            loss = gated(**moved).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        gate.exchange()
        state.print(f"epoch {epoch}: loss {loss.item():.3f}")
    gate.save(f"{args.folder}/regate.safetensors")


if __name__ == "__main__":
    main(arguments("ReGATE with layers sharded by FSDP2"))
    dist.destroy_process_group()
