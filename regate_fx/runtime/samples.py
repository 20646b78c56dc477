"""What selection has to know of a batch, worked out on the host, where the batch is collated.

Shapes: B rows, S positions, G documents (one a row, or several in a packed row).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.runtime.rules import NO_LABEL, Documents, Roles, TokenRules, assign_roles, documents
from regate_fx.runtime.store import ReferenceLosses
from regate_fx.runtime.token_hashes import NOT_KNOWN, label_hash, row_hashes, text_hash, token_hash

__all__ = ["Counts", "Samples", "describe", "label_hash", "labels_of"]

_ON_HOST = ("ids", "rows", "host_slot")


@dataclass(frozen=True)
class Samples:
    """The samples of one batch: which they are, what selection may do with their tokens, what the teacher said.

    It travels in the batch under `sample_id`. The tensors below move with it; `ids`, `rows`, `host_slot` and
    the counts stay on the host.

    always:     bool [B, S]     positions computed in every step
    real:       bool [B, S]     positions that are no padding
    candidate:  bool [B, S]     labels that compete for being kept
    observed:   bool [B, S]     labels whose loss updates their difficulty; of a sample that comes twice, the last
    slot:       int64 [B, S]    number of each label in the data set, -1 where there is none
    reference:  float32 [B, S]  the teacher's loss on each label, 0 where there is none
    group:      int64 [B, S]    the document of each position
    candidates: int64 [G]       candidates of each document
    tokens:     int64 [B, 2]    what `row_hashes` makes of each row: by it a row is recognised in the batch
    ids:        int64 [B, S]    sample id of each position
    rows:       int64 [G]       where each document's sample is in the store, -1 for a document of no sample
    host_slot:  int64 [B, S]    `slot`, for a table that is kept on the host
    """

    always: Tensor
    real: Tensor
    candidate: Tensor
    observed: Tensor
    slot: Tensor
    reference: Tensor
    group: Tensor
    candidates: Tensor
    tokens: Tensor
    ids: Tensor
    rows: Tensor
    host_slot: Tensor
    packed: bool
    counts: Counts

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        """The same samples with what selection reads on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def by_document(self, values: Tensor, fill: float | bool) -> Tensor:
        """[G, S] of values [B, S]: each document in a row of its own, at its own positions."""
        if not self.packed:
            return values
        table = values.new_full((len(self.candidates), values.shape[1]), fill)
        table[self.group, self._columns] = values
        return table

    def by_position(self, values: Tensor) -> Tensor:
        """[B, S] of values [G, S]: the inverse of `by_document`."""
        return values[self.group, self._columns] if self.packed else values

    def other_rows(self, batch: Mapping[str, Any]) -> Tensor:
        """bool [B]: the rows of a batch whose tokens are not those that were collated; does not wait for the device."""
        found = row_hashes(batch["labels"], batch.get("input_ids"))
        both = min(found.shape[1], self.tokens.shape[1])
        return (found[:, :both] != self.tokens[:, :both]).any(1)

    def without(self, rows: Tensor) -> Self:
        """The same samples, of which those in some rows (bool [B]) are not observed."""
        return replace(self, observed=self.observed & ~rows[:, None])

    @property
    def _columns(self) -> Tensor:
        return torch.arange(self.group.shape[1], device=self.group.device).expand_as(self.group)

    def pin_memory(self, device: Any = None) -> Self:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        moved = {
            field.name: function(getattr(self, field.name))
            for field in fields(self)
            if field.name not in _ON_HOST and isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Counts:
    """What the host knows of the numbers of active positions and of counted labels.

    real, always: for each row, its positions that are no padding, and those computed in every step
    candidates:   for each document its row and its candidates
    exact:        each kept candidate makes one more position active
    labels:       labels that count in a dense step
    free:         labels that count in every step; None where only the mask can tell which others do
    """

    real: tuple[int, ...]
    always: tuple[int, ...]
    candidates: tuple[tuple[int, int], ...]
    exact: bool
    labels: int
    free: int | None

    def active(self, ratio: float) -> tuple[int, int] | None:
        """Active positions of the batch, and the most of one row; None where only the mask can tell."""
        rows = self.rows(ratio)
        return None if rows is None else (sum(rows), max(rows))

    def rows(self, ratio: float) -> tuple[int, ...] | None:
        """Active positions of each row; None where only the mask can tell."""
        if ratio == 1.0:
            return self.real
        if not self.exact:
            return None
        rows = list(self.always)
        for row, candidates in self.candidates:
            rows[row] += math.ceil(ratio * candidates)
        return tuple(rows)

    def counted(self, ratio: float) -> int | None:
        """Labels of the batch that count; None where only the mask can tell."""
        if ratio == 1.0:
            return self.labels
        if self.free is None:
            return None
        return self.free + sum(math.ceil(ratio * candidates) for _, candidates in self.candidates)


def describe(batch: Mapping[str, Any], rules: TokenRules, losses: ReferenceLosses) -> Samples:
    """Work out the `Samples` of a batch that holds `sample_id`, `labels` and what the model takes.

    sample_id: int64 [B], or [B, S] where rows are packed (-1 at positions of no sample).
    Waits for the device where the batch is not on the host. Raises `InvalidInput` that names the argument, and the
    sample whose label tokens, or whose tokens before them, differ from those the teacher saw.
    """
    labels = labels_of(batch).cpu()
    sample_id = _sample_id(batch, labels)
    docs = documents(sample_id, (labels.shape[0], labels.shape[1]))
    mask = batch.get("attention_mask")
    real = torch.ones_like(labels, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        real = mask.cpu() != 0
    given = batch.get("input_ids")
    ids = given.cpu() if isinstance(given, Tensor) else None
    roles = assign_roles(rules, docs, labels, ids, real)
    slot, reference, rows = _look_up(docs, roles, labels, losses, text_hash(docs, roles.label, real, ids))
    candidates = docs.totals(roles.candidate)
    return Samples(
        always=roles.always,
        real=real,
        candidate=roles.candidate,
        observed=roles.predicted & docs.spread(_last_of_each(docs)),
        slot=slot,
        reference=reference,
        group=docs.group,
        candidates=candidates,
        tokens=row_hashes(labels, ids),
        ids=docs.ids,
        rows=rows,
        host_slot=slot,
        packed=docs.packed,
        counts=_count(rules, docs, roles, labels, real, candidates),
    )


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The labels of a batch. Raises `InvalidInput` unless they are int64 [B, S]."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.dtype != torch.int64:
        raise InvalidInput(
            "labels",
            "selection needs them as int64 [B, S].",
            "Put labels into every batch that is trained on.",
        )
    return labels


def _sample_id(batch: Mapping[str, Any], labels: Tensor) -> Tensor:
    given = batch.get("sample_id")
    if given is None:
        raise InvalidInput(
            "sample_id",
            "is missing from the batch.",
            "Keep the column in the data set, or switch gating off.",
        )
    if not isinstance(given, Tensor):
        given = torch.as_tensor(given)
    if given.dtype.is_floating_point or given.shape not in (labels.shape[:1], labels.shape):
        raise InvalidInput(
            "sample_id",
            f"is {given.dtype} {list(given.shape)}, the labels are {list(labels.shape)}.",
            "Give one integer for each row, or for each position where rows are packed.",
        )
    return given.to("cpu", torch.int64)


def _look_up(
    docs: Documents, roles: Roles, labels: Tensor, losses: ReferenceLosses, texts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """slot and reference of every label, and the row of each document; checks that labels are those the teacher saw.

    texts: int64 [G], of each document what `text_hash` makes of it, which is checked likewise.
    """
    ids, ranks = docs.each(docs.ids), docs.ranks(roles.label)
    found = docs.totals(roles.label)
    rows = _rows(losses, ids, found, docs.packed)
    starts = losses.starts[rows]
    known = losses.starts[rows + 1] - starts
    differs = (found != known) | (token_hash(docs, roles.label, labels, ranks) != losses.hashes[rows])
    if docs.packed:
        differs &= ids >= 0
    if bool(differs.any()):
        first = int(differs.nonzero()[0])
        raise InvalidInput(
            "sample_id",
            f"the labels of sample {int(ids[first])} are not those the teacher saw ({int(found[first])} labels "
            f"in the batch, {int(known[first])} with the teacher; {int(differs.sum())} such samples).",
            "Tokenize and truncate as in the teacher pass, or run the pass again.",
        )
    if texts is not None:
        _check_texts(ids, texts, losses.texts[rows])
    slot = torch.where(roles.label, docs.spread(starts) + ranks, -1)
    reference = torch.zeros(slot.shape)
    reference[roles.label] = losses.at(docs.spread(rows).expand_as(slot)[roles.label], slot[roles.label])
    return slot, reference, torch.where(ids >= 0, rows, -1) if docs.packed else rows


def _check_texts(ids: Tensor, texts: Tensor, read: Tensor) -> None:
    """ids, texts, read: int64 [G], of each document its sample, its hash now and that of the teacher pass."""
    differs = (texts != read) & (texts != NOT_KNOWN) & (read != NOT_KNOWN)
    if bool(differs.any()):
        first = int(differs.nonzero()[0])
        raise InvalidInput(
            "input_ids",
            f"those of sample {int(ids[first])} are not the ones that the teacher read, though its labels are: its "
            f"prompt has changed ({int(differs.sum())} such samples).",
            "Build prompts as in the teacher pass, or run the pass again in another folder.",
        )


def _rows(losses: ReferenceLosses, ids: Tensor, found: Tensor, packed: bool) -> Tensor:
    """int64 [G]: where each document's sample is in the store; 0 for a stretch of a packed row without sample."""
    if not packed:
        return losses.find(ids)
    somebody = (ids >= 0) | (found > 0)
    rows = torch.zeros_like(ids)
    rows[somebody] = losses.find(ids[somebody])
    return rows


def _last_of_each(docs: Documents) -> Tensor:
    """bool [G]: no later document of the batch has the same sample."""
    ids = docs.each(docs.ids)
    return ~(ids[:, None] == ids[None, :]).triu(diagonal=1).any(1)


def _count(
    rules: TokenRules, docs: Documents, roles: Roles, labels: Tensor, real: Tensor, candidates: Tensor
) -> Counts:
    rows = docs.each(torch.arange(len(real))[:, None].expand_as(real))
    # The model's loss knows nothing of documents and padding: it counts a label wherever its predictor is computed.
    label = labels != NO_LABEL
    free = int((label & rules.predicted(roles.always)).sum()) if rules.align == "predictor" else None
    return Counts(
        real=tuple(real.sum(1).tolist()),
        always=tuple(roles.always.sum(1).tolist()),
        candidates=tuple(zip(rows.tolist(), candidates.tolist(), strict=True)),
        exact=rules.align != "both",
        labels=int((label & rules.predicted(real)).sum()),
        free=free,
    )
