"""The three layouts of a token tensor, and the moves between them.

dense    B x S          as captured
packed   1 x N          one row per active position, sample after sample
compact  B x L          each sample's active positions first, empty slots behind (L = most active ones)

A tensor keeps the order of its dimensions in all three: only its B and S factors change their size. A move first
gives every factor a dimension of its own, then brings the token dimensions to the front, moves rows, and puts
everything back.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from regate_fx.passes.axes import REORDERED, Axes, Dim, Factor, Token, has_token
from regate_fx.passes.base import Refused, fake
from regate_fx.passes.emit import Emitter
from regate_fx.passes.plan_indices import PlanIndices, Size
from regate_fx.passes.plan_nodes import PlanNodes

aten = torch.ops.aten


class Layout(enum.Enum):
    DENSE = "dense"
    PACKED = "packed"
    COMPACT = "compact"


@dataclass(frozen=True)
class Sizes:
    """What B and S become in one layout, as nodes of the new graph."""

    batch: Size
    length: Size

    def of(self, factor: Factor) -> Size:
        if factor is Token.B:
            return self.batch
        if factor is Token.S:
            return self.length
        if isinstance(factor, int):
            return factor
        raise Refused("layout", f"a dimension of size {factor} cannot be laid out anew")


class Layouts:
    """Moves token tensors of one new graph between layouts. `plan` holds nodes of that graph.

    bucketed: the plan has rows that are no position's. Nothing reads them: their gradients are zero, and stay out of
    those of the position that they read.
    """

    def __init__(self, emit: Emitter, plan: PlanNodes, bucketed: bool = False) -> None:
        self._emit = emit
        self._plan = plan
        self._bucketed = bucketed
        self.indices = indices = PlanIndices(emit, plan, bucketed)
        self.sizes = {
            Layout.DENSE: Sizes(indices.batch, indices.length),
            Layout.PACKED: Sizes(1, indices.count),
            Layout.COMPACT: Sizes(emit.size(plan.slot_rows, 0), indices.slots),
        }

    # -- moves -----------------------------------------------------------------------------------------

    def gather(self, value: fx.Node, axes: Axes, consumer: Axes) -> fx.Node:
        """Dense to packed. A value without B is read by position; one without S by sample."""
        exploded, factors = self._explode(value, axes, Layout.DENSE)
        if axes.sequences > 1:
            raise Refused("layout", "a value over pairs of positions meets single token rows")
        if Token.S not in factors:
            return self._repeat_samples(value, axes, consumer)
        if Token.B in factors or self.sizes[Layout.DENSE].batch == 1:
            front, order = self._to_front(exploded, factors)
            rows = self._take(self._fold(front, factors), self.indices.rows, self.indices.row_of, True, False)
            return self._regroup(
                self._back(self._unfold(rows, factors, Layout.PACKED), order), axes, Layout.PACKED
            )
        picked = self._emit.call(
            aten.index_select.default, exploded, factors.index(Token.S), self.indices.positions
        )
        return self._regroup(picked, axes, Layout.PACKED)

    def scatter(self, value: fx.Node, axes: Axes, base: fx.Node) -> fx.Node:
        """Packed to dense; elided positions show `base` (dense), as a constant."""
        exploded, factors = self._explode(value, axes, Layout.PACKED)
        front, order = self._to_front(exploded, factors)
        rows = self._take(self._fold(front, factors), self.indices.row_of, self._plan.rows, False, True)
        dense = self._unfold(rows, factors, Layout.DENSE)
        scattered = self._regroup(self._back(dense, order), axes, Layout.DENSE)
        active = self._emit.call(aten.ge.Scalar, self._plan.row_of, 0)
        shown = self.align(active, axes, (Token.B, Token.S), Layout.DENSE)
        constant = self._emit.call(aten.detach.default, base)
        return self._emit.call(aten.where.self, shown, scattered, constant)

    def rearrange(self, value: fx.Node, held: Axes, axes: Axes) -> fx.Node:
        """A dense value of dims `held` with those of `axes`: states may come as [B, S, D] and run as [B*S, D]."""
        if held.dims == axes.dims:
            return value
        exploded, factors = self._explode(value, held, Layout.DENSE)
        features = iter([factor for factor in factors if isinstance(factor, tuple)])
        wanted: list[Factor | None] = []
        for dim in axes.dims:
            wanted.extend(dim if has_token(dim) else [next(features, None)])
        alike = [[dim for dim in each.dims if not has_token(dim)] for each in (held, axes)]
        if alike[0] != alike[1] or len(set(wanted)) < len(wanted) or set(wanted) != set(factors):
            raise Refused("layout", "what layers skip is not of the form of the states that they hand on")
        order = [factors.index(factor) for factor in wanted]
        return self._regroup(self._emit.call(aten.permute.default, exploded, order), axes, Layout.DENSE)

    def spread(self, value: fx.Node, axes: Axes) -> fx.Node:
        """Packed to compact. Empty slots repeat an active row of their sample: what is computed there stays finite.

        As queries they see what that row sees, as keys they score what it scores. No gradient comes back from them:
        they are left out of every sum over keys, and dropped as queries. One that is no number would come back.
        """
        exploded, factors = self._explode(value, axes, Layout.PACKED)
        if Token.S not in factors or axes.sequences > 1:
            raise Refused("layout", "only rows of tokens can be spread to slots")
        front, order = self._to_front(exploded, factors)
        slots = self._emit.call(aten.reshape.default, self.indices.filled_slots, [-1])
        slots = self._take(self._fold(front, factors), slots, self._plan.row_slots, True, True)
        spread = self._unfold(slots, factors, Layout.COMPACT)
        return self._regroup(self._back(spread, order), axes, Layout.COMPACT)

    def pack(self, value: fx.Node, axes: Axes) -> fx.Node:
        """Compact to packed."""
        exploded, factors = self._explode(value, axes, Layout.COMPACT)
        front, order = self._to_front(exploded, factors)
        rows = self._take(
            self._fold(front, factors), self.indices.row_slots, self.indices.slot_rows, True, False
        )
        packed = self._unfold(rows, factors, Layout.PACKED)
        return self._regroup(self._back(packed, order), axes, Layout.PACKED)

    def gather_pairs(self, value: fx.Node, axes: Axes, consumer: Axes) -> fx.Node:
        """Dense to compact, along every sequence axis the value has, at the original positions.

        A value without B gets one where the consumer, aligned from the right, has its own.
        """
        exploded, factors = self._explode(value, axes, Layout.DENSE)
        has_batch = Token.B in factors
        if axes.sequences == 0:
            return value
        front, order = self._to_front(exploded, factors)
        indices = self._slot_indices(axes.sequences, has_batch)
        picked = self._emit.call(aten.index.Tensor, front, indices)
        if has_batch:
            return self._regroup(self._back(picked, order), axes, Layout.COMPACT)
        restored = self._back(picked, [0, *(index + 1 for index in order)])
        return self._place_batch(restored, axes, consumer)

    def valid_at(self, axes: Axes, dim: int) -> fx.Node:
        """bool, broadcastable to a compact value of `axes`: which slots of its sequence axis `dim` hold a row."""
        single = Axes(tuple(d if Token.B in d or i == dim else () for i, d in enumerate(axes.dims)))
        return self.align(self.indices.slot_valid, single, (Token.B, Token.S), Layout.COMPACT)

    # -- the steps of a move -----------------------------------------------------------------------------

    def _explode(self, value: fx.Node, axes: Axes, layout: Layout) -> tuple[fx.Node, list[Factor]]:
        """Give every factor its own dimension."""
        if any(isinstance(factor, REORDERED) for factor in axes.factors):
            raise Refused("layout", "rows that were picked or sorted cannot be moved by their positions")
        factors: list[Factor] = []
        sizes: list[Size] = []
        for index, dim in enumerate(axes.dims):
            parts: Dim = dim if has_token(dim) else (1,)
            for factor in parts:
                factors.append(factor if has_token(dim) else ("feature", index))
                sizes.append(
                    self.sizes[layout].of(factor) if has_token(dim) else self._emit.size(value, index)
                )
        if all(len(dim) <= 1 for dim in axes.dims if has_token(dim)):
            return value, factors
        return self._emit.call(aten.reshape.default, value, sizes), factors

    def _regroup(self, value: fx.Node, axes: Axes, layout: Layout) -> fx.Node:
        """Undo `_explode`, in another layout."""
        if all(len(dim) <= 1 for dim in axes.dims if has_token(dim)):
            return value
        sizes: list[Size] = []
        position = 0
        for dim in axes.dims:
            width = len(dim) if has_token(dim) else 1
            parts = [self._emit.size(value, position + offset) for offset in range(width)]
            sizes.append(self._product(parts))
            position += width
        return self._emit.call(aten.reshape.default, value, sizes)

    def _product(self, sizes: Sequence[Size]) -> Size:
        result: Size = 1
        for size in sizes:
            if result == 1:
                result = size
            elif size != 1:
                result = (
                    result * size
                    if isinstance(result, int) and isinstance(size, int)
                    else self._emit.call(operator.mul, result, size)
                )
        return result

    def _to_front(self, value: fx.Node, factors: list[Factor]) -> tuple[fx.Node, list[int]]:
        """Bring B, then the sequence axes, to the front; the order returned undoes it."""
        tokens = [i for i, f in enumerate(factors) if f is Token.B]
        tokens += [i for i, f in enumerate(factors) if f is Token.S]
        forward = tokens + [i for i in range(len(factors)) if i not in tokens]
        order = [forward.index(index) for index in range(len(forward))]
        return self._back(value, forward), order

    def _back(self, value: fx.Node, order: list[int]) -> fx.Node:
        if order == list(range(len(order))):
            return value
        return self._emit.call(aten.permute.default, value, order)

    def _rest(self, value: fx.Node, first: int) -> list[Size]:
        return [self._emit.size(value, dim) for dim in range(first, len(fake(value).shape))]

    def _fold(self, value: fx.Node, factors: list[Factor]) -> fx.Node:
        """[B, S, ...] to [B*S, ...]; a value without B has its rows in front already."""
        if Token.B not in factors:
            return value
        return self._emit.call(aten.reshape.default, value, [-1, *self._rest(value, 2)])

    def _unfold(self, value: fx.Node, factors: list[Factor], layout: Layout) -> fx.Node:
        """Undo `_fold`, with the sizes of another layout."""
        if Token.B not in factors:
            return value
        sizes = self.sizes[layout]
        return self._emit.call(
            aten.reshape.default, value, [sizes.batch, sizes.length, *self._rest(value, 1)]
        )

    def _take(self, value: fx.Node, index: fx.Node, inverse: fx.Node, total: bool, back: bool) -> fx.Node:
        if not fake(value).dtype.is_floating_point and total:
            return self._emit.call(aten.index.Tensor, value, [index])
        if self._bucketed:
            # Rows of a bucket read what another row reads, so that no map can be written along: only read.
            total = back = False
        return self._emit.call(torch.ops.regate_fx.take_rows.default, value, index, inverse, total, back)

    def _repeat_samples(self, value: fx.Node, axes: Axes, consumer: Axes) -> fx.Node:
        """A value per sample, repeated for each of its rows where the consumer has its sequence axis."""
        offset = len(axes) - len(consumer)
        dims = list(axes.dims)
        length = next((i for i, dim in enumerate(consumer.dims) if dim == (Token.S,)), None)
        if (Token.B,) not in dims or length is None or length + offset < 0 or dims[length + offset] != ():
            raise Refused("layout", "a value per sample cannot be matched to token rows")
        batch, place = dims.index((Token.B,)), length + offset
        rows = self._emit.call(aten.index_select.default, value, batch, self.indices.samples)
        return self._emit.call(aten.transpose.int, rows, batch, place)

    def _slot_indices(self, sequences: int, has_batch: bool) -> list[fx.Node]:
        positions = self.indices.slot_positions
        if sequences == 1:
            slots = [positions]
        else:
            slots = [
                self._emit.call(aten.unsqueeze.default, positions, 2),
                self._emit.call(aten.unsqueeze.default, positions, 1),
            ]
        if not has_batch:
            return slots
        batch = self.sizes[Layout.COMPACT].batch
        samples = self._emit.call(aten.arange.default, batch, device=fake(positions).device)
        samples = self._emit.call(aten.reshape.default, samples, [-1] + [1] * sequences)
        return [samples, *slots]

    def _place_batch(self, value: fx.Node, axes: Axes, consumer: Axes) -> fx.Node:
        """`value` has a new leading B and then the dims of `axes`: put B where the consumer has it."""
        if self.sizes[Layout.COMPACT].batch == 1:
            return self._emit.call(aten.squeeze.dim, value, 0)
        target = next((i for i, dim in enumerate(consumer.dims) if Token.B in dim), None)
        if target is None or consumer.dims[target][0] is not Token.B:
            raise Refused("layout", "a value over positions meets one whose batch axis cannot be matched")
        others = consumer.dims[target][1:]
        place = target + len(axes) - len(consumer)
        if place >= 0 and axes.dims[place] != ():
            raise Refused("layout", "a value over positions has another axis where the batch belongs")
        shape = self._rest(value, 1)
        for _ in range(max(0, -place)):
            shape.insert(0, 1)
        place = max(place, 0)
        moved = self._emit.call(aten.reshape.default, value, [self._emit.size(value, 0), *shape])
        if place:
            order = [*range(1, place + 1), 0, *range(place + 1, len(shape) + 1)]
            moved = self._emit.call(aten.permute.default, moved, order)
        # B now stands at `place`, and the size-one dimension it replaces right behind it.
        if others:
            count = int(sympy.prod(others))
            sizes = [self._emit.size(moved, i) for i in range(len(fake(moved).shape))]
            sizes[place + 1] = count
            moved = self._emit.call(aten.expand.default, moved, sizes)
        return self._emit.call(aten.flatten.using_ints, moved, place, place + 1)

    def align(self, grid: fx.Node, axes: Axes, tokens: tuple[Token, Token], layout: Layout) -> fx.Node:
        """A [B, S]-shaped grid as a view that broadcasts to a value of `axes` in `layout`."""
        factors = [f for dim in axes.dims for f in (dim if has_token(dim) else (1,))]
        present = [f for f in factors if f in tokens]
        if Token.B not in present:
            grid = self._emit.call(aten.squeeze.dim, grid, 0)
        elif present == [Token.S, Token.B]:
            grid = self._emit.call(aten.transpose.int, grid, 0, 1)
        sizes: list[Size] = [self.sizes[layout].of(f) if f in tokens else 1 for f in factors]
        view = self._emit.call(aten.reshape.default, grid, sizes)
        if all(len(dim) <= 1 for dim in axes.dims if has_token(dim)):
            return view
        wide = [self.sizes[layout].of(f) if f in tokens or isinstance(f, int) else 1 for f in factors]
        return self._regroup(self._emit.call(aten.expand.default, view, wide), axes, layout)
