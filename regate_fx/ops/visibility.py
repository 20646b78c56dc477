"""Which keys a query sees: the arguments of the attention operator that decide it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Visibility(NamedTuple):
    """As `regate_fx::varlen_attention` takes them."""

    positions: Tensor
    mask: Tensor | None
    causal: bool
    window: int
