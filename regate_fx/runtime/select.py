"""Rank labels by a policy's scores and keep the best share of each sample (ReGATE, Eq. 3). Runs where its tensors are.

Shapes: S positions, G documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.runtime.policies import Policy, Signals, unknown_as_mean


def scores(policy: Policy, signals: Signals) -> Tensor:
    """float64 [G, S], finite: what a policy makes of the signals, as `keep_top` ranks it.

    A label whose score is NaN ranks with the mean of the others of its document, 0 if there is none. Raises
    `InvalidInput` where the policy returns no float [G, S] on the device of the signals.
    """
    score = policy.score(signals)
    expected = signals.ema
    fits = isinstance(score, Tensor) and score.is_floating_point() and score.shape == expected.shape
    if not fits or score.device != expected.device:
        found = f"{score.dtype} {list(score.shape)} on {score.device}" if isinstance(score, Tensor) else score
        raise InvalidInput(
            "policy",
            f"{type(policy).__name__}.score returned {found} for labels {list(expected.shape)} on "
            f"{expected.device}.",
            "Return one floating-point score for each label.",
        )
    known = score.double().masked_fill(signals.slot < 0, torch.nan)
    # Finite, because -inf is what labels that do not compete are ranked by.
    return unknown_as_mean(known).nan_to_num()


def try_out(policy: Policy, with_teacher: bool) -> None:
    """Raise `InvalidInput` for a policy that cannot work, before it is needed in mid-run.

    Refused are scores of another shape or dtype, scores that differ from call to call, and a look at the teacher's
    losses where there are none.
    """
    losses = torch.tensor([[0.0, 0.5, 2.0, 1.0], [0.0, 3.0, 0.0, 0.0]])
    slot = torch.tensor([[-1, 0, 1, 2], [-1, 3, -1, -1]])
    signals = Signals(
        ema=losses.masked_fill(torch.tensor([[True, False, False, True], [True] * 4]), torch.nan),
        teacher=losses if with_teacher else None,
        slot=slot,
        sample_id=torch.tensor([[0], [1]]),
        step=1,
    )
    if not torch.equal(scores(policy, signals)[slot >= 0], scores(policy, signals)[slot >= 0]):
        raise InvalidInput(
            "policy",
            f"{type(policy).__name__}.score gives other scores when it is called again: neither a resumed run nor "
            "another rank would choose alike.",
            "Let chance come from a hash of sample_id, label and step, as policy 'random' does.",
        )


def kept_counts(candidates: Tensor, ratio: float) -> Tensor:
    """int64 [G]: K = ceil(ratio * candidates) of each document; candidates: int64 [G]."""
    return (candidates.double() * ratio).ceil().long()


def places(score: Tensor, candidate: Tensor) -> Tensor:
    """int64 [G, S]: the place of each candidate among those of its document, the highest score first, equal ones from
    the earliest position on; whatever does not compete comes behind them.

    score: float64 [G, S], finite; candidate: bool [G, S].
    """
    order = score.masked_fill(~candidate, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ascending = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ascending)


def keep_top(score: Tensor, candidate: Tensor, counts: Tensor) -> Tensor:
    """bool [G, S]: the first `counts` (int64 [G]) candidates of each document by `places`."""
    return candidate & (places(score, candidate) < counts[:, None])
