"""Turn `states[mask] += features` into the addition of a tensor that has zeros elsewhere.

Which rows a mask picks depends on data, and no analysis of axes follows rows by number. What is added to them does
not depend on the states, so it can be laid out over all positions before it meets them.

Shapes: B samples, S positions, D hidden size, M positions in the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regate_fx.passes.base import PassContext, PassResult, fake, fake_mode_of, is_tensor, operator_name
from regate_fx.passes.emit import Emitter
from regate_fx.passes.numbers import ASSERT

aten = torch.ops.aten


@dataclass(frozen=True)
class AddMaskedRows:
    """`index_put(states, [mask], index(states, [mask]) + features)` becomes `states + scattered`.

    states: [B, S, D], mask: bool [B, S], features: [M, D]. Any other use of rows picked by a mask is left alone.
    """

    name: str = "add_masked_rows"
    after: tuple[str, ...] = ("open_brackets",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        rewrites = 0
        for node in gm.graph.find_nodes(op="call_function", target=aten.index_put.default):
            features = _added(node)
            if features is not None:
                _rewrite(gm, node, features)
                rewrites += 1
        return PassResult(gm, rewrites)


def _added(put: fx.Node) -> fx.Node | None:
    """The features that `put` adds to the very rows it writes, if that is what it does."""
    states, places, rows = put.args[:3]
    accumulates = put.args[3] if len(put.args) > 3 else put.kwargs.get("accumulate", False)
    mask = _only_mask(places)
    if accumulates or mask is None or not isinstance(rows, fx.Node) or not _is_plain_sum(rows):
        return None
    for picked, features in (rows.args[:2], rows.args[1::-1]):
        if (
            not isinstance(picked, fx.Node)
            or picked.target is not aten.index.Tensor
            or not is_tensor(features)
        ):
            continue
        if picked.args[0] is states and _only_mask(picked.args[1]) is mask and _are_rows(features, put):
            return features
    return None


def _only_mask(places: Any) -> fx.Node | None:
    """The mask, where an index is one bool mask over the first two dimensions."""
    used = [place for place in places if place is not None]
    if len(used) != 1 or places[0] is not used[0]:
        return None
    value = fake(used[0])
    return used[0] if value.dtype is torch.bool and value.dim() == 2 else None


def _is_plain_sum(node: fx.Node) -> bool:
    return operator_name(node) == "aten.add" and len(node.args) == 2 and node.kwargs.get("alpha", 1) == 1


def _are_rows(features: fx.Node, put: fx.Node) -> bool:
    """[M, D] of the states' own dtype, so that nothing is broadcast or rounded."""
    states, value = fake(put), fake(features)
    return states.dim() == 3 and value.dim() == 2 and value.dtype == states.dtype


def _rewrite(gm: fx.GraphModule, put: fx.Node, features: fx.Node) -> None:
    states, mask = put.args[0], _only_mask(put.args[1])
    assert isinstance(states, fx.Node) and isinstance(mask, fx.Node)
    emit = Emitter(gm.graph, fake_mode_of(gm))
    value = fake(states)
    with emit.like(put), gm.graph.inserting_before(put):
        # The capture took the number of picked rows for that of the features.
        count = emit.call(aten.eq.Scalar, emit.call(aten.sum.default, mask), emit.size(features, 0))
        emit.call(ASSERT, count, f"assertion failed: {mask.name} has as many positions as features")
        sizes = [emit.size(states, dim) for dim in range(3)]
        zeros = emit.call(aten.zeros.default, sizes, dtype=value.dtype, device=value.device)
        places = emit.call(aten.unsqueeze.default, mask, 2)
        scattered = emit.call(aten.masked_scatter.default, zeros, places, features)
        total = emit.call(aten.add.Tensor, states, scattered)
    put.replace_all_uses_with(total)
    rows = put.args[2]
    gm.graph.erase_node(put)
    _erase_unused(gm, rows)


def _erase_unused(gm: fx.GraphModule, node: Any) -> None:
    """The picked rows, if nothing else reads them: their operator would count as one that is not proven."""
    if not isinstance(node, fx.Node) or node.users or operator_name(node) not in ("aten.add", "aten.index"):
        return
    sources = node.all_input_nodes
    gm.graph.erase_node(node)
    for source in sources:
        _erase_unused(gm, source)
