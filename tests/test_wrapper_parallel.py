"""Gated models in data-parallel training."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from key_masked_engine import batch, gate, gradients, without_mask
from small_models import build
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from regate_fx.errors import Unsupported
from regate_fx.wrapper import ungated


def _ddp_worker(rank: int, folder: str, find_unused: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gated, engine = gate(build("llama"))
    parallel = DistributedDataParallel(gated, find_unused_parameters=find_unused)
    output = parallel(**batch(seed=rank))
    assert output.counted is not None
    output.loss.backward()
    assert len(engine.seen) == 1
    torch.save(gradients(gated), f"{folder}/{rank}.pt")
    parallel(**without_mask(batch()))
    assert len(engine.seen) == 1
    del parallel, output  # DDP may hang where its process group is gone before it
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.parametrize("find_unused", [False, True])
def test_ddp_averages_the_gradients_of_gated_steps(find_unused: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_ddp_worker, args=(str(tmp_path), find_unused), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = []
    for rank in range(2):
        gated, _ = gate(build("llama"))
        gated(**batch(seed=rank)).loss.backward()
        alone.append(gradients(gated))
    assert ranks[0].keys() == alone[0].keys()
    for name, gradient in ranks[0].items():
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2)
        assert torch.equal(gradient, ranks[1][name])


@pytest.fixture
def one_process_group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.usefixtures("one_process_group")
def test_fully_shard_changes_the_class_of_a_gated_model() -> None:
    expected, _ = gate(build("llama"))
    expected(**batch()).loss.backward()
    gated, engine = gate(build("llama"))
    shard(gated)
    assert isinstance(gated, FSDPModule)
    assert type(gated).__name__ == "FSDPLlamaForCausalLM"
    assert type(ungated(gated)).__name__ == "LlamaForCausalLM"
    assert list(gated.state_dict()) == list(expected.state_dict())
    gated(**batch()).loss.backward()
    assert len(engine.seen) == 1
    for (name, p), (_, q) in zip(gated.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)
    gated(**without_mask(batch()))
    assert len(engine.seen) == 1


@pytest.mark.usefixtures("one_process_group")
def test_a_sharded_model_has_to_be_gated_first() -> None:
    for model in (build("llama"), gate(build("llama"))[0]):
        shard(model)
        with pytest.raises(Unsupported, match=r"FSDPLlamaForCausalLM.*Gate the model first"):
            gate(model)


def test_data_parallel_replicas_are_refused_by_name() -> None:
    gated, engine = gate(build("llama"))
    replica = gated._replicate_for_data_parallel()
    for name, child in gated.named_children():
        setattr(replica, name, child)
    inputs = batch()
    assert torch.equal(replica(**without_mask(inputs)).loss, gated(**without_mask(inputs)).loss)
    with pytest.raises(Unsupported, match=r"nn\.DataParallel.*DistributedDataParallel"):
        replica(**inputs)
    assert engine.seen == []


def _split(model: nn.Module, mesh: DeviceMesh) -> None:
    """As `tp_plan` and `parallelize_module` split a linear layer."""
    parallelize_module(model.model.layers[1].mlp, mesh, {"up_proj": ColwiseParallel()})


@pytest.mark.usefixtures("one_process_group")
def test_tensor_parallelism_is_refused_when_it_is_gated() -> None:
    model = build("llama")
    _split(model, init_device_mesh("cpu", (1,)))
    with pytest.raises(Unsupported, match=r"tensor parallelism .*layers\.1\.mlp\.up_proj\.weight is split"):
        gate(model)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("with_fsdp", [False, True])
def test_tensor_parallelism_is_refused_at_the_first_call(with_fsdp: bool) -> None:
    model = build("llama")
    gated, engine = gate(model)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    _split(model, mesh["tensor"])
    if with_fsdp:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["data"])
    with pytest.raises(Unsupported, match="tensor parallelism"):
        gated(**batch())
    assert engine.seen == []


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("axes", [("ranks",), ("copies", "shards")])
def test_layers_sharded_by_fsdp_alone_are_not_taken_for_it(axes: tuple[str, ...]) -> None:
    model = build("llama")
    gated, engine = gate(model)
    mesh = init_device_mesh("cpu", (1,) * len(axes), mesh_dim_names=axes)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    gated(**batch())
    gate(model)
    assert len(engine.seen) == 1
