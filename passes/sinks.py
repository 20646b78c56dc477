"""Turn a softmax over keys and one more column, a learned sink, into one over the keys alone.

A sink takes its share of every query's attention and has no value: models join it to the scores as one more column and
cut it off behind the softmax, or scale what attention gives by the share that is left. No analysis of axes follows an
axis of keys that is one too long; the same weights are `exp(scores) / (sum(exp(scores)) + exp(sink))`.

Shapes: B samples, H heads, S positions.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from regate_fx.passes.attention_operands import is_last
from regate_fx.passes.base import PassContext, PassResult, fake, fake_mode_of, is_tensor, operator_name
from regate_fx.passes.emit import Emitter
from regate_fx.passes.sink_shares import find_share
from regate_fx.passes.sink_softmax import MAXIMA, is_maximum, write_sink_softmax

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldSinks:
    """`softmax(cat([scores, sink], -1), -1)[..., :-1]` becomes an expression of `scores` and `sink`.

    scores: [B, H, S, S], sink: [B, H, S, 1]; whatever else looks like it is left alone. Before that, what is subtracted
    from a softmax's operand only to keep it small is left out: the softmax does so itself. With the same weights,
    `(softmax(scores) @ value) * sigmoid(logsumexp(scores) - sink)` becomes `weights @ value`.
    """

    name: str = "fold_sinks"
    after: tuple[str, ...] = ("open_brackets",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        rewrites = 0
        for node in list(gm.graph.nodes):
            if operator_name(node) in ("aten.softmax", "aten._softmax"):
                rewrites += _drop_shift(gm, node) + (_fold(gm, node) or _fold_share(gm, node))
        return PassResult(gm, rewrites)


def _drop_shift(gm: fx.GraphModule, softmax: fx.Node) -> int:
    """`softmax(x - max(x))` is `softmax(x)`, gradients included."""
    shifted = softmax.args[0]
    if not isinstance(shifted, fx.Node) or shifted.target is not aten.sub.Tensor or len(shifted.args) != 2:
        return 0
    values, largest = shifted.args
    if shifted.kwargs or not is_tensor(values) or not is_maximum(largest, values, softmax.args[1]):
        return 0
    assert isinstance(values, fx.Node)
    softmax.replace_input_with(shifted, values)
    _erase(gm, shifted)
    return 1


def _fold(gm: fx.GraphModule, softmax: fx.Node) -> int:
    found = _joined(softmax)
    cuts = [user for user in softmax.users if _cuts_last(user, softmax)]
    if found is None or len(cuts) != len(softmax.users):
        return 0
    joined, scores, sink = found
    emit = Emitter(gm.graph, fake_mode_of(gm))
    with emit.like(softmax), gm.graph.inserting_before(softmax):
        weights = write_sink_softmax(emit, scores, sink, fake(softmax).dtype)
    for cut in cuts:
        cut.replace_all_uses_with(weights)
        gm.graph.erase_node(cut)
    gm.graph.erase_node(softmax)
    _erase(gm, joined)
    return 1


def _fold_share(gm: fx.GraphModule, softmax: fx.Node) -> int:
    found = find_share(softmax)
    if found is None:
        return 0
    emit = Emitter(gm.graph, fake_mode_of(gm))
    with emit.like(softmax), gm.graph.inserting_before(softmax):
        weights = write_sink_softmax(emit, found.scores, found.column(emit), fake(softmax).dtype)
    softmax.replace_all_uses_with(weights)
    found.scaled.replace_all_uses_with(found.product)
    for node in (found.scaled, *found.between, softmax):
        if not node.users:
            gm.graph.erase_node(node)
    return 1


def _joined(softmax: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The operand of a softmax over its last dimension, if it is scores [..., S, S] and one more column."""
    joined = softmax.args[0]
    if not isinstance(joined, fx.Node) or joined.target is not aten.cat.default:
        return None
    dim = joined.args[1] if len(joined.args) > 1 else 0
    parts = joined.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not is_last(dim, joined):
        return None
    scores, sink = parts
    if not is_last(softmax.args[1], joined) or len(joined.users) != 1 or fake(sink).shape[-1] != 1:
        return None
    return joined, scores, sink


def _cuts_last(node: fx.Node, of: fx.Node) -> bool:
    """Whether a node is `of[..., :-1]`."""
    if node.target is not aten.slice.Tensor or node.kwargs or len(node.args) != 4 or node.args[0] is not of:
        return False
    dim, start, end = node.args[1:]
    return is_last(dim, of) and start in (0, None) and end == -1


def _erase(gm: fx.GraphModule, node: fx.Node) -> None:
    """A node that nothing reads any more, and what was computed for it alone."""
    if node.users or node.op != "call_function":
        return
    sources = node.all_input_nodes
    gm.graph.erase_node(node)
    for source in sources:
        if source.target is operator.getitem or operator_name(source) in MAXIMA:
            _erase(gm, source)
