"""ReGATE in a loop of one's own on accelerate: the model needs nothing, an exact loss over several batches a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from regate_fx.runtime import ReGate


def counted_labels(accelerator: Accelerator, gate: ReGate, batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """How many labels count in the coming optimizer step, on all ranks: int64 [], at least 1, on the device.

    batches: those that this rank accumulates, made by `gate.collate`. To make the loss the mean over all those labels:

        items = counted_labels(accelerator, gate, batches)
        for batch in batches:
            loss = model(**batch, num_items_in_batch=items).loss * accelerator.num_processes
            accelerator.backward(loss * accelerator.gradient_accumulation_steps)

    with which what DDP and `backward` divide by cancels out. Raises as `ReGate.count_labels`.
    """
    counted = torch.tensor(gate.count_labels(batches), device=accelerator.device)
    return accelerator.reduce(counted, "sum").clamp(min=1)
