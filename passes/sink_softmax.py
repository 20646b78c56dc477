"""A softmax over keys and a sink, which has no value: `exp(scores) / (sum(exp(scores)) + exp(sink))`, written and read.

Shapes: B samples, H heads, S positions.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regate_fx.passes.base import fake, is_tensor, operator_name
from regate_fx.passes.emit import Emitter

aten = torch.ops.aten
MAXIMA = {"aten.max", "aten.amax"}


def write_sink_softmax(emit: Emitter, scores: fx.Node, sink: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The weights [B, H, S, S] of scores [B, H, S, S] beside a sink [1 or B, H, 1 or S, 1], in `dtype`."""
    # As a softmax of half precision is, inside.
    wide = torch.promote_types(dtype, torch.float32)
    scores, sink = (_cast(emit, _cast(emit, value, dtype), wide) for value in (scores, sink))
    largest = emit.call(aten.maximum.default, emit.call(aten.amax.default, scores, [-1], True), sink)
    # It cancels out, unless a sink of infinity takes everything.
    largest = emit.call(aten.clamp.default, largest, None, torch.finfo(wide).max)
    largest = emit.call(aten.detach.default, largest)
    shifted, of_sink = (emit.call(aten.sub.Tensor, value, largest) for value in (scores, sink))
    # Never above 0, except where a later pass leaves keys out of the sum: what is computed there must stay finite.
    powers = emit.call(aten.exp.default, emit.call(aten.clamp.default, shifted, None, 0))
    total = emit.call(aten.sum.dim_IntList, powers, [-1], True)
    total = emit.call(aten.add.Tensor, total, emit.call(aten.exp.default, of_sink))
    return _cast(emit, emit.call(aten.div.Tensor, powers, total), dtype)


@dataclass(frozen=True)
class SinkSoftmax:
    """`exp(scores) / (sum(exp(scores)) + exp(sink))`. inside: its operators but the last, that divides."""

    scores: fx.Node
    sink: fx.Node
    inside: tuple[fx.Node, ...]


def read_sink_softmax(weights: fx.Node) -> SinkSoftmax | None:
    """What is written above, or by a model that does the same with or without a clamp and a detach."""
    if weights.target is not aten.div.Tensor or weights.kwargs or not all(map(is_tensor, weights.args)):
        return None
    powers, total = weights.args
    clamped = _of(powers, aten.exp.default)
    shifted = clamped if clamped is None or clamped.target is not aten.clamp.default else _clamped(clamped, 0)
    parts = total.args if isinstance(total, fx.Node) and total.target is aten.add.Tensor else ()
    summed, of_sink = (*parts, None, None)[:2]
    shifted_sink = _of(of_sink, aten.exp.default)
    if not _is_sum_of(summed, powers) or total.kwargs:
        return None
    scores, largest = _difference(shifted)
    sink, same = _difference(shifted_sink)
    if scores is None or sink is None or largest is not same:
        return None
    maximum = largest.args[0] if operator_name(largest) == "aten.detach" else largest
    finite = maximum
    if operator_name(finite) == "aten.clamp":
        maximum = _clamped(finite, torch.finfo(fake(finite).dtype).max)
    if not isinstance(maximum, fx.Node) or maximum.target is not aten.maximum.default:
        return None
    of_scores, of_sinks = maximum.args
    if of_sinks is not sink or not is_maximum(of_scores, scores, len(fake(scores).shape) - 1):
        return None
    found = (
        powers, clamped, shifted, total, summed, of_sink, shifted_sink, largest, finite, maximum, of_scores,
    )  # fmt: skip
    inside = tuple(dict.fromkeys(node for node in found if isinstance(node, fx.Node)))
    return SinkSoftmax(scores, sink, inside)


def _of(node: Any, target: Any) -> fx.Node | None:
    is_one = isinstance(node, fx.Node) and node.target is target and len(node.args) == 1 and not node.kwargs
    return node.args[0] if is_one else None


def _clamped(node: fx.Node, most: float) -> fx.Node | None:
    return node.args[0] if node.args[1:] == (None, most) and not node.kwargs else None


def _difference(node: Any) -> tuple[Any, Any]:
    is_one = isinstance(node, fx.Node) and node.target is aten.sub.Tensor and not node.kwargs
    return node.args if is_one and all(map(is_tensor, node.args)) else (None, None)


def _is_sum_of(node: Any, powers: Any) -> bool:
    """Whether a value is the sum of `powers` along their last dimension, which is kept."""
    if not isinstance(node, fx.Node) or node.target is not aten.sum.dim_IntList or node.kwargs:
        return False
    rank = len(fake(powers).shape)
    return (
        node.args[0] is powers
        and [dim % rank for dim in node.args[1]] == [rank - 1]
        and node.args[2:] == (True,)
    )


def is_maximum(node: Any, values: Any, dim: Any) -> bool:
    """Whether a value is the largest of `values` along one dimension, which is kept."""
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, fx.Node) or operator_name(node) not in MAXIMA or len(node.args) < 3:
        return False
    source, dims, keeps = node.args[:3]
    rank = len(fake(values).shape)
    named = dims if isinstance(dims, (list, tuple)) else [dims]
    return source is values and bool(keeps) and [place % rank for place in named] == [dim % rank]


def _cast(emit: Emitter, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    return value if fake(value).dtype == dtype else emit.call(aten._to_copy.default, value, dtype=dtype)
