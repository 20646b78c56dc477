"""Remove what nothing reads any more: masks, dense index arithmetic, the anchor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from regate_fx.passes.base import PassContext, PassResult


@dataclass(frozen=True)
class RemoveUnused:
    """Dead-code elimination. The graph is functional: only writes to inputs and asserts count as effects."""

    name: str = "remove_unused"
    after: tuple[str, ...] = ("place",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        removed = 0
        for node in reversed(gm.graph.nodes):
            if node.users or node.op in ("placeholder", "output") or _has_effect(node):
                continue
            gm.graph.erase_node(node)
            removed += 1
        return PassResult(gm, removed)


def _has_effect(node: fx.Node) -> bool:
    if node.target in (torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_async.msg):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
