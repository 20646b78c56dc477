"""Cut a rewritten graph at the ends of its decoder layers.

Packed states [1, N, D] pass from part to part; nothing is scattered between. Each part can be compiled by itself, and
equal layers by one compilation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from regate_fx.passes.base import PassContext, Refused, fake
from regate_fx.passes.brackets import CloseBrackets
from regate_fx.passes.gradients import learned_nodes


@dataclass(frozen=True)
class Part:
    """A piece of the graph that runs as one.

    layer:   index of the decoder layer, -1 before the first, the number of layers after the last one
    inputs:  names of what it takes: placeholders of the whole graph, or values of earlier parts
    outputs: names of what it returns, a tuple
    last:    names of values that no later part and no output reads
    """

    layer: int
    graph_module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last: tuple[str, ...]


@dataclass(frozen=True)
class SplitGraph:
    """The parts in the order in which they run. outputs: the whole graph's, with names for values."""

    placeholders: tuple[str, ...]
    parts: tuple[Part, ...]
    outputs: Any


@dataclass(frozen=True)
class _Named:
    """Stands for a value in the outputs of a `SplitGraph`."""

    name: str


def split_layers(gm: fx.GraphModule) -> SplitGraph:
    """Split a graph that `ElideTokens` wrote and `CloseBrackets` has not closed.

    Raises `Refused` where a later layer feeds an earlier one.
    """
    part_of = _assign(gm)
    numbers = sorted(set(part_of.values()))
    output = gm.graph.output_node()
    learned = learned_nodes(gm.graph.nodes)
    made = [_Piece(gm, number, part_of, learned) for number in numbers]
    symbols = _symbol_nodes(gm, part_of)
    for piece in made:
        piece.add_symbols(symbols)
    parts = []
    still_read = {node.name for node in output.all_input_nodes}
    for index in reversed(range(len(made))):
        piece = made[index]
        later = still_read.union(*(other.input_names for other in made[index + 1 :]))
        held = {*piece.input_names, *piece.output_names}
        parts.append(piece.finish(tuple(sorted(held - later))))
    outputs = fx.map_arg(output.args[0], lambda node: _Named(node.name))
    placeholders = tuple(node.name for node in gm.graph.find_nodes(op="placeholder"))
    return SplitGraph(placeholders, tuple(reversed(parts)), outputs)


def fill_outputs(outputs: Any, values: dict[str, Any]) -> Any:
    """The outputs of a `SplitGraph` with values for names."""
    if isinstance(outputs, _Named):
        return values[outputs.name]
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(fill_outputs(item, values) for item in outputs)
    return outputs


def _assign(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """The part of each node: that of the layer it was written for, not before those it reads."""
    part_of: dict[fx.Node, int] = {}
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    for node in nodes:
        earliest = max((part_of[source] for source in node.all_input_nodes if source in part_of), default=-1)
        part_of[node] = max(earliest, node.meta.get("segment", -1))
        if "segment" in node.meta and node.meta["segment"] < earliest:
            raise Refused("layer-order", f"layer {earliest} feeds an earlier one through {node.name}", node)
    # What one layer alone reads of parameters and positions (transposes, adapters) is computed in that layer.
    for node in reversed(nodes):
        readers = {part_of.get(user) for user in node.users}
        if part_of[node] == -1 and "segment" not in node.meta and len(readers) == 1:
            (reader,) = readers
            part_of[node] = -1 if reader is None else reader
    return part_of


class _Piece:
    """One part while it is being written."""

    def __init__(
        self, gm: fx.GraphModule, number: int, part_of: dict[fx.Node, int], learned: set[fx.Node]
    ) -> None:
        self.number = number
        self._gm = gm
        self._learned = learned
        self._nodes = [node for node in part_of if part_of[node] == number]
        own = set(self._nodes)
        read = [source for node in self._nodes for source in node.all_input_nodes if source not in own]
        # Bodies of functions are no values: each part that calls one holds it.
        self._bodies = list(dict.fromkeys(node for node in read if node.op == "get_attr"))
        self._inputs = [node for node in dict.fromkeys(read) if node.op != "get_attr"]
        self._outputs = [node for node in self._nodes if any(user not in own for user in node.users)]

    @property
    def input_names(self) -> list[str]:
        return [node.name for node in self._inputs]

    @property
    def output_names(self) -> list[str]:
        return [node.name for node in self._outputs]

    def add_symbols(self, known: dict[sympy.Symbol, fx.Node]) -> None:
        """Take along, as numbers, the symbols of sizes that are expressions: no tensor's size shows them."""
        symbols = sorted(_in_expressions([*self._inputs, *self._nodes]), key=str)
        carriers = [known[symbol] for symbol in symbols if symbol in known]
        # First: Inductor wants to know a symbol before it meets an expression of it.
        self._inputs[:0] = [node for node in carriers if node not in self._nodes and node not in self._inputs]

    def finish(self, last: tuple[str, ...]) -> Part:
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        for node in self._inputs:
            values[node] = graph.placeholder(node.name)
            values[node].meta["val"] = _entering(fake(node), node in self._learned)
        for node in (*self._bodies, *self._nodes):
            values[node] = graph.node_copy(node, values.__getitem__)
        graph.output(tuple(values[node] for node in self._outputs))
        part = fx.GraphModule(self._gm, graph)
        part.meta = dict(self._gm.meta)
        closed = CloseBrackets().run(part, PassContext()).graph_module
        return Part(self.number, closed, tuple(self.input_names), tuple(self.output_names), last)


def _entering(value: Any, learned: bool) -> Any:
    """A fake value as an input: one through which a gradient flows says so, a size goes by its final symbol."""
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(learned)
    if isinstance(value, torch.SymInt):
        # Sizes that were found equal keep their first symbol beneath, which Inductor would bind instead.
        return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)
    return value


def _symbol_nodes(gm: fx.GraphModule, part_of: dict[fx.Node, int]) -> dict[sympy.Symbol, fx.Node]:
    """For each symbol an input, or a value made before the first layer, that is it."""
    known: dict[sympy.Symbol, fx.Node] = {}
    for node in gm.graph.nodes:
        value = fake(node)
        is_early = node.op == "placeholder" or part_of.get(node) == -1
        if is_early and isinstance(value, torch.SymInt) and value.node.expr.is_symbol:
            known.setdefault(value.node.expr, node)
    return known


def _in_expressions(nodes: Iterable[fx.Node]) -> set[sympy.Symbol]:
    found: set[sympy.Symbol] = set()
    for node in nodes:
        value = fake(node)
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and not size.node.expr.is_symbol:
                found |= size.node.expr.free_symbols
    return found
