"""Documents of the restatement as batches of tensors, padded or packed.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from restatement import NO_LABEL, Token
from torch import Tensor

from regate_fx.runtime import ReferenceLosses, ReGate, SampleLosses
from regate_fx.runtime.rules import documents
from regate_fx.runtime.samples import label_hash

PAD = 0


def reference_of(docs: dict[int, list[Token]]) -> ReferenceLosses:
    """What the teacher would have stored for documents by sample id."""
    samples = []
    for sample_id, tokens in docs.items():
        labels = torch.tensor([[token.label for token in tokens]], dtype=torch.int64).view(1, -1)
        if not tokens:
            labels = torch.full((1, 1), NO_LABEL)
        docs_of = documents(torch.tensor([sample_id]), (1, labels.shape[1]))
        hashed = int(label_hash(docs_of, labels != NO_LABEL, labels))
        losses = [token.ref for token in tokens if token.label != NO_LABEL]
        samples.append(SampleLosses(sample_id, hashed, losses))
    return ReferenceLosses.of(samples)


def padded(docs: dict[int, list[Token]], side: Literal["left", "right"] = "right") -> dict[str, Any]:
    """One document a row."""
    S = max(1, *(len(tokens) for tokens in docs.values()))
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for tokens in docs.values():
        fill = S - len(tokens)
        for name, values, empty in (
            ("input_ids", [token.id for token in tokens], PAD),
            ("labels", [token.label for token in tokens], NO_LABEL),
            ("attention_mask", [1] * len(tokens), 0),
        ):
            rows[name].append([empty] * fill + values if side == "left" else values + [empty] * fill)
    batch: dict[str, Any] = {name: torch.tensor(values) for name, values in rows.items()}
    return batch | {"sample_id": torch.tensor(list(docs))}


def packed(docs: dict[int, list[Token]], per_row: int) -> dict[str, Any]:
    """Several documents a row, each position with the id of its document."""
    whole = list(docs.items())
    rows = [whole[begin : begin + per_row] for begin in range(0, len(whole), per_row)]
    S = max(1, *(sum(len(tokens) for _, tokens in row) for row in rows))
    batch = {
        "input_ids": torch.full((len(rows), S), PAD),
        "labels": torch.full((len(rows), S), NO_LABEL),
        "attention_mask": torch.zeros(len(rows), S, dtype=torch.int64),
        "sample_id": torch.full((len(rows), S), -1),
    }
    for b, row in enumerate(rows):
        s = 0
        for sample_id, tokens in row:
            for token in tokens:
                batch["input_ids"][b, s] = token.id
                batch["labels"][b, s] = token.label
                batch["attention_mask"][b, s] = 1
                batch["sample_id"][b, s] = sample_id
                s += 1
    return batch


def positions_by_sample(mask: Tensor, batch: dict[str, Any]) -> dict[int, set[int]]:
    """The active positions of each document, counted from its first token."""
    found: dict[int, set[int]] = {}
    for b in range(len(mask)):
        begun: dict[int, int] = {}
        for s in range(mask.shape[1]):
            if not batch["attention_mask"][b, s]:
                assert not mask[b, s], "padding is active"
                continue
            ids = batch["sample_id"]
            sample_id = int(ids[b] if ids.dim() == 1 else ids[b, s])
            position = begun.get(sample_id, 0)
            begun[sample_id] = position + 1
            if mask[b, s]:
                found.setdefault(sample_id, set()).add(position)
    return found


def set_difficulty(gate: ReGate, docs: dict[int, list[Token]]) -> None:
    """Give every label of the documents the running mean of the restatement."""
    ema = gate.difficulty.ema
    for sample_id, tokens in docs.items():
        row = int(gate.losses.find(torch.tensor([sample_id])))
        values = [token.ema for token in tokens if token.label != NO_LABEL]
        start = int(gate.losses.starts[row])
        for index, value in enumerate(values):
            ema[start + index] = torch.nan if value is None else value
