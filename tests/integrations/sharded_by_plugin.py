"""Shard a gated model by accelerate's FSDP2 plugin and compare its training with one process.

Launched by `test_launch.py`:

accelerate launch --multi_gpu --num_processes 2 tests/integrations/sharded_by_plugin.py

Accelerate offers the plugin on accelerators only; what it does to the model and the optimizer is the same on CPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests")]

from small_models import Batch, build, random_batch  # noqa: E402

import regate_fx  # noqa: E402


def sharding_accelerator(from_first_rank: bool) -> Accelerator:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=from_first_rank,
        reshard_after_forward=True,
    )
    return accelerator


def step(model: Any, batch: Batch) -> Any:
    output = model(**batch.model_inputs(), labels=batch.labels, token_mask=batch.token_mask)
    output.loss.backward()
    return output


def check(tied: bool, from_first_rank: bool) -> None:
    """Three steps of two sharded processes, each on samples of its own, are those of whole models averaged."""
    accelerator = sharding_accelerator(from_first_rank)
    whole = build("llama", tie_word_embeddings=tied)
    gated = regate_fx.compile(
        build("llama", tie_word_embeddings=tied), backend="eager", scope="layers", validate=False
    )
    gated, optimizer = accelerator.prepare(gated, torch.optim.SGD(gated.parameters(), lr=0.1))
    reference = regate_fx.compile(whole, backend="eager", validate=False)
    plain = torch.optim.SGD(whole.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    for number in range(3):
        batch = random_batch(generator, 3, 9 + number)
        seen, wanted = step(gated, batch), step(reference, batch)
        torch.testing.assert_close(seen.token_loss, wanted.token_loss)
        for parameter in whole.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        for chosen in (optimizer, plain):
            chosen.step()
            chosen.zero_grad()
    assert [layer.kind for layer in gated.report.layers] == ["varlen"] * 2
    for (name, sharded), parameter in zip(gated.named_parameters(), whole.parameters(), strict=True):
        assert sharded.to_local().numel() < parameter.numel(), name
        torch.testing.assert_close(sharded.full_tensor(), parameter, msg=name)
    print(f"equal: tied {tied}, weights from the first rank {from_first_rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    check(tied=False, from_first_rank=False)
    check(tied=True, from_first_rank=True)
    dist.destroy_process_group()
