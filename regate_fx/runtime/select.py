"""Score labels and keep the best share of each sample (ReGATE, Eq. 3). Runs where its tensors are.

Shapes: B rows, S positions, G documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.runtime.schedule import check_share

Combination = Literal["additive", "convex"]


@dataclass(frozen=True)
class Scoring:
    """How the two signals become one number.

    combine: "additive": `ema + weight * reference`, Eq. 3; "convex": `(1 - weight) * ema + weight * reference`, with
             which 1 means reference only and 0 difficulty only, as in the paper's ablation
    weight:  lambda, at least 0, and at most 1 where convex
    """

    combine: Combination = "additive"
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.combine not in ("additive", "convex"):
            raise InvalidInput("combine", f"is {self.combine!r}.", "Use 'additive' or 'convex'.")
        if self.combine == "convex":
            check_share("weight", self.weight)
        elif not 0.0 <= self.weight < float("inf"):
            raise InvalidInput("weight", f"is {self.weight}.", "Give a finite number of at least 0.")

    def score(self, ema: Tensor, reference: Tensor) -> Tensor:
        """float64 [G, S]; ema: float [G, S], NaN at labels not seen yet; reference: float [G, S].

        A label not seen yet ranks with the mean of the seen ones of its document, 0 if there is none.
        """
        ema = ema.double()
        mean = ema.nanmean(1, keepdim=True).nan_to_num(nan=0.0)
        ema = torch.where(ema.isnan(), mean, ema)
        own = 1.0 - self.weight if self.combine == "convex" else 1.0
        return own * ema + self.weight * reference.double()


def kept_counts(candidates: Tensor, ratio: float) -> Tensor:
    """int64 [G]: K = ceil(ratio * candidates) of each document; candidates: int64 [G]."""
    return (candidates.double() * ratio).ceil().long()


def keep_top(score: Tensor, candidate: Tensor, counts: Tensor) -> Tensor:
    """bool [G, S]: the candidates with the highest scores, equal ones from the earliest position on.

    score: float64 [G, S]; candidate: bool [G, S]; counts: int64 [G], how many to keep of each row.
    """
    order = score.masked_fill(~candidate, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return candidate & (rank < counts[:, None])
