"""Writes that keep a parameter within bounds, as `weight.data.clamp_(-1, 1)`, taken out of a graph to run before it.

Eager PyTorch leaves the history of the parameter alone; in a functional graph what is read behind the write would have
none. Done once before the graph the write means the same where nothing reads the parameter earlier: clamping again
what was clamped changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regate_fx.passes.in_place import storage, targets, writes

_BOUNDS = {"clamp_", "clip_", "clamp_min_", "clamp_max_"}
_DATA = "_get_data_attr"  # `.data`


@dataclass(frozen=True)
class Bound:
    """One write. number: of the graph input that is written to; method, args, kwargs: called on its data."""

    number: int
    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def apply(self, inputs: Sequence[Any]) -> None:
        getattr(inputs[self.number].data, self.method)(*self.args, **self.kwargs)


def take_bounds(gm: fx.GraphModule) -> tuple[Bound, ...]:
    """Remove such writes from a Dynamo graph; returns what to do instead, before each run."""
    found = []
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    written = {storage(target) for node in order if writes(node) for target in targets(node)}
    for number, parameter in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = parameter.meta.get("example_value")
        if (
            not isinstance(value, torch.Tensor)
            or not value.requires_grad
            or storage(parameter) not in written
        ):
            continue
        writing = _clamps(parameter, order)
        if not writing:
            continue
        first = writing[0]
        found.append(Bound(number, str(first.target), tuple(first.args[1:]), dict(first.kwargs)))
        for node in writing:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    return tuple(found)


def _clamps(parameter: fx.Node, order: Mapping[fx.Node, int]) -> list[fx.Node]:
    """All writes to a parameter, in order, if each clamps its data to the same bounds and none comes after a read."""
    shared = [node for node in order if storage(node) == storage(parameter)]
    if sum(node.op == "placeholder" for node in shared) != 1:
        return []
    writing = [node for node in order if writes(node) and any(target in shared for target in targets(node))]
    if not all(_is_clamp_of_data(node, parameter) for node in writing):
        return []
    if len({(node.target, node.args[1:], tuple(node.kwargs.items())) for node in writing}) != 1:
        return []
    handles = {node.args[0] for node in writing}
    reads = [user for node in shared for user in node.users if user not in handles and user not in writing]
    return [] if any(order[user] < order[writing[0]] for user in reads) else writing


def _is_clamp_of_data(node: fx.Node, parameter: fx.Node) -> bool:
    data = node.args[0]
    is_clamp = node.op == "call_method" and node.target in _BOUNDS and len(node.all_input_nodes) == 1
    if not is_clamp or not isinstance(data, fx.Node):
        return False
    return getattr(data.target, "__name__", "") == _DATA and data.args[0] is parameter
