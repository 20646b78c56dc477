"""Named token axes: which dimensions of a tensor are batch, sequence, or made of both.

A dimension is a tuple of factors, outermost first. `[B, S, D]` is `((B,), (S,), (D,))`; flattened states
`[B*S, D]` are `((B, S), (D,))`; heads folded into the batch, `[B*H, S, d]`, are `((B, H), (S,), (d,))`; a
dimension of size one is `()`. The order of factors is what plain sizes cannot tell, so it is propagated.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy

from regate_fx.passes.base import Refused


class Token(enum.Enum):
    """The two token axes."""

    B = "B"
    S = "S"


@dataclass(frozen=True)
class Cut:
    """The sequence axis without its first `head` and last `tail` positions (shifted logits or labels)."""

    head: int
    tail: int


@dataclass(frozen=True)
class Sorted:
    """The row axis `of`, reordered by the expert ids that `ids` names (mixture-of-experts dispatch).

    `key` names the order: another sort of the same ids may put rows of one expert in another.
    """

    of: tuple[Any, ...]
    key: str
    ids: str


@dataclass(frozen=True)
class Picked:
    """Those rows of the row axis `of`, in their order, that the condition named by `key` holds for: `size` of them."""

    of: tuple[Any, ...]
    key: str
    size: sympy.Expr


@dataclass(frozen=True)
class Group:
    """The `index`-th of `groups` groups that the sorted row axis `of` falls into, with `size` rows."""

    of: tuple[Any, ...]
    index: int
    groups: int
    size: sympy.Expr


Factor: TypeAlias = Token | Cut | Sorted | Picked | Group | int | sympy.Expr
Dim: TypeAlias = tuple[Factor, ...]
REORDERED = (Sorted, Picked, Group)  # row axes made of others


class Meaning(enum.Enum):
    """What the values of an integer tensor say about rows, where that is known."""

    ARANGE = "0, 1, 2, ... along its only axis"
    SORTED_IDS = "expert ids in sorted order"
    PERMUTATION = "for each row of the sorted axis, the row of the original axis it came from"
    ROW_OF_SORTED = "for each row of the sorted axis, a row of the token axis"
    INVERSE = "for each row of the original axis, its place on the sorted axis"
    PLACES = "for each picked row, its place along an axis of what it was picked from"
    UNFOLLOWED = "row numbers in a form that says no longer which rows"
    ONE_HOT = "for each row, one at its expert's id and zero elsewhere"
    COUNTS = "rows per expert"
    OFFSETS = "end of each expert's rows on the sorted axis"


# Values that number rows: in a layout of other rows they are other numbers.
NUMBERING = {
    Meaning.PERMUTATION, Meaning.ROW_OF_SORTED, Meaning.INVERSE, Meaning.PLACES, Meaning.UNFOLLOWED,
}  # fmt: skip


@dataclass(frozen=True)
class Axes:
    """The axes of one tensor.

    `meaning`, with `key` for the dispatch it belongs to, is set where values are row numbers or counts of rows.
    `aggregate`: the value sums over token rows, so it must never flow back into single rows. `along`: of places, the
    axis that each column numbers.
    """

    dims: tuple[Dim, ...]
    meaning: Meaning | None = None
    key: str = ""
    aggregate: bool = False
    along: tuple[Dim, ...] = ()

    def __iter__(self) -> Iterator[Dim]:
        return iter(self.dims)

    def __len__(self) -> int:
        return len(self.dims)

    @functools.cached_property
    def factors(self) -> tuple[Factor, ...]:
        return tuple(factor for dim in self.dims for factor in dim)

    @functools.cached_property
    def sequences(self) -> int:
        """How many sequence axes there are: 1 for states, 2 for anything over (query, key) pairs."""
        return sum(is_sequence(factor) for factor in self.factors)

    @functools.cached_property
    def has_batch(self) -> bool:
        return Token.B in token_factors(self.factors)

    @functools.cached_property
    def has_tokens(self) -> bool:
        return any(has_token(dim) for dim in self.dims)

    def with_dims(self, dims: Sequence[Dim]) -> Axes:
        """The axes of what an operator makes of these values. Of row numbers it makes what is no longer followed."""
        new = tuple(canonical(dim) for dim in dims)
        meaning = Meaning.UNFOLLOWED if self.meaning in NUMBERING else None
        return replace(self, dims=new, meaning=meaning, key="", along=())

    def viewed(self, dims: Sequence[Dim]) -> Axes:
        """The same values, in their order, over other dims: row numbers stay known where dims of one come or go."""
        new = tuple(canonical(dim) for dim in dims)
        is_numbering = self.meaning in NUMBERING
        if is_numbering and [dim for dim in new if dim] == [dim for dim in self.dims if dim]:
            return replace(self, dims=new)
        return self.with_dims(new)


NO_AXES = Axes(())


def is_sequence(factor: Factor) -> bool:
    if isinstance(factor, REORDERED):
        return any(is_sequence(inner) for inner in factor.of)
    return factor is Token.S or isinstance(factor, Cut)


def token_factors(dim: Sequence[Factor]) -> list[Factor]:
    """The token axes that a dimension is made of, in their order."""
    found: list[Factor] = []
    for factor in dim:
        if isinstance(factor, REORDERED):
            found.extend(token_factors(factor.of))
        elif has_token((factor,)):
            found.append(factor)
    return found


def has_token(dim: Dim) -> bool:
    return any(not isinstance(factor, (int, sympy.Expr)) for factor in dim)


def canonical(dim: Dim) -> Dim:
    """Drop factors of one, multiply neighbouring constants."""
    merged: list[Factor] = []
    for factor in dim:
        if factor == 1:
            continue
        if isinstance(factor, int) and merged and isinstance(merged[-1], int):
            merged[-1] = merged[-1] * factor
        else:
            merged.append(factor)
    return tuple(merged)


def merge(operands: Sequence[Axes], what: str) -> tuple[Dim, ...]:
    """Broadcast: align from the right; where two operands both have an axis, it must be the same one."""
    rank = max((len(axes) for axes in operands), default=0)
    merged: list[Dim] = []
    for position in range(rank):
        dims = [
            axes.dims[position - rank + len(axes)] for axes in operands if position - rank + len(axes) >= 0
        ]
        present = {dim for dim in dims if dim != ()}
        if len(present) > 1:
            raise Refused("broadcast", f"{what} pairs different axes: {sorted(map(str, present))}")
        merged.append(present.pop() if present else ())
    return tuple(merged)
