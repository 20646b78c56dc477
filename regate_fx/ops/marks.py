"""Operators that mark places in a captured graph; the passes replace them before anything runs.

Shapes: B samples, S positions, N active positions, L the most active positions of a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("regate_fx::anchor", mutates_args=())
def anchor(
    rows: Tensor,
    row_of: Tensor,
    cu_seqlens: Tensor,
    slot_rows: Tensor,
    row_slots: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Bring the token plan into the graph and stand for its two extra outputs.

    Takes the tensors of `regate_fx.plan.TokenPlan`, the padding mask [B, S] it was made with and the labels [B, S];
    returns placeholders for the token losses, float32 [B, S], and the counted labels, bool [B, S]. A graph in which
    the passes found no loss runs this body: no label has a loss of minus infinity, so that it says that nothing was
    written, and whoever takes it for one finds it not finite.
    """
    nothing_written = row_of.new_full(row_of.shape, -torch.inf, dtype=torch.float32)
    return nothing_written, torch.zeros_like(row_of, dtype=torch.bool)


@anchor.register_fake
def _(
    rows: Tensor,
    row_of: Tensor,
    cu_seqlens: Tensor,
    slot_rows: Tensor,
    row_slots: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(row_of, dtype=torch.float32), torch.empty_like(row_of, dtype=torch.bool)


@torch.library.custom_op("regate_fx::cast", mutates_args=())
def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, kept by normalisation even where it takes `x` for being of that dtype already.

    It has no derivative: `aten._to_copy` is back in its place before any is taken.
    """
    return x.to(dtype, copy=True)


@cast.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("regate_fx::opaque", mutates_args=())
def opaque(
    operands: list[Tensor], sizes: list[int], like: list[int], shapes: list[int], key: int
) -> list[Tensor]:
    """Carry an operator that must stay whole through normalisation.

    Output i has the dtype and device of `operands[like[i]]`. shapes: for each output -1, where it has that operand's
    shape too, or its rank and a pair for each dimension: (operand, dimension) whose size it has, or (-1, size).
    sizes: the operator's integer operands. key: names the operator it stands for.
    """
    raise AssertionError("regate_fx::opaque stands for another operator and must not run")


@opaque.register_fake
def _(operands: list[Tensor], sizes: list[int], like: list[int], shapes: list[int], key: int) -> list[Tensor]:
    numbers = iter(shapes)
    outputs: list[Tensor] = []
    for index in like:
        rank = next(numbers)
        pairs = [(next(numbers), next(numbers)) for _ in range(rank)]
        shape = [size if operand < 0 else operands[operand].shape[size] for operand, size in pairs]
        outputs.append(torch.empty_like(operands[index]) if rank < 0 else operands[index].new_empty(shape))
    return outputs
