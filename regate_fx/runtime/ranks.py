"""What the processes of a data-parallel run tell each other.

Shapes: k labels, different on each rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regate_fx.errors import InvalidInput


def rank() -> int:
    """Number of this process, 0 where there is one only."""
    return dist.get_rank() if _several() else 0


def count() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if _several() else 1


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Compare what every rank was started with; a collective.

    Raises the same `InvalidInput` on all ranks, with the names of all settings that differ and two ranks that
    disagree on the first of them.
    """
    everyone: list[Any] = [None] * count()
    dist.all_gather_object(everyone, dict(settings))
    first = everyone[0]
    for other, theirs in enumerate(everyone):
        names = sorted(name for name in first.keys() | theirs.keys() if first.get(name) != theirs.get(name))
        if names:
            raise InvalidInput(
                names[0],
                f"is {first.get(names[0])!r} on rank 0 and {theirs.get(names[0])!r} on rank {other}"
                f"{f', which differ in {names} altogether' if len(names) > 1 else ''}.",
                "Start every rank with the same store, settings and seed.",
            )


def gather_labels(slots: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each rank has, in the order of ranks, on the device of `slots`; a collective.

    slots: int64 [k]; values: float32 [k].
    """
    device = _device_of_collectives(slots.device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor([len(slots)], device=device))
    lengths = [int(size) for size in sizes]
    gathered = [_gather_padded(tensor.to(device), lengths) for tensor in (slots, values)]
    return [(theirs.to(slots.device), of.to(slots.device)) for theirs, of in zip(*gathered, strict=True)]


def _gather_padded(own: Tensor, lengths: list[int]) -> list[Tensor]:
    # Collectives want one size for all ranks.
    padded = own.new_zeros(max(lengths))
    padded[: len(own)] = own
    everyone = [torch.empty_like(padded) for _ in lengths]
    if len(padded):
        dist.all_gather(everyone, padded)
    return [theirs[:length] for theirs, length in zip(everyone, lengths, strict=True)]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device_of_collectives(wanted: torch.device) -> torch.device:
    """`wanted` where the process group works on it, else the accelerator that it works on."""
    backends = dist.get_backend_config()
    if f"{wanted.type}:" in backends or backends == "gloo":
        return wanted
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return wanted
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
