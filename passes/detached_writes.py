"""Writes with gradients to what was detached, as `positions = table(ids).detach(); positions += segments` does.

Eager PyTorch gives the detached value a history from that write on, and what it was detached from keeps its own. A
functional graph takes one for a view of the other and makes both anew: the same loss, gradients missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from regate_fx.passes.base import Refused
from regate_fx.passes.in_place import storage, targets, writes

_DETACHES = ("detach", "detach.default", "_get_data_attr")  # the last is `.data`


def part_detached(gm: fx.GraphModule) -> int:
    """Give a detached value that is written to with gradients memory of its own; returns how many.

    Raises `Refused` where what it was detached from, or a view of that, is used after such a write; or after any write,
    if it carries gradients, which eager PyTorch leaves as they are.
    """
    parted: set[fx.Node] = set()
    for write, target in _writes(gm):
        detached = _detached(target)
        if detached is None or detached in parted:
            continue
        others = _used_elsewhere(gm, detached, write)
        has_grad = any(map(_requires_grad, write.all_input_nodes))
        for other in others:
            if has_grad or _requires_grad(other):
                reason = f"{write.name} writes to {detached.name}, which was detached from {other.name}"
                raise Refused("detached-write", reason, write)
        if has_grad:
            with gm.graph.inserting_after(detached):
                own = gm.graph.call_method("clone", (detached,))
            own.meta = dict(detached.meta)
            detached.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)
            parted.add(detached)
    if parted:
        gm.recompile()
    return len(parted)


def _requires_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _writes(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each operator that writes, with what it writes to; those under `no_grad` are another pass's."""
    grad_enabled = True
    for node in list(gm.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            grad_enabled = bool(node.args[0])
        elif grad_enabled and writes(node):
            yield from ((node, target) for target in targets(node))


def _detached(node: fx.Node | None) -> fx.Node | None:
    """The detach that a value is a view of."""
    while node is not None:
        if getattr(node.target, "__name__", node.target) in _DETACHES:
            return node
        here = storage(node)
        node = next((source for source in node.all_input_nodes if storage(source) == here), None)
    return None


def _used_elsewhere(gm: fx.GraphModule, detached: fx.Node, write: fx.Node) -> list[fx.Node]:
    """What shares memory with a detached value other than through it, and is still used when that is written to."""
    place = {node: index for index, node in enumerate(gm.graph.nodes)}
    shared = [node for node in place if storage(node) == storage(detached)]
    below = {detached}
    for node in shared:
        if below.intersection(node.all_input_nodes):
            below.add(node)

    def is_used(node: fx.Node) -> bool:
        later = any(place[user] > place[write] for user in node.users)
        return later or node.op in ("placeholder", "get_attr")

    return [node for node in shared if node not in below and is_used(node)]
