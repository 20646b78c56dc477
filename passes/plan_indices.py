"""Index tensors that the moves between layouts need, written into a new graph once each.

Shapes: B samples, S positions, N packed rows, L slots of a sample.
"""

from __future__ import annotations

from functools import cached_property
from typing import TypeAlias

import torch
from torch import fx

from regate_fx.passes.emit import Emitter
from regate_fx.passes.plan_nodes import PlanNodes

aten = torch.ops.aten
Size: TypeAlias = fx.Node | int


class PlanIndices:
    """What follows from the tensors of a plan, whose nodes `plan` holds.

    bucketed: the plan has rows that are no position's. They read what the first row reads, so that what is computed of
    them is as finite as the rest.
    """

    def __init__(self, emit: Emitter, plan: PlanNodes, bucketed: bool) -> None:
        self._emit = emit
        self._plan = plan
        self._bucketed = bucketed
        self.batch, self.length = emit.size(plan.row_of, 0), emit.size(plan.row_of, 1)
        self.count, self.slots = emit.size(plan.rows, 0), emit.size(plan.slot_rows, 1)

    @property
    def cu_seqlens(self) -> fx.Node:
        """int32 [B+1]: the row at which each sample starts; with one more sample in a bucket."""
        return self._plan.cu_seqlens

    # -- of packed rows --------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> fx.Node:
        """int64 [N]: the flat position that each row reads."""
        return self._reading(self._plan.rows)

    @cached_property
    def row_slots(self) -> fx.Node:
        """int64 [N]: the flat slot that each row reads."""
        return self._reading(self._plan.row_slots)

    @cached_property
    def held(self) -> fx.Node | None:
        """bool [N]: which rows are a position's; None where all are."""
        return self._emit.call(aten.ge.Scalar, self._plan.rows, 0) if self._bucketed else None

    @cached_property
    def positions(self) -> fx.Node:
        """int64 [N]: original position of every row."""
        return self._emit.call(aten.remainder.Scalar, self.rows, self.length)

    @cached_property
    def samples(self) -> fx.Node:
        """int64 [N]: sample of every row."""
        return self._emit.call(aten.floor_divide.Scalar, self.rows, self.length)

    # -- of positions ----------------------------------------------------------------------------------

    @cached_property
    def row_of(self) -> fx.Node:
        """int64 [B*S]: packed row of every position, -1 where elided."""
        return self._flat(self._plan.row_of)

    # -- of slots --------------------------------------------------------------------------------------

    @cached_property
    def slot_rows(self) -> fx.Node:
        """int64 [B*L]: packed row of every slot, -1 where empty."""
        return self._flat(self._plan.slot_rows)

    @cached_property
    def filled_slots(self) -> fx.Node:
        """int64 [B, L]: packed row of every slot; where empty that of the sample's first, or of any if it has none."""
        last = -2 if self._bucketed else -1
        firsts = self._emit.call(aten.slice.Tensor, self._plan.cu_seqlens, 0, 0, last)
        firsts = self._emit.call(aten.remainder.Scalar, firsts, self.count)
        firsts = self._emit.call(aten._to_copy.default, firsts, dtype=torch.int64)
        firsts = self._emit.call(aten.unsqueeze.default, firsts, 1)
        return self._emit.call(aten.where.self, self._is_held, self._plan.slot_rows, firsts)

    @cached_property
    def slot_valid(self) -> fx.Node:
        """bool [B, L]: which slots are keys: those that hold a row; in a sample without any, which nobody reads, all.

        What is computed over no key at all may be infinite, and its gradient no number.
        """
        some = self._emit.call(aten.any.dim, self._is_held, 1, True)
        none = self._emit.call(aten.logical_not.default, some)
        return self._emit.call(aten.logical_or.default, self._is_held, none)

    @cached_property
    def slot_positions(self) -> fx.Node:
        """int64 [B, L]: original position of every slot's row."""
        return self._emit.call(aten.index.Tensor, self.positions, [self.filled_slots])

    @cached_property
    def _is_held(self) -> fx.Node:
        return self._emit.call(aten.ge.Scalar, self._plan.slot_rows, 0)

    def _reading(self, index: fx.Node) -> fx.Node:
        if not self._bucketed:
            return index
        first = self._emit.call(aten.slice.Tensor, index, 0, 0, 1)
        is_held = self._emit.call(aten.ge.Scalar, index, 0)
        return self._emit.call(aten.where.self, is_held, index, first)

    def _flat(self, node: fx.Node) -> fx.Node:
        return self._emit.call(aten.reshape.default, node, [-1])
