"""From a token mask to the index tensors that the rewritten graph takes as inputs.

Shapes: B samples, S positions, N active positions in the batch, L the most active positions of a sample, N' and L'
the same rounded up to a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from regate_fx.errors import InvalidInput


@dataclass(frozen=True)
class TokenPlan:
    """Which positions are active, as the index tensors the graph needs. All on the batch's device.

    The plan of a bucket (`in_bucket`) has N' - N more rows, which are no position's: a sample of their own behind the
    others, -1 in `rows` and in `row_slots`.

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

    def in_bucket(self, multiple: int) -> TokenPlan:
        """The same plan with N and L rounded up to multiples, so that few sizes serve all masks.

        `cu_seqlens` becomes int32 [B+2], its last sample the rows that fill the bucket; they are fewer than L'.
        """
        N, L = self.active, self.slot_rows.shape[1]
        rows, slots = (_rounded(size, multiple) for size in (N, L))
        return TokenPlan(
            F.pad(self.rows, (0, rows - N), value=-1),
            self.row_of,
            F.pad(self.cu_seqlens, (0, 1), value=rows),
            F.pad(self.slot_rows, (0, slots - L), value=-1),
            F.pad(self.row_slots + self.row_slots // L * (slots - L), (0, rows - N), value=-1),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


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


def make_plan(
    token_mask: Tensor, attention_mask: Tensor | None = None, sizes: tuple[int, int] | None = None
) -> TokenPlan:
    """Build the plan of one batch.

    token_mask: bool [B, S]; attention_mask: [B, S], zero at padding, or None. Padding is never active.
    sizes: N and L, where the caller knows them; otherwise this waits for the device once to learn them. On the meta
    device, where nothing can be counted, every position counts as active.
    Raises `InvalidInput` when no position is left, or where `sizes` are not those of the mask (on an accelerator that
    is an asynchronous assertion).
    """
    active = token_mask if attention_mask is None else token_mask & (attention_mask != 0)
    B, S = active.shape
    counts = active.sum(1)
    if sizes is None:
        N, L = (B * S, S) if active.is_meta else _measure(counts)
    else:
        N, L = _asserted(sizes, counts)
    if N == 0:
        raise InvalidInput(
            "token_mask",
            "no position of the batch is active.",
            "Keep at least one position that attention_mask does not mark as padding.",
        )
    rows = active.flatten().nonzero_static(size=N).squeeze(1)
    row_of = torch.where(active, active.flatten().cumsum(0).view(B, S) - 1, -1)
    cu_seqlens = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    slots = torch.arange(L, device=active.device)
    is_filled = slots < counts[:, None]
    slot_rows = torch.where(is_filled, cu_seqlens[:-1, None] + slots, -1)
    row_slots = is_filled.flatten().nonzero_static(size=N).squeeze(1)
    return TokenPlan(rows, row_of, cu_seqlens, slot_rows, row_slots)


def _measure(counts: Tensor) -> tuple[int, int]:
    """N and L of active positions per sample (int64 [B]), in one transfer."""
    found = counts.tolist()
    return sum(found), max(found, default=0)


def _asserted(sizes: tuple[int, int], counts: Tensor) -> tuple[int, int]:
    fits = (counts.sum() == sizes[0]) & (counts.max() == sizes[1])
    if counts.device.type != "cpu":
        torch._assert_async(
            fits, "token_mask does not have as many active positions as were counted on the host"
        )
    elif not bool(fits):
        raise InvalidInput(
            "token_mask",
            f"was counted as {sizes[0]} active positions, at most {sizes[1]} of a sample; it has "
            f"{int(counts.sum())}, at most {int(counts.max())}.",
            "Do not change attention_mask or labels after the batch was collated.",
        )
    return sizes
