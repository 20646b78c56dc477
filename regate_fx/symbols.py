"""Which sizes of a call vary, so that one capture serves them all.

Shapes: B samples, S positions, N active positions, L the most active positions of a sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from regate_fx.plan import TokenPlan

# Inputs that by the transformers convention have one entry per position, and where B and S stand in them.
BY_POSITION = {
    "input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids", "token_type_ids", "mm_token_type_ids",
    "decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "shift_labels",
}  # fmt: skip


def mark_sizes(plan: TokenPlan, inputs: dict[str, Any]) -> tuple[tuple[str, int, int], ...]:
    """Make B, S, N and L symbols of the capture, and say which inputs share B and S with the plan.

    A size of one is left to Dynamo, which specialises it.
    """
    for tensor in plan.tensors():
        _mark(tensor, range(tensor.dim()))
    ties: list[tuple[str, int, int]] = []
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        dims = _token_dims(name, value, plan.row_of)
        _mark(value, [dim for dim, _ in dims])
        ties.extend((name, dim, axis) for dim, axis in dims)
    return tuple(ties)


def _mark(tensor: Tensor, dims: Iterable[int]) -> None:
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _token_dims(name: str, value: Tensor, row_of: Tensor) -> list[tuple[int, int]]:
    """Pairs (dimension, 0 for B or 1 for S) of an input."""
    batch, length = row_of.shape
    if name == "inputs_embeds":
        return [(0, 0), (1, 1)]
    if value.is_floating_point() and value.dim() != 4:
        return []
    if name in BY_POSITION and value.dim() >= 2 and value.shape[-1] == length:
        dims = [(value.dim() - 1, 1)]
        if value.dim() == 4 and value.shape[2] == length:
            dims.append((2, 1))
        batch_dim = value.dim() - 2 if value.dim() < 4 else 0
        if value.shape[batch_dim] == batch:
            dims.append((batch_dim, 0))
        return dims
    return []
