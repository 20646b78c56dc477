"""The residual stream: values of token states that every path from the embeddings to the head passes through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from regate_fx.passes.axes import Axes, has_token
from regate_fx.passes.base import fake, is_tensor
from regate_fx.passes.rules import Kind
from regate_fx.passes.scalars import is_count
from regate_fx.passes.token_axes import TokenAxes


def residual_stream(
    anchors: list[fx.Node], content: set[fx.Node], order: dict[fx.Node, int], analysis: TokenAxes
) -> list[fx.Node]:
    """Dominators, within the content, of the last node that depends on the last of the mixers, given in order.

    Embeddings that the first mixer does not depend on, as those added to every layer, are no other way past the stream.
    """
    sink = _sink(anchors[-1], content, order, analysis)
    reaching = _ancestors(sink) & content | {sink}
    related = _from_sources_of(anchors[0], content)
    if not all(anchor in related for anchor in anchors):
        related = reaching
    dominator: dict[fx.Node, fx.Node | None] = {}
    depth: dict[fx.Node | None, int] = {None: 0}
    for node in sorted(reaching & related, key=order.__getitem__):
        sources = [source for source in _read(node, analysis) if source in reaching and source in related]
        parent: fx.Node | None = sources[0] if sources else None
        for source in sources[1:]:
            parent = _common(parent, source, dominator, depth)
        dominator[node] = parent
        depth[node] = depth[parent] + 1
    chain: list[fx.Node] = []
    vertex: fx.Node | None = sink
    while vertex is not None:
        chain.append(vertex)
        vertex = dominator[vertex]
    return [node for node in reversed(chain) if _carries_states(node, analysis)]


def _from_sources_of(node: fx.Node, content: set[fx.Node]) -> set[fx.Node]:
    """What depends on the embeddings that a node depends on."""
    before = _ancestors(node) & content | {node}
    sources = [found for found in before if not any(n in content for n in found.all_input_nodes)]
    return _closure(sources, lambda n: n.users)


def _common(
    a: fx.Node | None,
    b: fx.Node | None,
    dominator: dict[fx.Node, fx.Node | None],
    depth: dict[fx.Node | None, int],
) -> fx.Node | None:
    while a is not b:
        if depth[a] >= depth[b]:
            assert a is not None
            a = dominator[a]
        else:
            assert b is not None
            b = dominator[b]
    return a


def _carries_states(node: fx.Node, analysis: TokenAxes) -> bool:
    axes = analysis.axes.get(node)
    return is_tensor(node) and isinstance(axes, Axes) and axes.sequences == 1 and not has_token(axes.dims[-1])


def _sink(last: fx.Node, content: set[fx.Node], order: dict[fx.Node, int], analysis: TokenAxes) -> fx.Node:
    """The logits that meet the labels, else the last states that depend on the last attention."""
    after = sorted(_descendants(last) & content | {last}, key=order.__getitem__)
    for node in after:
        if analysis.kinds.get(node) is Kind.LOSS:
            return node.args[0]
    states = [node for node in after if _carries_states(node, analysis)]
    return states[-1] if states else last


def _read(node: fx.Node, analysis: TokenAxes) -> Iterator[fx.Node]:
    """What a node is computed from, and for a number of picked rows what that was counted from."""
    for source in node.all_input_nodes:
        if is_count(fake(source), analysis.symbols):
            yield from _read(source, analysis)
        else:
            yield source


def _ancestors(node: fx.Node) -> set[fx.Node]:
    return _closure(node.all_input_nodes, lambda n: n.all_input_nodes)


def _descendants(node: fx.Node) -> set[fx.Node]:
    return _closure(node.users, lambda n: n.users)


def _closure(start: Iterable[fx.Node], step) -> set[fx.Node]:  # type: ignore[no-untyped-def]
    seen: set[fx.Node] = set()
    todo = list(start)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(step(node))
    return seen


class Behind:
    """For each node of the content, how many stream values it depends on; one pass over the graph."""

    def __init__(
        self, stream: list[fx.Node], content: set[fx.Node], order: dict[fx.Node, int], analysis: TokenAxes
    ) -> None:
        self.place = {vertex: index for index, vertex in enumerate(stream)}
        self._count: dict[fx.Node, int] = {}
        for node in sorted(content, key=order.__getitem__):
            self._count[node] = max(map(self._through, _read(node, analysis)), default=0)

    def _through(self, source: fx.Node) -> int:
        if source in self.place:
            return self.place[source] + 1
        return self._count.get(source, 0)

    def __getitem__(self, node: fx.Node) -> int:
        return self._count[node]
