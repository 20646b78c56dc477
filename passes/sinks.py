"""Turn a softmax over keys and one more column, a learned sink, into one over the keys alone.

A sink takes its share of every query's attention and has no value: models join it to the scores as one more column and
cut it off behind the softmax. No analysis of axes follows an axis of keys that is one too long; the same weights are
`exp(scores) / (sum(exp(scores)) + exp(sink))`.

Shapes: B samples, H heads, S positions.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regate_fx.passes.base import PassContext, PassResult, fake, fake_mode_of, is_tensor, operator_name
from regate_fx.passes.emit import Emitter

aten = torch.ops.aten
_MAXIMA = {"aten.max", "aten.amax"}


@dataclass(frozen=True)
class FoldSinks:
    """`softmax(cat([scores, sink], -1), -1)[..., :-1]` becomes an expression of `scores` and `sink`.

    scores: [B, H, S, S], sink: [B, H, S, 1]; whatever else looks like it is left alone. Before that, what is subtracted
    from a softmax's operand only to keep it small is left out: the softmax does so itself.
    """

    name: str = "fold_sinks"
    after: tuple[str, ...] = ("open_brackets",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        rewrites = 0
        for node in list(gm.graph.nodes):
            if operator_name(node) in ("aten.softmax", "aten._softmax"):
                rewrites += _drop_shift(gm, node) + _fold(gm, node)
        return PassResult(gm, rewrites)


def _drop_shift(gm: fx.GraphModule, softmax: fx.Node) -> int:
    """`softmax(x - max(x))` is `softmax(x)`, gradients included."""
    shifted = softmax.args[0]
    if not isinstance(shifted, fx.Node) or shifted.target is not aten.sub.Tensor or len(shifted.args) != 2:
        return 0
    values, largest = shifted.args
    if shifted.kwargs or not is_tensor(values) or not _is_maximum(largest, values, softmax.args[1]):
        return 0
    assert isinstance(values, fx.Node)
    softmax.replace_input_with(shifted, values)
    _erase(gm, shifted)
    return 1


def _is_maximum(node: Any, values: Any, dim: Any) -> bool:
    """Whether a value is the largest of `values` along one dimension, which is kept."""
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
    if not isinstance(node, fx.Node) or operator_name(node) not in _MAXIMA or len(node.args) < 3:
        return False
    source, dims, keeps = node.args[:3]
    rank = len(fake(values).shape)
    named = dims if isinstance(dims, (list, tuple)) else [dims]
    return source is values and bool(keeps) and [place % rank for place in named] == [dim % rank]


def _fold(gm: fx.GraphModule, softmax: fx.Node) -> int:
    found = _joined(softmax)
    cuts = [user for user in softmax.users if _cuts_last(user, softmax)]
    if found is None or len(cuts) != len(softmax.users):
        return 0
    joined, scores, sink = found
    emit = Emitter(gm.graph, fake_mode_of(gm))
    dtype = fake(softmax).dtype
    # As a softmax of half precision is, inside.
    wide = torch.promote_types(dtype, torch.float32)
    with emit.like(softmax), gm.graph.inserting_before(softmax):
        scores, sink = (_cast(emit, _cast(emit, value, dtype), wide) for value in (scores, sink))
        largest = emit.call(aten.maximum.default, emit.call(aten.amax.default, scores, [-1], True), sink)
        largest = emit.call(aten.detach.default, largest)  # it cancels out
        shifted, of_sink = (emit.call(aten.sub.Tensor, value, largest) for value in (scores, sink))
        # Never above 0, except where a later pass leaves keys out of the sum: what is computed there must stay finite.
        powers = emit.call(aten.exp.default, emit.call(aten.clamp.default, shifted, None, 0))
        total = emit.call(aten.sum.dim_IntList, powers, [-1], True)
        total = emit.call(aten.add.Tensor, total, emit.call(aten.exp.default, of_sink))
        weights = _cast(emit, emit.call(aten.div.Tensor, powers, total), dtype)
    for cut in cuts:
        cut.replace_all_uses_with(weights)
        gm.graph.erase_node(cut)
    gm.graph.erase_node(softmax)
    _erase(gm, joined)
    return 1


def _joined(softmax: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The operand of a softmax over its last dimension, if it is scores [..., S, S] and one more column."""
    joined = softmax.args[0]
    if not isinstance(joined, fx.Node) or joined.target is not aten.cat.default:
        return None
    rank = len(fake(joined).shape)
    dim = joined.args[1] if len(joined.args) > 1 else 0
    parts = joined.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim % rank != rank - 1:
        return None
    scores, sink = parts
    is_last = isinstance(softmax.args[1], int) and softmax.args[1] % rank == rank - 1
    if not is_last or len(joined.users) != 1 or fake(sink).shape[-1] != 1:
        return None
    return joined, scores, sink


def _cuts_last(node: fx.Node, of: fx.Node) -> bool:
    """Whether a node is `of[..., :-1]`."""
    if node.target is not aten.slice.Tensor or node.kwargs or len(node.args) != 4 or node.args[0] is not of:
        return False
    dim, start, end = node.args[1:]
    rank = len(fake(of).shape)
    return isinstance(dim, int) and dim % rank == rank - 1 and start in (0, None) and end == -1


def _cast(emit: Emitter, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    return value if fake(value).dtype == dtype else emit.call(aten._to_copy.default, value, dtype=dtype)


def _erase(gm: fx.GraphModule, node: fx.Node) -> None:
    """A node that nothing reads any more, and what was computed for it alone."""
    if node.users or node.op != "call_function":
        return
    sources = node.all_input_nodes
    gm.graph.erase_node(node)
    for source in sources:
        if source.target is operator.getitem or operator_name(source) in _MAXIMA:
            _erase(gm, source)
