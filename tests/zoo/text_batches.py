"""Random batches of text, with the usual masks or one of the user's.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from shrink import PAD, WORDS
from small_models import Batch, Side
from torch import Tensor

NO_LABEL = -100


@dataclass(frozen=True)
class UserMaskBatch(Batch):
    """A batch whose user says which keys each query sees. mask: float [B, 1, S, S], 0 where one is seen, else lowest.

    shown: whether the model is given it; if not, it knows as much by `position_ids`.
    """

    mask: Tensor = field(default_factory=lambda: torch.empty(0))
    shown: bool = True

    def model_inputs(self) -> dict[str, Tensor]:
        return {**super().model_inputs(), **({"attention_mask": self.mask} if self.shown else {})}

    def hidden(self) -> UserMaskBatch:
        """The same with elided keys hidden."""
        lowest = torch.finfo(self.mask.dtype).min
        return replace(self, mask=self.mask.where(self.active[:, None, None, :], lowest), shown=True)

    def double(self) -> UserMaskBatch:
        return replace(self, mask=self.mask.double())


def text_batch(generator: torch.Generator, B: int, S: int, padding: Side, share: float = 0.6) -> Batch:
    """Random words, lengths, mask and labels; most labels are there."""
    index = torch.arange(S).expand(B, S)
    lengths = torch.randint(S // 2 + 1, S + 1, (B, 1), generator=generator)
    lengths[0] = S
    real = torch.ones(B, S, dtype=torch.bool)
    if padding is not None:
        real = index < lengths if padding == "right" else index >= S - lengths
    ids = torch.randint(WORDS.start, WORDS.stop, (B, S), generator=generator)
    without = torch.rand(B, S, generator=generator) < 0.2
    mask = torch.rand(B, S, generator=generator) < share
    mask[0, S // 2] = True
    return Batch(
        input_ids=ids.masked_fill(~real, PAD),
        attention_mask=None if padding is None else real.long(),
        labels=ids.masked_fill(without | ~real, NO_LABEL),
        token_mask=mask,
    )
