"""From a token mask to the index tensors that the rewritten graph takes as inputs.

Shapes: B samples, S positions, N active positions in the batch, L the most active positions of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from regate_fx.errors import InvalidInput


@dataclass(frozen=True)
class TokenPlan:
    """Which positions are active, as the index tensors the graph needs. All on the batch's device.

    rows:        int64 [N]    flat index `b * S + s` of every active position, ascending
    row_of:      int64 [B, S] inverse of `rows`: the packed row of a position, -1 where elided
    cu_seqlens:  int32 [B+1]  packed row at which each sample starts, the last entry is N
    slot_rows:   int64 [B, L] compact layout: the packed row in slot l of sample b, -1 where empty
    row_slots:   int64 [N]    inverse of `slot_rows`: flat slot `b * L + l` of every packed row
    """

    rows: Tensor
    row_of: Tensor
    cu_seqlens: Tensor
    slot_rows: Tensor
    row_slots: Tensor

    @property
    def active(self) -> int:
        """N, the number of active positions."""
        return self.rows.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def check_token_mask(token_mask: object, batch: int, length: int, device: torch.device) -> Tensor:
    """Raise `InvalidInput` unless `token_mask` is bool [B, S] on the batch's device."""
    if not isinstance(token_mask, Tensor):
        raise InvalidInput(
            "token_mask", f"expected a bool tensor, got {type(token_mask).__name__}.", "Pass a [B, S] tensor."
        )
    if token_mask.dtype != torch.bool:
        raise InvalidInput(
            "token_mask", f"expected dtype torch.bool, got {token_mask.dtype}.", "Use mask.bool()."
        )
    if tuple(token_mask.shape) != (batch, length):
        raise InvalidInput(
            "token_mask",
            f"expected shape [{batch}, {length}] like the batch, got {list(token_mask.shape)}.",
            "Give one entry per position of the decoder's input.",
        )
    if token_mask.device != device:
        raise InvalidInput(
            "token_mask",
            f"is on {token_mask.device}, the batch on {device}.",
            f"Move it with .to({str(device)!r}).",
        )
    return token_mask


def make_plan(token_mask: Tensor, attention_mask: Tensor | None = None) -> TokenPlan:
    """Build the plan of one batch.

    token_mask: bool [B, S]; attention_mask: [B, S], zero at padding, or None. Padding is never active.
    Raises `InvalidInput` when no position is left. Waits for the device once, to learn N and L.
    """
    active = token_mask if attention_mask is None else token_mask & (attention_mask != 0)
    B, S = active.shape
    rows = active.flatten().nonzero().squeeze(1)
    N = rows.shape[0]
    if N == 0:
        raise InvalidInput(
            "token_mask",
            "no position of the batch is active.",
            "Keep at least one position that attention_mask does not mark as padding.",
        )
    device = active.device
    counts = active.sum(1)
    L = int(counts.max())
    ends = counts.cumsum(0)
    cu_seqlens = torch.zeros(B + 1, dtype=torch.int32, device=device)
    cu_seqlens[1:] = ends
    packed = torch.arange(N, device=device)
    row_of = torch.full((B * S,), -1, dtype=torch.int64, device=device)
    row_of[rows] = packed
    sample = rows // S
    row_slots = sample * L + packed - (ends - counts)[sample]
    slot_rows = torch.full((B * L,), -1, dtype=torch.int64, device=device)
    slot_rows[row_slots] = packed
    return TokenPlan(rows, row_of.view(B, S), cu_seqlens, slot_rows.view(B, L), row_slots)
