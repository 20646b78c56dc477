"""Hashes by which tokens are recognised again: those of a sample's labels, and those that the teacher read for them.

Shapes: B rows, S positions, G documents (one a row, or several in a packed row).
"""

from __future__ import annotations

import torch
from torch import Tensor

from regate_fx.runtime.rules import Documents

NOT_KNOWN = 0
"""The hash of a text of which nothing is known, such as one given as embeddings."""


def label_hash(docs: Documents, label: Tensor, labels: Tensor) -> Tensor:
    """int64 [G]: a hash of the label tokens of each document, in their order, wherever padding lies.

    label: bool [B, S], which labels exist; labels: int64 [B, S].
    """
    return token_hash(docs, label, labels, docs.ranks(label))


def text_hash(docs: Documents, label: Tensor, real: Tensor, ids: Tensor | None) -> Tensor:
    """int64 [G]: a hash of the tokens of each document up to its last label; those after it decide no loss.

    So it is the same whether padding on the right is marked as such or not. `NOT_KNOWN` where there are no labels, or
    no ids of the labels' shape.

    label: bool [B, S], which labels exist; real: bool [B, S], False at padding; ids: int64 [B, S], input ids.
    """
    if ids is None or ids.shape != label.shape:
        return docs.totals(label) * NOT_KNOWN
    ranks = docs.ranks(label)
    read = real & (ranks < docs.spread(docs.totals(label)))
    return token_hash(docs, read, ids, docs.ranks(read))


def token_hash(docs: Documents, chosen: Tensor, tokens: Tensor, ranks: Tensor) -> Tensor:
    """int64 [G]: a hash of the chosen tokens of each document; ranks: int64 [B, S], as `Documents.ranks` of them."""
    mixed = tokens * -7046029254386353131 + ranks * 4768777513237032717
    # The finaliser of a 64-bit hash; products wrap around.
    mixed = (mixed ^ (mixed >> 31)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 29)) * -7723592293110705685
    mixed = mixed ^ (mixed >> 32)
    return docs.totals(mixed * chosen)


def row_hashes(labels: Tensor, ids: Tensor | None) -> Tensor:
    """int64 [B, 2]: hashes of the tokens of each row, padding included: of its labels, and of its input ids; [B, 1]
    without ids of the labels' shape. The same on every device, and none waits for it.
    """
    places = torch.arange(labels.shape[1], device=labels.device) * -7046029254386353131
    weights = (places ^ (places >> 31)) * -4658895280553007687 | 1
    both = [labels] if ids is None or ids.shape != labels.shape else [labels, ids]
    return torch.stack([(tokens * weights).sum(1) for tokens in both], 1)
