"""Run a Dynamo graph under a tracer; copy what was recorded where a call is repeated: the layers of a model are alike.

Recording one call costs a millisecond of dispatch through functional, symbolic and fake tensors; a model of eighty
layers makes its calls eighty times. A call with the same target, settings and kinds of operands as an earlier one
records the same operators, so that their nodes are copied, and a tensor is made only when a call needs one that was
not made before.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._functorch._aot_autograd.functional_utils import from_fun, to_fun
from torch._guards import detect_fake_mode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import (
    get_proxy_mode,
    get_proxy_slot,
    snapshot_fake,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import rebind_unbacked
from torch.multiprocessing.reductions import StorageWeakRef

from regate_fx.passes.fake_results import Undecided, reads_values, value_key


class AliasWritten(Exception):
    """Something wrote to a tensor of which a copied call returned a view: the run has to be repeated without copies."""


class _Leaf(NamedTuple):
    """A tensor that a recorded call returned.

    node: number of the recorded node. value: what the node computes, fake. key: see `RepeatingInterpreter._key_of`.
    bases: numbers of the operands whose storage it shares.
    """

    node: int
    value: Tensor
    requires_grad: bool
    key: int
    bases: tuple[int, ...]


class _Operand(NamedTuple):
    """A tensor that a call takes: its node in the recorded graph, and the value by which the interpreter knows it."""

    node: fx.Node
    key: int
    value: Any


@dataclass(frozen=True)
class _Record:
    """What a call recorded: its nodes, those of its operands, and its result, flat.

    leaves: a `_Leaf` for a tensor that the call made, the int i for operand i itself, and (value,) for other values.
    """

    nodes: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec


@dataclass(eq=False)
class _Copy:
    """A tensor whose node is recorded and which is itself made when a call needs it."""

    node: fx.Node
    leaf: _Leaf
    is_viewed: bool = False
    tensor: Tensor | None = None


@dataclass
class _Call:
    """A call that is about to run: what decides its record, None where that is not known, and its operands."""

    key: Hashable | None
    operands: list[_Operand] = field(default_factory=list)


class RepeatingInterpreter(fx.Interpreter):
    """Runs a graph on functional tensors inside `make_fx`; raises `AliasWritten`.

    Copied are calls that wrote nothing when they were recorded. A copied view is not tied to its base: where either is
    written to at any time, the run is void.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        mode = get_proxy_mode()
        assert mode is not None
        self._tracer: Any = mode.tracer
        self._records: dict[Hashable, _Record | None] = {}
        self._keys: dict[Hashable, int] = {}
        self._viewed: set[StorageWeakRef] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method"):
            self._make_tensors(n)
            return super().run_node(n)
        if n.target is operator.getitem and isinstance(self.env.get(n.args[0]), (tuple, list)):
            return self.env[n.args[0]][n.args[1]]
        call = self._call(n)
        record = self._records.get(call.key) if call.key is not None else None
        if record is not None:
            with self._set_current_node(n):
                return self._copy(record, call.operands)
        return self._record(n, call)

    # -- what decides a record ---------------------------------------------------------------------------

    def _call(self, n: fx.Node) -> _Call:
        call = _Call(None)
        if n.meta.get("unbacked_bindings"):
            return call
        try:
            described = (self._describe(n.args, call.operands), self._describe(n.kwargs, call.operands))
        except Undecided:
            return call
        if call.operands:
            call.key = (n.op, n.target, *described, _settings(call.operands))
        return call

    def _describe(self, argument: Any, operands: list[_Operand]) -> Hashable:
        """A hashable description of an argument; appends the tensors in it to `operands`."""
        if isinstance(argument, fx.Node):
            argument = self.env[argument]
        if isinstance(argument, (Tensor, _Copy)):
            operand = self._operand(argument)
            same = next((i for i, other in enumerate(operands) if other.node is operand.node), len(operands))
            operands.append(operand)
            return ("tensor", operand.key, same)
        if isinstance(argument, (tuple, list)):
            return (type(argument), *(self._describe(element, operands) for element in argument))
        if isinstance(argument, dict):
            return tuple((name, self._describe(value, operands)) for name, value in argument.items())
        if isinstance(argument, slice):
            bounds = (argument.start, argument.stop, argument.step)
            return (slice, *(self._describe(bound, operands) for bound in bounds))
        return Ellipsis if argument is Ellipsis else value_key(argument)

    def _operand(self, value: Tensor | _Copy) -> _Operand:
        if isinstance(value, _Copy):
            if value.tensor is None:
                return _Operand(value.node, value.leaf.key, value)
            value = value.tensor
        inner = from_fun(value)
        known = get_proxy_slot(inner, self._tracer, None) if isinstance(inner, Tensor) else None
        if known is None or known.constant is not None or not isinstance(value, FunctionalTensor):
            raise Undecided
        return _Operand(known.proxy.node, self._key_of(inner, value.requires_grad), value)

    def _key_of(self, inner: Any, requires_grad: bool) -> int:
        """Equal for tensors for which any call records the same."""
        return self._keys.setdefault((value_key(inner), requires_grad), len(self._keys))

    # -- recording ---------------------------------------------------------------------------------------

    def _record(self, n: fx.Node, call: _Call) -> Any:
        tensors = self._make_tensors(n)
        before = [torch._functionalize_mutation_counter(tensor.elem) for tensor in tensors]
        last = self._tracer.graph._root.prev
        result = super().run_node(n)
        if n.meta.get("unbacked_bindings"):
            fake_mode = detect_fake_mode()
            assert fake_mode is not None
            rebind_unbacked(fake_mode.shape_env, n, result)
        after = [torch._functionalize_mutation_counter(tensor.elem) for tensor in tensors]
        written = [t for t, old, new in zip(tensors, before, after, strict=True) if old != new]
        if any(_storage(tensor) in self._viewed for tensor in written):
            raise AliasWritten
        if call.key is not None and not written and all(map(self._is_as_before, call.operands)):
            self._records[call.key] = self._recorded(last, call.operands, result)
        return result

    def _is_as_before(self, operand: _Operand) -> bool:
        """False where a call changed the shape or strides of a tensor, as `unsqueeze_` does: copies would not."""
        now = self._operand(operand.value)
        return now.node is operand.node and now.key == operand.key

    def _recorded(self, last: fx.Node, operands: Sequence[_Operand], result: Any) -> _Record | None:
        """The record of the call that just ran, whose nodes follow `last`; None where it cannot be copied."""
        nodes: list[fx.Node] = []
        known = {operand.node for operand in operands}
        for node in _following(last):
            if _is_size(node):
                continue  # it is the same number for the copies
            if not _is_copyable(node) or any(
                source not in known and not _is_size(source) for source in node.all_input_nodes
            ):
                return None
            nodes.append(node)
            known.add(node)
        leaves, spec = pytree.tree_flatten(result)
        try:
            described = tuple(self._leaf(leaf, nodes, operands) for leaf in leaves)
        except Undecided:
            return None
        return _Record(tuple(nodes), tuple(operand.node for operand in operands), described, spec)

    def _leaf(self, leaf: Any, nodes: Sequence[fx.Node], operands: Sequence[_Operand]) -> Any:
        if not isinstance(leaf, Tensor):
            value_key(leaf)
            return (leaf,)
        operand = self._operand(leaf)
        for index, other in enumerate(operands):
            if other.node is operand.node and other.key == operand.key:
                return index
        if operand.node not in nodes:
            raise Undecided
        inner: Any = from_fun(leaf)
        own = _storage(leaf)
        bases = tuple(index for index, base in enumerate(operands) if _storage(_made_of(base)) == own)
        return _Leaf(nodes.index(operand.node), inner, leaf.requires_grad, operand.key, bases)

    # -- copying -----------------------------------------------------------------------------------------

    def _copy(self, record: _Record, operands: Sequence[_Operand]) -> Any:
        copies = dict(zip(record.operands, (operand.node for operand in operands), strict=True))

        def moved(node: fx.Node) -> fx.Node:
            return copies.get(node, node)

        for node in record.nodes:
            args, kwargs = fx.map_arg(node.args, moved), fx.map_arg(node.kwargs, moved)
            copied = self._tracer.create_node(node.op, node.target, args, kwargs, _name(node))
            for key in ("val", "tensor_meta"):
                if key in node.meta:
                    copied.meta[key] = node.meta[key]
            copies[node] = copied
        leaves = [self._copied_leaf(leaf, record, copies, operands) for leaf in record.leaves]
        return pytree.tree_unflatten(leaves, record.spec)

    def _copied_leaf(
        self, leaf: Any, record: _Record, copies: dict[fx.Node, fx.Node], operands: Sequence[_Operand]
    ) -> Any:
        if isinstance(leaf, int):
            return operands[leaf].value
        if not isinstance(leaf, _Leaf):
            return leaf[0]
        for index in leaf.bases:
            base = operands[index].value
            if isinstance(base, _Copy):
                base.is_viewed = True
            else:
                self._viewed.add(_storage(base))
        return _Copy(copies[record.nodes[leaf.node]], leaf)

    # -- tensors of copies -------------------------------------------------------------------------------

    def _make_tensors(self, n: fx.Node) -> list[FunctionalTensor]:
        """The tensors that a node takes; those that were only copied so far are made."""
        tensors = []
        for source in n.all_input_nodes:
            self.env[source] = pytree.tree_map_only(_Copy, self._made, self.env[source])
            leaves = pytree.tree_leaves(self.env[source])
            tensors += [leaf for leaf in leaves if isinstance(leaf, FunctionalTensor)]
        return tensors

    def _made(self, copy: _Copy) -> Tensor:
        if copy.tensor is None:
            inner = snapshot_fake(copy.leaf.value)
            assert inner is not None
            inner.requires_grad_(copy.leaf.requires_grad)
            proxy = fx.Proxy(copy.node, self._tracer)
            track_tensor_tree(inner, proxy, constant=None, tracer=self._tracer)
            copy.tensor = to_fun(inner)
            inner.requires_grad_(copy.leaf.value.requires_grad)
            if copy.leaf.bases or copy.is_viewed:
                self._viewed.add(_storage(copy.tensor))
        return copy.tensor


def _settings(operands: Sequence[_Operand]) -> Hashable:
    """What else decides how a call is recorded."""
    devices = {operand.node.meta["val"].device.type for operand in operands}
    autocast = {
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in devices
        if torch.amp.is_autocast_available(device)
    }
    return torch.is_grad_enabled(), frozenset(autocast)


def _following(last: fx.Node) -> Iterator[fx.Node]:
    node = last.next
    while node.op != "root":
        yield node
        node = node.next


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_copyable(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    is_overload = isinstance(node.target, torch._ops.OpOverload)
    return is_overload and not reads_values(node.target)


def _name(node: fx.Node) -> str | None:
    target = node.target
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else None


def _made_of(operand: _Operand) -> Any:
    return operand.value.tensor if isinstance(operand.value, _Copy) else operand.value


def _storage(tensor: Any) -> StorageWeakRef:
    """Of the functional tensor in C++, which all its views share."""
    return StorageWeakRef(tensor.elem.untyped_storage())
