"""Numbers that a graph reads from tensors (`item`), and what the model asserts of them.

A model that compares the number of image positions with that of image features asserts a number to be true. The
capture then takes the number for the constant, and normalisation drops the assert as proven by itself.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from regate_fx.passes.base import Refused

ASSERT = torch.ops.aten._assert_async.msg


def pin_numbers(gm: fx.GraphModule) -> int:
    """Assert in a Dynamo graph, on the tensor itself, each number that the capture replaced by a constant.

    Returns how many. Raises `Refused` where it was replaced by an expression over sizes.
    """
    nodes = gm.graph.find_nodes(op="call_method", target="item")
    pinned = 0
    for node in nodes:
        number = node.meta.get("example_value")
        if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            continue
        known = _learned(number)
        if known is None:
            continue
        _assert_equal(gm, node, known)
        pinned += 1
    return pinned


def _learned(number: Any) -> Any:
    """The constant that stands for a number that was read; None where it is unknown."""
    read, known = number.node._expr, number.node.expr
    if read == known:
        return None
    if known in (sympy.true, sympy.false):
        return bool(known)
    if not known.is_number:
        raise Refused("number", f"a number read from a tensor is asserted to be the size {known}")
    return int(known) if known.is_Integer else float(known)


def _assert_equal(gm: fx.GraphModule, node: fx.Node, known: int | float) -> None:
    (tensor,) = node.args
    assert isinstance(tensor, fx.Node)
    with gm.graph.inserting_after(node):
        equal = gm.graph.call_function(torch.eq, (tensor, known))
    with gm.graph.inserting_after(equal):
        check = gm.graph.call_function(ASSERT, (equal, f"assertion failed: {tensor.name} == {known}"))
    equal.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
    check.meta = dict(equal.meta)
    equal.meta["example_value"] = tensor.meta["example_value"] == known
