"""What must hold between any two passes; checked after each of them."""

from __future__ import annotations

import torch
from torch import fx

from regate_fx.passes.base import fake


def verify(gm: fx.GraphModule, placeholders: int, functional: bool) -> str | None:
    """The first broken invariant, or None.

    placeholders: how many the captured graph has; passes neither add nor drop nor reorder them.
    functional: whether the graph has been normalised, from when on nothing but a write-back to an input may mutate.
    """
    gm.graph.lint()
    if len(gm.graph.find_nodes(op="placeholder")) != placeholders:
        return "the number of graph inputs changed"
    if not functional:
        return None
    for node in gm.graph.nodes:
        if node.op in ("call_method", "call_module"):
            return f"{node.name} is a {node.op}, normalised graphs have functions only"
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            problem = _check_function(node)
            if problem is not None:
                return problem
    return None


def _check_function(node: fx.Node) -> str | None:
    schema = node.target._schema
    if schema.is_mutable and not _is_write_back(node):
        return f"{node.name} writes to a value in place"
    if schema.returns and not schema.is_mutable and "val" not in node.meta:
        return f"{node.name} has no fake value"
    return None


def _is_write_back(node: fx.Node) -> bool:
    target = node.args[0]
    return (
        node.target is torch.ops.aten.copy_.default
        and isinstance(target, fx.Node)
        and target.op == "placeholder"
        and fake(target) is not None
    )
