"""Find attention that is scaled, behind its values, by the share that a sink leaves to the keys.

Shapes: B samples, H heads, S positions, dv width of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regate_fx.passes.attention_operands import PRODUCTS, Unlike, is_last, must, rounds_nothing
from regate_fx.passes.base import fake, is_tensor, operator_name
from regate_fx.passes.emit import Emitter

aten = torch.ops.aten
_CASTS = {"aten._to_copy"}
_HANDS_ON = _CASTS | {"aten.dropout"}


@dataclass(frozen=True)
class SinkShare:
    """`scaled = product * sigmoid(logsumexp(scores) - sink)`, `product = softmax(scores) @ value`.

    scores: [B, H, S, S], sink: as `total`, the logsumexp, has it, with or without a last dimension of 1. between: what
    computes the factor, the last operator first.
    """

    scaled: fx.Node
    product: fx.Node
    scores: fx.Node
    sink: fx.Node
    total: fx.Node
    between: tuple[fx.Node, ...]

    def column(self, emit: Emitter) -> fx.Node:
        """The sink, as one more column of the scores."""
        return self.sink if _keeps_column(self.total) else emit.call(aten.unsqueeze.default, self.sink, -1)


def find_share(softmax: fx.Node) -> SinkShare | None:
    """What is scaled so behind a softmax, if its weights and their product serve nothing else."""
    try:
        product, scaled = _product(softmax)
        return _share(softmax, product, scaled)
    except Unlike:
        return None


def _product(softmax: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The product of weights and values, where nothing else reads the weights, and what alone reads the product."""
    must(is_last(softmax.args[1], softmax))
    before, node = softmax, softmax
    while node is softmax or operator_name(node) in _HANDS_ON:
        must(len(node.users) == 1 and fake(node).is_floating_point())
        before, (node,) = node, node.users
    must(operator_name(node) in PRODUCTS and node.args[0] is before and len(node.users) == 1)
    (scaled,) = node.users
    must(scaled.target is aten.mul.Tensor and scaled.args[0] is node)
    must(fake(scaled).shape == fake(node).shape and fake(scaled).dtype == fake(node).dtype)
    return node, scaled


def _share(softmax: fx.Node, product: fx.Node, scaled: fx.Node) -> SinkShare:
    between: list[fx.Node] = []
    factor = _back(scaled.args[1], _CASTS | {"aten.unsqueeze"}, aten.sigmoid.default, between)
    difference = _back(_wide(factor.args[0], between), set(), aten.sub.Tensor, between)
    total = _back(_wide(difference.args[0], between), set(), aten.logsumexp.default, between)
    scores, (summed, dims) = softmax.args[0], total.args[:2]
    must(not difference.kwargs and _wide(summed, between) is _wide(scores, []))
    must(len(dims) == 1 and is_last(dims[0], summed))
    added = [node for node in between if operator_name(node) == "aten.unsqueeze"]
    must(len(added) == (not _keeps_column(total)) and all(is_last(node.args[1], node) for node in added))
    sink = difference.args[1]
    must(is_tensor(sink) and fake(difference).shape == fake(total).shape and sink < softmax)
    return SinkShare(scaled, product, scores, sink, total, tuple(between))


def _back(node: Any, names: set[str], target: Any, passed: list[fx.Node]) -> Any:
    """The `target` behind operators of these names, all between floating numbers; all are noted."""
    while isinstance(node, fx.Node) and operator_name(node) in names:
        must(fake(node).is_floating_point())
        passed.append(node)
        node = node.args[0]
    must(isinstance(node, fx.Node) and node.target is target)
    passed.append(node)
    return node


def _keeps_column(total: fx.Node) -> bool:
    return total.args[2:] == (True,)


def _wide(node: Any, passed: list[fx.Node]) -> Any:
    """What a value was before casts that round nothing, which are noted."""
    while isinstance(node, fx.Node) and operator_name(node) in _CASTS and rounds_nothing(node):
        passed.append(node)
        node = node.args[0]
    return node
