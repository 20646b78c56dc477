"""Which sizes of a call vary, so that one capture serves them all.

Shapes: B samples, S positions, N active positions, L the most active positions of a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from regate_fx.inputs import feeds_decoder
from regate_fx.plan import TokenPlan

# Inputs that by the transformers convention have one entry per position.
_INPUTS = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids",
}  # fmt: skip
_DECODER_INPUTS = {
    "decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "decoder_position_ids",
}  # fmt: skip
_LABELS = {"labels", "shift_labels"}


def by_position(inputs: Mapping[str, Any]) -> set[str]:
    """Names of a call's inputs that have an entry for each of the decoder's positions."""
    return _LABELS | (_DECODER_INPUTS if feeds_decoder(inputs) else _INPUTS)


def mark_sizes(
    plan: TokenPlan, inputs: dict[str, Any], by_sample: bool = False
) -> tuple[tuple[str, int, int], ...]:
    """Make B, S, N and L symbols of the capture, and say which inputs share B and S with the plan.

    A size of one is left to Dynamo, which specialises it. by_sample: other inputs as long as the batch may have an
    entry for each sample, as pictures do that a decoder attends to; whether they do is left to the capture to find.
    """
    for tensor in plan.tensors():
        _mark(tensor, range(tensor.dim()))
    ties: list[tuple[str, int, int]] = []
    named = by_position(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        if name in _INPUTS - named:
            dims = _encoder_dims(value, len(plan.row_of))
        else:
            dims = _token_dims(name, value, plan.row_of) if name in named else []
            if not dims and by_sample and value.dim() and len(value) == len(plan.row_of):
                dims = [(0, None)]
        _mark(value, [dim for dim, _ in dims])
        ties.extend((name, dim, axis) for dim, axis in dims if axis is not None)
    return tuple(ties)


def _mark(tensor: Tensor, dims: Iterable[int]) -> None:
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _encoder_dims(value: Tensor, batch: int) -> list[tuple[int, int | None]]:
    """Dimensions of an encoder's input that vary: its samples are the decoder's, its positions are not."""
    if value.dim() < 2 or value.shape[0] != batch:
        return []
    return [(0, 0), (1, None)]


def _token_dims(name: str, value: Tensor, row_of: Tensor) -> list[tuple[int, int | None]]:
    """Pairs (dimension, 0 for B or 1 for S) of an input."""
    batch, length = row_of.shape
    if name.endswith("inputs_embeds"):
        return [(0, 0), (1, 1)]
    if value.is_floating_point() and value.dim() != 4:
        return []
    if value.dim() < 2 or value.shape[-1] != length:
        return []
    dims: list[tuple[int, int | None]] = [(value.dim() - 1, 1)]
    if value.dim() == 4 and value.shape[2] == length:
        dims.append((2, 1))
    batch_dim = value.dim() - 2 if value.dim() < 4 else 0
    if value.shape[batch_dim] == batch:
        dims.append((batch_dim, 0))
    return dims
