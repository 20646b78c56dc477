"""Remove what nothing reads any more: masks, dense index arithmetic, the anchor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from regate_fx.passes.base import PassContext, PassResult


@dataclass(frozen=True)
class RemoveUnused:
    """Dead-code elimination. The graph is functional, so only writes to inputs count as effects."""

    name: str = "remove_unused"
    after: tuple[str, ...] = ("place",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        removed = 0
        for node in reversed(gm.graph.nodes):
            if node.users or node.op in ("placeholder", "output") or _writes(node):
                continue
            gm.graph.erase_node(node)
            removed += 1
        gm.recompile()
        return PassResult(gm, removed)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
