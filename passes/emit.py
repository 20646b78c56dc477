"""Write nodes into a new graph, each with its fake value computed on the spot.

A wrong shape therefore fails where it is written, and every pass hands on fresh metadata. Calls that are alike share
one value: a deep model repeats each of them in every layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode, disable_fake_tensor_cache
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings

from regate_fx.passes.base import fake
from regate_fx.passes.fake_results import CallKeys, reads_values

# What a rewritten node inherits from the node it stands for.
_INHERITED = ("stack_trace", "nn_module_stack", "recompute", "ac_graph_id", "autocast", "seq_nr")


class Emitter:
    """Appends to a graph. `like(node)` sets the node that emitted ones inherit their metadata from."""

    def __init__(self, graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
        self.graph = graph
        self._fake_mode = fake_mode
        self._like: fx.Node | None = None
        self._keys = CallKeys()
        self._results: dict[Hashable, Any] = {}
        self._sharing: set[fx.Node] = set()

    @contextlib.contextmanager
    def like(self, node: fx.Node) -> Iterator[None]:
        previous, self._like = self._like, node
        try:
            yield
        finally:
            self._like = previous

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        self._inherit(node)
        if reads_values(target):
            self._own_values(node.all_input_nodes)
        values, named = fx.map_arg((args, kwargs), fake)
        autocast = node.meta.get("autocast", ())
        key = self._keys.of(target, values, named)
        if key is not None and (key, autocast) in self._results:
            node.meta["val"] = self._results[key, autocast]
            self._sharing.add(node)
            return node
        with self._computing(), _autocast(autocast):
            node.meta["val"] = target(*values, **named)
        # A number read from a tensor has a symbol of its own, which a later capture looks for at this node.
        if bindings := compute_unbacked_bindings(self._fake_mode.shape_env, node.meta["val"]):
            node.meta["unbacked_bindings"] = bindings
        elif key is not None:
            self._results[key, autocast] = node.meta["val"]
        return node

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Fake values, by decompositions that keep sizes symbolic where C++ kernels would read them.

        The mode's own cache costs more than it saves beside the one here.
        """
        with disable_fake_tensor_cache(self._fake_mode), self._fake_mode, enable_python_dispatcher():
            yield

    def _own_values(self, nodes: list[fx.Node]) -> None:
        """A fake value keeps the symbols of the numbers that were read from it: what is read must not be shared."""
        for node in self._sharing.intersection(nodes):
            with self._fake_mode:
                node.meta["val"] = torch.ops.aten.alias.default(node.meta["val"])
            self._sharing.remove(node)

    def attribute(self, name: str, value: Any) -> fx.Node:
        node = self.graph.get_attr(name)
        self._inherit(node)
        node.meta["val"] = value
        return node

    def _inherit(self, node: fx.Node) -> None:
        if self._like is not None:
            node.meta |= {key: self._like.meta[key] for key in _INHERITED if key in self._like.meta}

    def size(self, tensor: fx.Node, dim: int) -> fx.Node | int:
        """A size of a tensor: a node where it is symbolic, an int where it is not."""
        size = fake(tensor).shape[dim]
        return self.call(torch.ops.aten.sym_size.int, tensor, dim) if isinstance(size, torch.SymInt) else size


def in_any_order(target: Any) -> Any:
    """An operator for values that may lie in memory in another order than captured ones: a view may need a copy."""
    views = torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default
    return torch.ops.aten.reshape.default if target in views else target


@contextlib.contextmanager
def _autocast(brackets: tuple[tuple[Any, ...], ...]) -> Iterator[None]:
    """The autocast state a node was captured under; `brackets` as `OpenBrackets` recorded them."""
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cache in brackets:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield
