"""Named token axes: which dimensions of a tensor are batch, sequence, or made of both.

A dimension is a tuple of factors, outermost first. `[B, S, D]` is `((B,), (S,), (D,))`; flattened states
`[B*S, D]` are `((B, S), (D,))`; heads folded into the batch, `[B*H, S, d]`, are `((B, H), (S,), (d,))`; a
dimension of size one is `()`. The order of factors is what plain sizes cannot tell, so it is propagated.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar, cast

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils._sympy.functions import FloorDiv, Max

from regate_fx.passes.base import Refused

Found = TypeVar("Found")


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


@dataclass(frozen=True)
class TokenSymbols:
    """The sizes B and S as the capture knows them: symbols, or 1 where Dynamo specialised a size of one.

    `counts`: symbols for numbers of token rows that the capture reads from data.
    Where the capture learns that two symbols are equal it calls both by one name: names are asked for anew each time.
    What was computed of them is kept, as layers that are alike ask the same.
    """

    batch_size: int | torch.SymInt
    sequence_length: int | torch.SymInt
    counts: set[sympy.Symbol] = field(default_factory=set, compare=False)
    _known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def batch(self) -> sympy.Expr:
        return size_expr(self.batch_size)

    @property
    def length(self) -> sympy.Expr:
        return size_expr(self.sequence_length)

    def once(self, find: Callable[..., Found], *of: Any) -> Found:
        """`find(self, *of)`, computed once under the names that the symbols have; what it raises is not kept."""
        key = (find, of, self.batch, self.length)
        if key not in self._known:
            self._known[key] = find(self, *of)
        return cast(Found, self._known[key])

    def size(self, dim: Dim) -> sympy.Expr:
        """The size of a dimension as an expression over the capture's symbols."""
        return self.once(TokenSymbols._size, dim)

    def _size(self, dim: Dim) -> sympy.Expr:
        size = sympy.Integer(1)
        for factor in dim:
            size = size * self._factor_size(factor)
        return size

    def _factor_size(self, factor: Factor) -> sympy.Expr:
        match factor:
            case Token.B:
                return self.batch
            case Token.S:
                return self.length
            case Cut(head, tail):
                return self.length - head - tail
            case Sorted(of=of):
                return self.size(of)
            case Picked(size=size) | Group(size=size):
                return size
        return sympy.sympify(factor)

    def is_size(self, dim: Dim, size: Any) -> bool:
        """Whether a dimension has a size. One read from data may be known to be it by what the capture asserts."""
        expr, wanted = self.size(dim), size_expr(size)
        if expr == wanted or sympy.expand(expr - wanted) == 0:
            return True
        if not free_unbacked_symbols(size) or (known := self._measured(dim)) is None:
            return False
        return statically_known_true(size == known)

    def _measured(self, dim: Dim) -> Any:
        """The size of a dimension as a number of the capture; None where it is none of the token axes' sizes."""
        measured: Any = 1
        for factor in dim:
            match factor:
                case Token.B:
                    size: Any = self.batch_size
                case Token.S:
                    size = self.sequence_length
                case Sorted(of=of):
                    size = self._measured(of)
                case int():
                    size = factor
                case _:
                    size = None
            if size is None:
                return None
            measured = measured * size
        return measured

    def mentions(self, expr: sympy.Expr) -> bool:
        return bool(expr.free_symbols & (self.batch.free_symbols | self.length.free_symbols))

    def dim_of_size(self, size: Any) -> Dim:
        """The factors of a size on its own, batch before sequence before the rest; `Refused` if it has none."""
        expr = size_expr(size)
        if expr == 1:
            return ()
        if expr.is_Integer:
            return (int(expr),)
        if not self.counts.isdisjoint(expr.free_symbols):
            raise Refused("axis", f"a dimension is as long as tokens were picked ({expr})")
        try:
            return self.once(TokenSymbols._factors, expr)
        except Refused:
            # `max(0, longest - S)` left out of a table of `longest` positions: S by a guard of the capture.
            if expr.has(sympy.Max, Max) and (guarded := self._guarded_to_be(size)) is not None:
                return (guarded,)
            raise

    def _factors(self, expr: sympy.Expr) -> Dim:
        if not self.mentions(expr):
            return (expr,)
        rest = expr
        dim: list[Factor] = []
        for token, symbol in ((Token.B, self.batch), (Token.S, self.length)):
            if symbol.free_symbols and symbol.free_symbols <= rest.free_symbols:
                quotient = sympy.cancel(rest / symbol)
                if not (quotient.free_symbols & symbol.free_symbols) and quotient.is_polynomial():
                    dim.append(token)
                    rest = quotient
        if self.mentions(rest):
            raise Refused("axis", f"a dimension of size {expr} is no multiple of the token axes")
        return canonical((*dim, int(rest) if rest.is_Integer else rest))

    def _guarded_to_be(self, size: torch.SymInt) -> Token | None:
        """The token axis whose size the capture's guards make equal to `size`."""
        axes = ((Token.B, self.batch_size), (Token.S, self.sequence_length))
        return next((token for token, length in axes if statically_known_true(size == length)), None)

    def axes_of_shape(self, shape: Sequence[Any]) -> Axes:
        return Axes(tuple(self.dim_of_size(size) for size in shape))


def size_expr(size: Any) -> sympy.Expr:
    """A size as an expression, without divisions that leave no remainder."""
    if not isinstance(size, torch.SymInt):
        return sympy.Integer(int(size))
    expr = size.node.expr
    return expr if expr.is_Symbol else expr.replace(FloorDiv, _divided)


def _divided(total: sympy.Expr, part: sympy.Expr) -> sympy.Expr:
    quotient = sympy.cancel(total / part)
    leaves_none = quotient.is_polynomial() and quotient.as_numer_denom()[1] == 1
    return quotient if leaves_none else FloorDiv(total, part)


def note_counts(symbols: TokenSymbols, size: Any) -> sympy.Expr:
    """A size that is a number of token rows, as an expression whose symbols are from now on known to be such."""
    symbols.counts.update(free_unbacked_symbols(size))
    return size_expr(size)


def reshape(dims: Sequence[Dim], shape: Sequence[Any], symbols: TokenSymbols) -> tuple[Dim, ...]:
    """The dims after a view to `shape`: factors keep their order and are only regrouped or split.

    Raises `Refused` where the new shape would cut through a token axis.
    """
    return symbols.once(_regrouped, tuple(dims), tuple(map(size_expr, shape)))


def _regrouped(
    symbols: TokenSymbols, dims: tuple[Dim, ...], sizes: tuple[sympy.Expr, ...]
) -> tuple[Dim, ...]:
    factors = [factor for dim in dims for factor in dim]
    result: list[Dim] = []
    for wanted in sizes:
        taken: list[Factor] = []
        while (have := symbols.size(tuple(taken))) != wanted:
            if not factors:
                raise Refused("view", f"a view to size {wanted} regroups a token axis")
            factor = factors.pop(0)
            missing = sympy.cancel(wanted / have)
            if isinstance(factor, int) and missing.is_Integer and factor != missing and factor % missing == 0:
                taken.append(int(missing))
                factors.insert(0, factor // int(missing))
            elif isinstance(factor, int) and not missing.is_Integer and not _divides(factor, missing):
                raise Refused("view", f"a view to size {wanted} regroups a token axis")
            else:
                taken.append(factor)
        result.append(canonical(tuple(taken)))
    if any(factor != 1 for factor in factors):
        raise Refused("view", "a view drops part of a token axis")
    return tuple(result)


def _divides(factor: int, size: sympy.Expr) -> bool:
    coefficient = size.as_coeff_Mul()[0]
    return bool(coefficient.is_Integer and coefficient % factor == 0)


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
