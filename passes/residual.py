"""Whether layers only add to the residual stream, so that a token which they skip leaves them as it came."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from regate_fx.passes.base import operator_name

# What a value can go through and still be the stream, scaled or in other shape, rather than what a layer makes of it.
_CARRIES = {
    "aten.add", "aten.sub", "aten.mul", "aten.div", "aten.neg", "aten._to_copy", "aten.clone", "aten.alias",
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.dropout", "aten.sum", "aten.stack", "aten.cat",
}  # fmt: skip


def adds_up(base: fx.Node, last: fx.Node) -> bool:
    """Whether `last` is `base` plus what is computed from it, each addition once and nothing else on the way."""
    computed, carried = {base}, {base}
    for node in _up_to(base, last):
        if computed.intersection(node.all_input_nodes):
            computed.add(node)
        if operator_name(node) in _CARRIES and carried.intersection(node.all_input_nodes):
            carried.add(node)
    node = last
    while node is not base:
        if operator_name(node) != "aten.add" or node.kwargs or len(node.all_input_nodes) != 2:
            return False
        stream = [source for source in node.all_input_nodes if source in carried]
        if len(stream) != 1 or not computed.issuperset(node.all_input_nodes):
            return False
        (node,) = stream
    return True


def _up_to(base: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes behind `base`, to `last`."""
    node = base
    while node is not last:
        node = node.next
        yield node
