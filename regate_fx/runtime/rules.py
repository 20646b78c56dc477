"""Which positions of a batch are always computed, and which labels compete for the rest.

Shapes: B rows, S positions, G documents (one a row, or several in a packed row).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regate_fx.errors import InvalidInput

NO_LABEL = -100

Alignment = Literal["predictor", "token", "both"]


@dataclass(frozen=True)
class TokenRules:
    """How labels and positions belong together.

    special_ids: labels that are always counted, such as the end of a sequence
    visual_ids:  input ids that stand for images or video; their positions are always computed
    align:       the position that a selected label t keeps active: the one that computes its prediction
                 ("predictor", with which alone every selected label is counted), t itself ("token", the literal
                 reading of the paper), or "both"
    shifted:     label t is predicted at position t - 1, as in nearly every causal model; False: at t
    """

    special_ids: tuple[int, ...] = ()
    visual_ids: tuple[int, ...] = ()
    align: Alignment = "predictor"
    shifted: bool = True

    def __post_init__(self) -> None:
        if self.align not in ("predictor", "token", "both"):
            raise InvalidInput("align", f"is {self.align!r}.", "Use 'predictor', 'token' or 'both'.")

    def positions(self, labels: Tensor) -> Tensor:
        """The positions that keep a set of labels: bool [B, S] by label to bool [B, S] by position."""
        predictors = F.pad(labels[:, 1:], (0, 1), value=False) if self.shifted else labels
        if self.align == "token":
            return labels
        return labels | predictors if self.align == "both" else predictors

    def predicted(self, positions: Tensor) -> Tensor:
        """The labels that a set of positions predicts: bool [B, S] by position to bool [B, S] by label."""
        return _before(positions, False) if self.shifted else positions


@dataclass(frozen=True)
class Documents:
    """Which document each position belongs to.

    ids:    int64 [B, S]  sample id, -1 at positions of no sample
    group:  int64 [B, S]  number of the document in the batch, ascending along the flat positions
    count:  G
    packed: rows may hold more than one
    """

    ids: Tensor
    group: Tensor
    count: int
    packed: bool

    def totals(self, values: Tensor) -> Tensor:
        """int64 [G]: the sum of integers [B, S] over each document."""
        if not self.packed:
            return values.sum(1)
        totals = torch.zeros(self.count, dtype=torch.int64, device=values.device)
        return totals.index_add_(0, self.group.flatten(), values.flatten().long())

    def each(self, values: Tensor) -> Tensor:
        """int64 [G]: the value of each document, of integers [B, S] that are the same throughout one."""
        if not self.packed:
            return values[:, 0]
        found = torch.empty(self.count, dtype=torch.int64, device=values.device)
        found[self.group.flatten()] = values.flatten()
        return found

    def spread(self, values: Tensor) -> Tensor:
        """[B, S], or [B, 1] where the rows are the documents: for each position the value [G] of its document."""
        return values[self.group] if self.packed else values[:, None]

    def until(self, chosen: Tensor) -> Tensor:
        """int64 [B, S]: how many chosen positions (bool [B, S]) of the same document come before each or are it."""
        if not self.packed:
            return chosen.cumsum(1)
        totals = self.totals(chosen)
        return chosen.flatten().cumsum(0).view_as(self.group) - (totals.cumsum(0) - totals)[self.group]

    def ranks(self, chosen: Tensor) -> Tensor:
        """int64 [B, S]: how many chosen positions (bool [B, S]) of the same document come before each."""
        return self.until(chosen) - chosen.long()


def documents(sample_id: Tensor, shape: tuple[int, int]) -> Documents:
    """Documents of a batch [B, S]; sample_id: int64 [B], or [B, S] where rows are packed (-1: no sample)."""
    B, S = shape
    if sample_id.dim() == 1:
        rows = torch.arange(B, device=sample_id.device)
        return Documents(sample_id[:, None].expand(B, S), rows[:, None].expand(B, S), B, packed=False)
    begins = torch.ones_like(sample_id, dtype=torch.bool)
    begins[:, 1:] = sample_id[:, 1:] != sample_id[:, :-1]
    group = begins.flatten().long().cumsum(0) - 1
    return Documents(sample_id, group.view(B, S), int(group[-1]) + 1, packed=True)


@dataclass(frozen=True)
class Roles:
    """What each position and label of a batch is. All bool [B, S], False at padding.

    label:     by label: belongs to the output of its sample
    predicted: by label: a position of its own document predicts it
    always:    by position: computed in every step
    candidate: by label: competes for being kept
    """

    label: Tensor
    predicted: Tensor
    always: Tensor
    candidate: Tensor


def assign_roles(
    rules: TokenRules, docs: Documents, labels: Tensor, ids: Tensor | None, real: Tensor
) -> Roles:
    """Sort out the tokens of one batch.

    labels: int64 [B, S], -100 where there is none; ids: int64 [B, S], or None where the batch holds embeddings;
    real: bool [B, S], False at padding.
    """
    label = real & (labels != NO_LABEL)
    predicted = label & _has_predictor(rules, docs, real)
    special = predicted & torch.isin(labels, _ids(rules.special_ids, labels))
    always = (real & ~label) | (rules.positions(special) & real)
    if ids is not None:
        always = always | (real & torch.isin(ids, _ids(rules.visual_ids, labels)))
    if rules.align == "predictor" and rules.shifted:
        always = always | _ends_of_earlier_turns(docs, label, predicted)
    candidate = predicted & ~special & ~_kept_anyway(rules, always)
    return Roles(label, predicted, always, candidate)


def _ids(ids: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=like.dtype, device=like.device)


def _before(values: Tensor, fill: int | bool) -> Tensor:
    """The value at the position before each."""
    return F.pad(values[:, :-1], (1, 0), value=fill)


def _has_predictor(rules: TokenRules, docs: Documents, real: Tensor) -> Tensor:
    """By label: its predictor is a token of the same document."""
    if not rules.shifted:
        return real
    before = _before(real, False)
    return before & (_before(docs.group, -1) == docs.group) if docs.packed else before


def _ends_of_earlier_turns(docs: Documents, label: Tensor, predicted: Tensor) -> Tensor:
    """Output positions that predict nothing, but that a later turn of the same document attends to."""
    predicts = F.pad(predicted[:, 1:], (0, 1), value=False)
    # More labels are predicted in the document than at this position or before: the rest comes later.
    return label & ~predicts & (docs.spread(docs.totals(predicted)) > docs.until(predicted))


def _kept_anyway(rules: TokenRules, always: Tensor) -> Tensor:
    """By label: every position that it would keep active is active in any case."""
    predictor = rules.predicted(always)
    if rules.align == "token":
        return always
    return predictor & always if rules.align == "both" else predictor
