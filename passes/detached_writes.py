"""Writes with gradients to what was detached, as `positions = table(ids).detach(); positions += segments` does.

Eager PyTorch gives the detached value a history from that write on, and what it was detached from keeps its own. A
functional graph takes one for a view of the other and makes both anew: the same loss, gradients missing.
"""

from __future__ import annotations

import torch
from torch import fx

from regate_fx.passes.base import Refused
from regate_fx.passes.in_place import storage, targets, with_grad_mode, writes

_DETACHES = ("detach", "detach.default", "_get_data_attr")  # the last is `.data`


def part_detached(gm: fx.GraphModule) -> int:
    """Give each detached value that is written to with gradients memory of its own; returns how many.

    Raises `Refused` where what it was detached from, or a view of that, is then written to or used beside it; or after
    any write, if it carries gradients, which eager PyTorch leaves as they are.
    """
    written: dict[fx.Node, list[fx.Node]] = {}
    for node, grad_enabled in with_grad_mode(gm.graph):
        if grad_enabled and writes(node):  # those under `no_grad` are refused elsewhere
            for detached in filter(None, map(_detached, targets(node))):
                written.setdefault(detached, []).append(node)
    parted = 0
    for detached, nodes in written.items():
        has_grad = any(_requires_grad(source) for write in nodes for source in write.all_input_nodes)
        for other in _used_elsewhere(gm, detached, nodes[0]):
            if has_grad or _requires_grad(other):
                reason = f"{nodes[0].name} writes to {detached.name}, which was detached from {other.name}"
                raise Refused("detached-write", reason, nodes[0])
        if has_grad:
            with gm.graph.inserting_after(detached):
                own = gm.graph.call_method("clone", (detached,))
            own.meta = dict(detached.meta)
            detached.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)
            parted += 1
    return parted


def _requires_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def _detached(node: fx.Node | None) -> fx.Node | None:
    """The detach that a value is a view of."""
    while node is not None:
        if getattr(node.target, "__name__", node.target) in _DETACHES:
            return node
        here = storage(node)
        node = next((source for source in node.all_input_nodes if storage(source) == here), None)
    return None


def _used_elsewhere(gm: fx.GraphModule, detached: fx.Node, write: fx.Node) -> list[fx.Node]:
    """What shares memory with a detached value other than through it, and is written to, or used behind `write`.

    write: the first one to the detached value.
    """
    place = {node: index for index, node in enumerate(gm.graph.nodes)}
    shared = [node for node in place if storage(node) == storage(detached)]
    below = {detached}
    for node in shared:
        if below.intersection(node.all_input_nodes):
            below.add(node)

    def is_used(node: fx.Node) -> bool:
        if node.op in ("placeholder", "get_attr"):
            return True
        is_written = any(
            writes(user) and node in targets(user) for user in node.users if place[user] > place[detached]
        )
        return is_written or any(place[user] > place[write] for user in node.users)

    return [node for node in shared if node not in below and is_used(node)]
