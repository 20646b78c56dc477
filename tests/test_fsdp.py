"""Gated models whose layers are sharded over two processes by FSDP2.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import Batch, build, random_batch
from tiers import exhaustive
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import regate_fx
from regate_fx.errors import NotGateable, Unsupported

RANKS = 2


def batch_of(rank: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return random_batch(generator, 2 + rank, 9 + step + rank, padding="left" if step % 2 else "right")


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch.model_inputs(), labels=batch.labels, token_mask=batch.token_mask).loss


def shard(gated: Any, policy: MixedPrecisionPolicy | None = None, ends: bool = False) -> None:
    """ends: embedding, final norm and head apart from the rest, the last two as one group, as accelerate does it."""
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if policy is not None:
        options["mp_policy"] = policy
    for layer in gated.model.layers:
        fully_shard(layer, **options)
    if ends:
        tail = [gated.model.norm, gated.lm_head]
        if gated.config.tie_word_embeddings:
            tail.insert(1, gated.model.embed_tokens)
        else:
            fully_shard(gated.model.embed_tokens, **options)
        fully_shard(tail, reshard_after_forward=False, **options)
    fully_shard(gated, **options)


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def train(gated: nn.Module, batches: Callable[[int], list[Batch]], steps: int = 3) -> list[dict[str, Tensor]]:
    """The gradients of each step, as the optimizer sees them."""
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.1)
    gradients = []
    for step in range(steps):
        losses = [loss_of(gated, batch) for batch in batches(step)]
        (torch.stack(losses).mean()).backward()
        gradients.append({name: whole(p.grad) for name, p in gated.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def run_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    torch.multiprocessing.start_processes(_rank, (work, folder), nprocs=RANKS, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _rank(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "backend", "checkpointed", "ends", "tied"),
    [
        ("llama", "aot_eager", True, False, False),
        pytest.param("llama", "inductor", False, True, False, marks=exhaustive),
        ("qwen2", "eager", False, True, True),
        pytest.param("mixtral", "eager", False, False, False, marks=exhaustive),
    ],
)
def test_sharded_steps_are_those_of_one_process(
    name: str, backend: str, checkpointed: bool, ends: bool, tied: bool, tmp_path: Path
) -> None:
    def model() -> Any:
        made = build(name, num_hidden_layers=3, tie_word_embeddings=tied)
        if checkpointed:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        return made

    def work(rank: int) -> Any:
        gated = regate_fx.compile(model(), backend=backend, scope="layers", validate=False)
        shard(gated, ends=ends)
        gradients = train(gated, lambda step: [batch_of(rank, step)])
        kept = all(isinstance(p, DTensor) for p in gated.model.layers.parameters())
        return gradients, kept, gated.report.gated, gated.report.traces

    alone = regate_fx.compile(model(), backend="eager", validate=False)
    expected = train(alone, lambda step: [batch_of(rank, step) for rank in range(RANKS)])
    for gradients, still_sharded, gated_layers, traces in run_ranks(work, tmp_path):
        assert still_sharded
        assert gated_layers == 3
        assert traces <= 2
        for seen, wanted in zip(gradients, expected, strict=True):
            assert seen.keys() == wanted.keys()
            for parameter, grad in wanted.items():
                torch.testing.assert_close(seen[parameter], grad, rtol=2e-4, atol=2e-6)


@exhaustive
def test_in_mixed_precision_it_is_what_sharding_the_untouched_model_gives(tmp_path: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def step(gated: Any, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        shard(gated, policy)
        batch = batch_of(rank, 0)
        everything = torch.ones_like(batch.token_mask)
        inputs = batch.model_inputs() | {"labels": batch.labels.masked_fill(~batch.real, -100)}
        if hasattr(gated, "gating"):
            inputs["token_mask"] = everything
        loss = gated(**inputs).loss
        loss.backward()
        return loss.detach(), {name: whole(p.grad) for name, p in gated.named_parameters()}

    def work(rank: int) -> Any:
        gated = regate_fx.compile(build("llama"), backend="aot_eager", scope="layers")
        return step(gated, rank), step(build("llama"), rank)

    for (loss, gradients), (expected, wanted) in run_ranks(work, tmp_path):
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-2)
        for name, grad in wanted.items():
            error = (gradients[name] - grad).norm() / grad.norm()
            assert error < 0.05, name


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharded_layers_in_one_graph_are_refused() -> None:
    gated = regate_fx.compile(build("llama"), backend="eager")
    shard(gated)
    with pytest.raises(Unsupported, match=re.escape("Compile it with scope='layers'")):
        loss_of(gated, batch_of(0, 0))


@pytest.mark.usefixtures("one_rank")
def test_a_unit_of_several_layers_is_refused() -> None:
    gated = regate_fx.compile(build("llama"), backend="eager", scope="layers")
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(gated.model, mesh=mesh)
    fully_shard(gated, mesh=mesh)
    with pytest.raises(Unsupported, match="FSDP2 around a FSDPLlamaModel that is not one decoder layer"):
        loss_of(gated, batch_of(0, 0))
    assert all(isinstance(p, DTensor) for p in gated.model.layers.parameters())


@pytest.mark.usefixtures("one_rank")
def test_a_refused_capture_leaves_the_parameters_in_place() -> None:
    gated = regate_fx.compile(build("llama"), backend="eager", scope="layers")
    for layer in gated.model.layers:
        layer.self_attn.forward = lambda hidden_states, **kwargs: (hidden_states.cumsum(1), None)
    shard(gated)
    before = list(gated.model.layers.parameters())
    with pytest.raises(NotGateable, match="no attention"):
        loss_of(gated, batch_of(0, 0))
    assert all(after is own for after, own in zip(gated.model.layers.parameters(), before, strict=True))


def test_a_model_validated_before_sharding_stays_validated(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        gated = regate_fx.compile(build("llama"), backend="eager", scope="layers")
        loss_of(gated, batch_of(rank, 0)).backward()
        gated.zero_grad()
        shard(gated)
        gradients = train(gated, lambda step: [batch_of(rank, step)], steps=1)
        return gated.report.validation, gradients

    (said, first), (_, second) = run_ranks(work, tmp_path)
    assert said == "validated against the untouched model and the dense reference"
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
