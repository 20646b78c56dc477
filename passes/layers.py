"""Recognise the decoder layers of a graph by structure: the residual stream and the attention between.

The hidden states flow from the embeddings to the head. Values that every such path passes through are the
residual stream (its dominators). A mixer is what pairs tokens: an attention, or operators that are not known to keep
tokens apart (a convolution, a scan). A layer is what lies between the stream value that a mixer reads and the one that
the next mixer reads. Which module a node came from is asked only where structure does not tell: whether a mixer that is
no attention is a layer beside the attentions' or a part of one, and where the last layer ends.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

from torch import fx

from regate_fx.passes.axes import Axes, Group, has_token
from regate_fx.passes.base import (
    SCALARS_OF_TENSORS,
    PassContext,
    PassResult,
    Refused,
    fake,
    is_tensors,
    operator_name,
)
from regate_fx.passes.rules import Kind
from regate_fx.passes.scalars import is_count
from regate_fx.passes.stream import Behind, residual_stream
from regate_fx.passes.token_axes import TokenAxes


@dataclass(frozen=True)
class Attention:
    """One attention: a single operator, or a connected group of operators over pairs of positions."""

    nodes: tuple[fx.Node, ...]
    kernel: bool


@dataclass
class Layer:
    """One decoder layer: from the stream value it reads to the one it writes (None where there is no stream).

    anchor: the first node of its first mixer. attentions: none in a layer that mixes tokens otherwise.
    """

    index: int
    anchor: fx.Node
    attentions: list[Attention]
    start: fx.Node | None
    end: fx.Node | None = None
    refused: Refused | None = None


@dataclass
class DecoderStack:
    """What the graph computes from token content, as layers.

    `content`: nodes that depend on token embeddings. `segment`: for each of them the layer it belongs to, -1
    before the first layer, `len(layers)` after the last one.
    """

    content: set[fx.Node]
    layers: list[Layer]
    segment: dict[fx.Node, int] = field(default_factory=dict)

    @property
    def last_stream(self) -> fx.Node | None:
        return self.layers[-1].end if self.layers else None


@dataclass(frozen=True)
class FindLayers:
    """Find the decoder layers; puts a `DecoderStack` into the findings. Refuses a graph without attention."""

    name: str = "find_layers"
    after: tuple[str, ...] = ("token_axes",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        analysis: TokenAxes = ctx.findings["token_axes"]
        order = {node: index for index, node in enumerate(gm.graph.nodes)}
        content = _content(gm, analysis)
        _refuse_numbers(content, analysis)
        attentions = _attentions(gm, analysis, content)
        loss = [node for node in content if analysis.kinds.get(node) is Kind.LOSS]
        if not attentions and not loss:
            raise Refused("no-attention", "no attention over the decoder's positions was found in this graph")
        stack = DecoderStack(content, [])
        if attentions:
            mixers = _mixers(attentions, content, analysis)
            anchors = sorted((mixer[0] for mixer in mixers), key=order.__getitem__)
            stream = residual_stream(anchors, content, order, analysis)
            behind = Behind(stream, content, order, analysis)
            stack.layers = _layers(mixers, stream, behind, order)
            _end_last_layer(stack, stream)
            _assign_segments(stack, stream, behind)
        else:
            stack.segment = dict.fromkeys(content, -1)
        ctx.findings["layers"] = stack
        return PassResult(gm, 0)


def _content(gm: fx.GraphModule, analysis: TokenAxes) -> set[fx.Node]:
    """Everything computed from token embeddings (positions, masks and tables of positions are not)."""
    content: set[fx.Node] = set()
    counts: set[fx.Node] = set()  # how many rows the content picks
    given: set[fx.Node] = set()  # what depends on inputs over positions
    for node in gm.graph.nodes:
        from_content = any(n in content or n in counts for n in node.all_input_nodes)
        if not is_tensors(fake(node)):
            # A size of a token tensor is a size, not content.
            if from_content and is_count(fake(node), analysis.symbols):
                counts.add(node)
            continue
        if _is_given(node, analysis) or any(n in given for n in node.all_input_nodes):
            given.add(node)
        is_source = node in given and _is_source(node, analysis)
        if is_source or from_content:
            content.add(node)
    return content


def _is_given(node: fx.Node, analysis: TokenAxes) -> bool:
    axes = analysis.axes.get(node)
    return node.op == "placeholder" and isinstance(axes, Axes) and axes.has_tokens


def _is_source(node: fx.Node, analysis: TokenAxes) -> bool:
    """A look-up of token rows, or hidden states [B, S, D] that come into this graph."""
    axes = analysis.axes.get(node)
    if not isinstance(axes, Axes) or axes.sequences != 1 or len(axes) < 2 or has_token(axes.dims[-1]):
        return False
    if operator_name(node) == "aten.embedding":
        return True
    return node.op == "placeholder" and fake(node).is_floating_point() and len(axes) == 3


def _refuse_numbers(content: set[fx.Node], analysis: TokenAxes) -> None:
    """A number read from token content is no tensor any more: where it goes, no analysis of axes follows.

    Unless it goes nowhere but into the sizes of groups of rows, for which it was proven to be the right one.
    """
    for node in content:
        for user in node.users:
            if user.target in SCALARS_OF_TENSORS and not _only_groups_rows(user, analysis):
                raise Refused("number", f"{operator_name(user)} reads a number from token content", user)


def _only_groups_rows(number: fx.Node, analysis: TokenAxes) -> bool:
    for user in number.users:
        if is_tensors(fake(user)):
            if operator_name(user) != "aten.split_with_sizes" or user in analysis.unproven:
                return False
            parts = analysis.axes[user]
            if not isinstance(parts, tuple) or not any(isinstance(f, Group) for f in parts[0].factors):
                return False
        elif not _only_groups_rows(user, analysis):
            return False
    return True


def _attentions(gm: fx.GraphModule, analysis: TokenAxes, content: set[fx.Node]) -> list[Attention]:
    found: list[list[fx.Node]] = []
    group: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        kind = analysis.kinds.get(node)
        if node not in content or kind not in (Kind.ATTENTION, Kind.PAIRS):
            continue
        joined = [node]
        for source in node.all_input_nodes:
            if kind is Kind.PAIRS and source in group and analysis.kinds[source] is Kind.PAIRS:
                other = group[source]
                if other is not joined:
                    joined = other + [n for n in joined if n not in other]
                    found = [g for g in found if g is not other]
                    for member in joined:
                        group[member] = joined
        found.append(joined)
        for member in joined:
            group[member] = joined
    return [Attention(tuple(nodes), analysis.kinds[nodes[0]] is Kind.ATTENTION) for nodes in found]


Mixer = tuple[fx.Node, Attention | None]


def _mixers(attentions: list[Attention], content: set[fx.Node], analysis: TokenAxes) -> list[Mixer]:
    """The attentions, and operators that are not proven in modules numbered like those of the attentions.

    An operator of an attention's own module is part of that layer, and one of unknown origin of the layer before it.
    """
    attended = {module for attention in attentions if (module := _numbered_module(attention.nodes[0]))}
    siblings = {_list_of(module) for module in attended}
    others = []
    for node, refused in analysis.unproven.items():
        module = _numbered_module(node)
        if node not in content or module is None or refused.code == "axis":
            continue
        if module not in attended and _list_of(module) in siblings:
            others.append(node)
    return [(attention.nodes[0], attention) for attention in attentions] + [(node, None) for node in others]


def _layers(
    mixers: list[Mixer], stream: list[fx.Node], behind: Behind, order: dict[fx.Node, int]
) -> list[Layer]:
    """Group mixers by the last stream value before them."""
    layers: list[Layer] = []
    floor = 0
    for node, attention in sorted(mixers, key=lambda mixer: order[mixer[0]]):
        start = _start(node, stream, behind, floor)
        floor = behind[node]
        found = [attention] if attention is not None else []
        if layers and start is not None and (layers[-1].start is start or _is_part(node, layers[-1])):
            layers[-1].attentions.extend(found)
            continue
        if layers:
            layers[-1].end = start
        layers.append(Layer(len(layers), node, found, start))
    return layers


def _start(node: fx.Node, stream: list[fx.Node], behind: Behind, floor: int) -> fx.Node | None:
    """The last stream value before a mixer; what the mixer's own module makes of its input belongs to the layer.

    floor: the first stream value behind the mixer before. Where a module runs twice in a row, what follows is its own.
    """
    if not behind[node]:
        return None
    last = outside = behind[node] - 1
    module = _numbered_module(node)
    while module is not None and outside >= floor and module in numbered_modules(stream[outside]):
        outside -= 1
    return stream[outside if outside >= floor else last]


def _is_part(node: fx.Node, layer: Layer) -> bool:
    """Whether a mixer is in the numbered module of a layer that mixes tokens otherwise than by attention."""
    return not layer.attentions and _numbered_module(node) == _numbered_module(layer.anchor)


def _end_last_layer(stack: DecoderStack, stream: list[fx.Node]) -> None:
    """Where the last layer ends and the final norm begins.

    The module around its last attention tells, where the capture recorded one; else as many stream values as the layer
    before has; else the last residual addition.
    """
    last = stack.layers[-1]
    if last.start is None:
        return
    first = stream.index(last.start)
    behind = stream[first + 1 :]
    mixer = last.attentions[-1].nodes[0] if last.attentions else last.anchor
    for module in reversed(numbered_modules(mixer)):
        if members := [vertex for vertex in behind if module in numbered_modules(vertex)]:
            last.end = members[-1]
            return
    if len(stack.layers) > 1 and (previous := stack.layers[-2].start) is not None:
        period = first - stream.index(previous)
        if first + period < len(stream) and stream[first + period].target == last.start.target:
            last.end = stream[first + period]
            return
    adds = [
        vertex
        for vertex in behind
        if operator_name(vertex) == "aten.add" and any(source in stream for source in vertex.all_input_nodes)
    ]
    last.end = adds[-1] if adds else None


def _numbered_module(node: fx.Node) -> str | None:
    """The outermost of the modules around a node that have a number for a name."""
    return next(iter(numbered_modules(node)), None)


def _list_of(module: str) -> str:
    return re.sub(r"\.?\[?\d+\]?$", "", module)


def numbered_modules(node: fx.Node) -> list[str]:
    """Paths of the modules around a node that have a number for a name, outermost first."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return [path for path in paths if re.search(r"(\.\d+|\[\d+\])$", path)]


def _assign_segments(stack: DecoderStack, stream: list[fx.Node], behind: Behind) -> None:
    """A node belongs to the last layer whose start it depends on."""
    begun = [-1] * (len(stream) + 1)  # by the number of stream values that a node depends on
    for layer in stack.layers:
        if layer.start is not None:
            begun[behind.place[layer.start] + 1] = layer.index
    if stack.last_stream is not None:
        begun[behind.place[stack.last_stream] + 1] = len(stack.layers)
    begun = list(itertools.accumulate(begun, max))
    stack.segment = {node: begun[behind[node]] for node in stack.content}
    for layer in stack.layers:
        for attention in layer.attentions:
            for node in attention.nodes:
                stack.segment[node] = layer.index
