"""Write the loss for the active rows, and fill the two outputs that the plan's anchor stands for.

Which label a logits row is paired with is read from the graph: the code that turned `labels` into the loss
operator's targets is run once more on label indices. It must only move labels about, and is refused otherwise.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from regate_fx.passes.axes import Axes, Cut, Token
from regate_fx.passes.base import Refused, fake, is_tensor, operator_name
from regate_fx.passes.layouts import Layout
from regate_fx.passes.plan_nodes import made_from
from regate_fx.passes.rules import Operands

if TYPE_CHECKING:
    from regate_fx.passes.elide import Rewriter

aten = torch.ops.aten

# Operators that move labels, or put something in their place, without looking at them.
_MOVES = {
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach",
    "aten.slice", "aten.pad", "aten.constant_pad_nd", "aten.unsqueeze", "aten.squeeze", "aten.flatten",
    "aten._to_copy", "aten.to", "aten.roll", "aten.cat", "aten.new_full", "aten.full", "aten.full_like",
    "aten.lift_fresh_copy", "aten.select", "aten.slice_scatter", "aten.select_scatter", "aten.expand",
    "aten.expand_as", "aten.fill", "aten.masked_fill", "aten.where",
}  # fmt: skip
# Those of them that choose by a mask, which must not be made of labels, and the place of that mask.
_MASKS = {"aten.masked_fill": 1, "aten.where": 0}


# Larger than any batch; twice as much plus a batch still fits int32, to which a model may cast its labels.
_FIRST = 2**29


@dataclass
class LossRewrite:
    """What the loss of the active rows leaves for the outputs.

    nll: float [N], negative log-likelihood of each row's label, 0 where not counted. label: int64 [N], flat
    index `b * S + t` of that label. valid: bool [N], whether it counts and is one of the caller's.
    """

    nll: fx.Node | None = None
    label: fx.Node | None = None
    valid: fx.Node | None = None
    token_loss: fx.Node | None = None
    counted: fx.Node | None = None

    def emit_slots(self, rewriter: Rewriter) -> None:
        """token_loss, float32 [B, S], and counted, bool [B, S], at label positions; zero and False elsewhere."""
        if self.nll is None:
            return
        emit, plan = rewriter.emit, rewriter.layouts.indices.row_of
        spare = emit.size(plan, 0)
        slots = emit.call(aten.new_zeros.default, plan, [_plus_one(rewriter, spare)], dtype=torch.float32)
        place = emit.call(aten.where.self, self.valid, self.label, _full(rewriter, self.label, spare))
        nll = emit.call(aten._to_copy.default, emit.call(aten.detach.default, self.nll), dtype=torch.float32)
        written = emit.call(aten.index_put.default, slots, [place], nll)
        flags = emit.call(aten._to_copy.default, slots, dtype=torch.bool)
        marked = emit.call(aten.index_put.default, flags, [place], self.valid)
        self.token_loss, self.counted = (_grid(rewriter, flat) for flat in (written, marked))


def _plus_one(rewriter: Rewriter, size: fx.Node | int) -> fx.Node | int:
    return size + 1 if isinstance(size, int) else rewriter.emit.call(operator.add, size, 1)


def _full(rewriter: Rewriter, like: fx.Node | None, value: fx.Node | int) -> fx.Node:
    """`like` filled with a size; a size may be symbolic, a fill value of `full_like` may not."""
    zeros = rewriter.emit.call(aten.zeros_like.default, like)
    return rewriter.emit.call(aten.add.Scalar, zeros, value)


def _grid(rewriter: Rewriter, flat: fx.Node) -> fx.Node:
    sizes = rewriter.layouts.sizes[Layout.DENSE]
    kept = rewriter.emit.call(aten.slice.Tensor, flat, 0, 0, -1)
    return rewriter.emit.call(aten.reshape.default, kept, [sizes.batch, sizes.length])


def emit_loss(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """Cross entropy over the N active rows: the mean over counted labels, or their sum.

    Without any counted label the loss is 0 with zero gradients.
    """
    if rewriter.loss.nll is not None:
        raise Refused("loss", "the model adds up several cross-entropy losses", node)
    op = Operands(node, rewriter.analysis.axes, rewriter.symbols)
    emit, loss = rewriter.emit, rewriter.loss
    logits = rewriter.value(op["self"], Layout.PACKED)
    ignore = op["ignore_index"]
    target = _targets(rewriter, op, rewriter.value(op["target"], Layout.DENSE), ignore)
    counts = emit.call(aten.ne.Scalar, target, ignore)
    # A number the model puts in place of a label comes out of both replays alike, a label's index moves along.
    low, high = (
        _targets(rewriter, op, _replayed(rewriter, op["target"], node, first), ignore)
        for first in (_FIRST, 2 * _FIRST)
    )
    moved = emit.call(aten.eq.Scalar, emit.call(aten.sub.Tensor, high, low), _FIRST)
    loss.label = emit.call(aten.sub.Scalar, low, _FIRST)
    loss.valid = emit.call(aten.logical_and.default, counts, moved)
    loss.nll = emit.call(aten.cross_entropy_loss.default, logits, target, None, 0, ignore)
    total = emit.call(aten.sum.default, loss.nll)
    if op["reduction"] == 2:
        return total
    count = emit.call(aten.clamp.default, emit.call(aten.sum.default, counts), 1)
    return emit.call(aten.div.Tensor, total, count)


def _targets(rewriter: Rewriter, op: Operands, values: fx.Node, filler: int) -> fx.Node:
    """One entry per active row from a dense [B * S'] tensor; rows that were cut from the logits get `filler`."""
    emit, sizes = rewriter.emit, rewriter.layouts.sizes[Layout.DENSE]
    axes: Axes = op.axes("self")
    factors = [factor for factor in axes.dims[0] if factor is not Token.B]
    if len(factors) != 1 or (Token.B in axes.dims[0] and axes.dims[0][0] is not Token.B):
        raise Refused("loss", "orders the rows of the logits in an unknown way", op.node)
    cut = factors[0]
    if isinstance(cut, Cut):
        shorter = emit.call(aten.reshape.default, values, [sizes.batch, -1])
        values = emit.call(aten.constant_pad_nd.default, shorter, [cut.head, cut.tail], filler)
        values = emit.call(aten.reshape.default, values, [-1])
    targets = emit.call(aten.index.Tensor, values, [rewriter.layouts.indices.rows])
    held = rewriter.layouts.indices.held
    return targets if held is None else emit.call(aten.where.ScalarOther, held, targets, filler)


def _replayed(rewriter: Rewriter, target: fx.Node, loss: fx.Node, first: int) -> fx.Node:
    """The loss operator's targets for labels numbered `first, first + 1, ...` in flat order."""
    labels = rewriter.plan.labels
    if labels is None:
        raise Refused("loss", "computes a loss from something else than `labels`", loss)
    grid = rewriter.layouts.indices.row_of
    emit, sizes = rewriter.emit, rewriter.layouts.sizes[Layout.DENSE]
    index = emit.call(aten.arange.default, emit.size(grid, 0), device=fake(grid).device)
    index = emit.call(aten.add.Scalar, index, first)
    index = emit.call(aten.reshape.default, index, [sizes.batch, sizes.length])
    replayed: dict[fx.Node, fx.Node] = {labels: index}
    from_labels = made_from(labels)

    def replay(node: fx.Node) -> Any:
        if node in replayed:
            return replayed[node]
        if not is_tensor(node):
            return rewriter.symint(node, Layout.DENSE)
        if node.op != "call_function" or node not in from_labels:
            return rewriter.value(node, Layout.DENSE)
        name = operator_name(node)
        if name not in _MOVES or (name in _MASKS and node.args[_MASKS[name]] in from_labels):
            raise Refused("loss", f"{name} changes the labels before the loss", node)
        with emit.like(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), replay)
            replayed[node] = emit.call(node.target, *args, **kwargs)
        return replayed[node]

    if target not in from_labels:
        raise Refused("loss", "computes a loss from something else than `labels`", loss)
    return replay(target)
