"""Turn grad-mode and autocast brackets into facts about single nodes.

`_set_grad_enabled(False)` and `_enter_autocast` hold for whatever stands between them and their end, so a node
inserted between them would silently change its meaning. Here the brackets are removed: a value that leaves a
`no_grad` region passes a `detach`, and a node computed under autocast carries its arguments in
`meta["autocast"]`. `CloseBrackets` puts autocast brackets back around the nodes that need them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from regate_fx.passes.base import PassContext, PassResult, is_tensor

aten = torch.ops.aten
_set_grad_enabled = torch._C._set_grad_enabled


@dataclass(frozen=True)
class OpenBrackets:
    """Remove grad-mode and autocast brackets, keeping their effect on every node."""

    name: str = "open_brackets"
    after: tuple[str, ...] = ("functionalize",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        grad_enabled = True
        autocast: list[tuple[fx.Node, tuple[Any, ...]]] = []
        constants: list[fx.Node] = []
        removed: list[fx.Node] = []
        for node in gm.graph.nodes:
            if node.target is _set_grad_enabled:
                grad_enabled = bool(node.args[0])
                removed.append(node)
            elif node.target is _enter_autocast:
                autocast.append((node, tuple(node.args)))
                removed.append(node)
            elif node.target is _exit_autocast:
                autocast = [entry for entry in autocast if entry[0] is not node.args[0]]
                removed.insert(0, node)
            elif node.op == "call_function":
                if not grad_enabled:
                    constants.append(node)
                if autocast:
                    node.meta["autocast"] = tuple(args for _, args in autocast)
        for node in constants:
            _detach(gm, node, set(constants))
        for node in removed:
            gm.graph.erase_node(node)
        return PassResult(gm, len(removed))


def _detach(gm: fx.GraphModule, node: fx.Node, constants: set[fx.Node]) -> None:
    outside = [user for user in node.users if user not in constants and user.op != "output"]
    if not outside or not is_tensor(node) or not _may_have_gradient(node.meta["val"].dtype):
        return
    with gm.graph.inserting_after(node):
        detached = gm.graph.call_function(aten.detach.default, (node,))
    detached.meta = {key: value for key, value in node.meta.items() if key != "autocast"}
    for user in outside:
        user.replace_input_with(node, detached)


def _may_have_gradient(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@dataclass(frozen=True)
class CloseBrackets:
    """Put autocast brackets back around runs of nodes that were computed under them."""

    name: str = "close_brackets"
    after: tuple[str, ...] = ("open_brackets",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        opened: list[fx.Node] = []
        current: tuple[tuple[Any, ...], ...] = ()
        brackets = 0
        for node in list(gm.graph.nodes):
            wanted = node.meta.get("autocast", ()) if node.op == "call_function" else ()
            if wanted == current or node.op == "placeholder":
                continue
            with gm.graph.inserting_before(node):
                for enter in reversed(opened):
                    gm.graph.call_function(_exit_autocast, (enter,))
                opened = [gm.graph.call_function(_enter_autocast, args) for args in wanted]
            brackets += len(opened)
            current = wanted
        return PassResult(gm, brackets)
