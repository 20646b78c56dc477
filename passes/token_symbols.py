"""Sizes of named axes: from the capture's symbols to axes, and from axes to sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils._sympy.functions import FloorDiv, Max

from regate_fx.passes.axes import Axes, Cut, Dim, Factor, Group, Picked, Sorted, Token, canonical
from regate_fx.passes.base import Refused

Found = TypeVar("Found")


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

    def fit(self, dims: tuple[Dim, ...], shape: Sequence[Any]) -> bool:
        """Whether dimensions have the sizes of a shape."""
        if len(dims) != len(shape):
            return False
        return self.once(_multiply_to, dims, tuple(map(size_expr, shape))) or all(
            map(self.is_size, dims, shape)
        )

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


def _multiply_to(symbols: TokenSymbols, dims: tuple[Dim, ...], sizes: tuple[sympy.Expr, ...]) -> bool:
    return all(symbols.size(dim) == size for dim, size in zip(dims, sizes, strict=True))


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
