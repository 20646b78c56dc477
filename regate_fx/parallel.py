"""Which ways to share a model among devices cannot be gated."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from regate_fx.errors import Unsupported


def refuse_tensor_parallel(model: nn.Module) -> None:
    """FSDP2 shards parameters along one axis of ranks and gathers them to run; what is split besides stays split."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    gathered = {id(parameter) for unit in units for parameter in unit.parameters()}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        splits = sum(not placement.is_replicate() for placement in parameter.placements)
        if splits > (id(parameter) in gathered):
            raise Unsupported(
                "tensor parallelism",
                f"{name} is split among ranks, which would have to compute the same positions together.",
                "Use data parallelism, or FSDP2 with scope='layers'.",
            )


def parallel_classes() -> tuple[type, ...]:
    """Containers whose communication belongs to the object they were set up on."""
    classes: tuple[type, ...] = (DataParallel, DistributedDataParallel)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        classes += (FSDPModule, FullyShardedDataParallel)
    return classes
