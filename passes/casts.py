"""Carry casts through normalisation where a graph switches autocast itself.

Normalisation traces without the graph's own autocast, so it takes a value for float32 that is bfloat16 at run time,
and drops a cast to float32 as a cast to the same dtype.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast

CAST = torch.ops.regate_fx.cast.default
_METHODS = {"float", "double", "half", "bfloat16", "to", "type", "type_as"}


def pin_casts(gm: fx.GraphModule) -> int:
    """Replace the casts of a Dynamo graph with autocast brackets by `regate_fx::cast`; returns how many."""
    if not gm.graph.find_nodes(op="call_function", target=_enter_autocast):
        return 0
    pinned = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_method" or node.target not in _METHODS:
            continue
        before, after = (n.meta.get("example_value") for n in (node.args[0], node))
        if (
            not isinstance(before, torch.Tensor)
            or before.device != after.device
            or before.dtype == after.dtype
        ):
            continue
        with gm.graph.inserting_before(node):
            cast = gm.graph.call_function(CAST, (node.args[0], after.dtype))
        cast.meta = dict(node.meta)
        node.replace_all_uses_with(cast)
        gm.graph.erase_node(node)
        pinned += 1
    return pinned


def release_casts(gm: fx.GraphModule) -> int:
    """Turn `regate_fx::cast` into `aten._to_copy`, which has a derivative."""
    casts = gm.graph.find_nodes(op="call_function", target=CAST)
    for node in casts:
        source, dtype = node.args
        with gm.graph.inserting_before(node):
            copy = gm.graph.call_function(torch.ops.aten._to_copy.default, (source,), {"dtype": dtype})
        copy.meta = dict(node.meta)
        node.replace_all_uses_with(copy)
        gm.graph.erase_node(node)
    return len(casts)
