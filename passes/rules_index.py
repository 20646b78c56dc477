"""Rules for table look-ups, and for what reads or writes token rows by number.

A row number is followed from where it was made (`rules_dispatch`): which rows it numbers has to be known, and that the
value at a place of the picked or sorted axis belongs to the very token it is taken from or written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from regate_fx.passes.axes import (
    Axes,
    Dim,
    Meaning,
    Picked,
    Sorted,
    canonical,
    has_token,
    merge,
    token_factors,
)
from regate_fx.passes.base import fake, operator_name
from regate_fx.passes.rules import Operands, Verdict, kind_of, rule
from regate_fx.passes.rules_dispatch import picked_rows

_CONDITIONS = (torch.bool, torch.uint8)
_MADE = {"aten.empty_like", "aten.zeros_like"}


@rule("aten.embedding")
def _embedding(op: Operands) -> Verdict:
    if op.axes("weight").has_tokens:
        raise op.refuse("mixes-tokens", "looks up rows of a token tensor")
    axes = op.axes("indices")
    result = axes.with_dims([*axes.dims, op.symbols.dim_of_size(op.shape[-1])])
    return Verdict(result, kind_of(result))


@rule("aten.index")
def _index(op: Operands) -> Verdict:
    axes = op.axes("self")
    first, indices = _indices(op)
    if fake(indices[0]).dtype in _CONDITIONS:
        rows = picked_rows(op, indices[0], op.shape[first])
        after = _rest(op, axes, first, op.axes(indices[0]).dims)
        return Verdict(axes.with_dims([*axes.dims[:first], (rows,), *after]), reads_numbers=True)
    picks = [op.axes(index) for index in indices]
    dims = axes.dims[first : first + len(picks)]
    merged = merge(picks, "aten.index")
    result = axes.with_dims([*axes.dims[:first], *merged, *axes.dims[first + len(picks) :]])
    if not any(map(has_token, dims)):
        return Verdict(result, kind_of(result))
    _rest(op, axes, first, dims)
    if not _number_rows(picks, dims):
        raise op.refuse("mixes-tokens", "picks rows of a token axis by numbers of unknown meaning")
    if picks[0].meaning is Meaning.PERMUTATION and len(axes) == 1:
        (factor,) = picks[0].dims[0]
        assert isinstance(factor, Sorted)
        if op.key(op["self"]) == factor.ids:
            result = replace(result, meaning=Meaning.SORTED_IDS, key=factor.ids)
    return Verdict(result, reads_numbers=True)


@rule("aten.index_select")
def _index_select(op: Operands) -> Verdict:
    axes, pick = op.axes("self"), op.axes("index")
    dim = op.dim(op["dim"], axes)
    result = axes.with_dims([*axes.dims[:dim], *pick.dims, *axes.dims[dim + 1 :]])
    if not has_token(axes.dims[dim]):
        return Verdict(result, kind_of(result))
    _rest(op, axes, dim, axes.dims[dim : dim + 1])
    if not _number_rows([pick], axes.dims[dim : dim + 1]):
        raise op.refuse("mixes-tokens", "picks rows of a token axis by numbers of unknown meaning")
    return Verdict(result, reads_numbers=True)


@rule("aten.index_put")
def _index_put(op: Operands) -> Verdict:
    base = op.axes("self")
    first, indices = _indices(op)
    accumulates = op._arguments.get("accumulate", False)
    if fake(indices[0]).dtype in _CONDITIONS:
        dims = op.axes(indices[0]).dims
        values = op.axes("values")
        rows: Dim = next((dim for dim in values.dims if _are_picked_by(dim, indices[0], op)), ())
        return _written(op, base, first, dims, [rows], values)
    picks = [op.axes(index) for index in indices]
    if picks[0].meaning is Meaning.PERMUTATION and op.axes("values").meaning is Meaning.ARANGE:
        return _inverse(op, base, picks[0])
    if picks[0].meaning is Meaning.PERMUTATION and first == 0:
        base = _made_for(op, base, picks[0])
    dims = base.dims[first : first + len(picks)]
    if not _number_rows(picks, dims) or (picks[0].meaning is Meaning.ROW_OF_SORTED and not accumulates):
        raise op.refuse("mixes-tokens", "writes to rows of a token axis by number")
    return _written(op, base, first, dims, merge(picks, "aten.index_put"), op.axes("values"))


@rule("aten.index_add")
def _index_add(op: Operands) -> Verdict:
    base, pick = op.axes("self"), op.axes("index")
    dim = op.dim(op["dim"], base)
    dims = base.dims[dim : dim + 1]
    if not any(map(has_token, dims)) or not _number_rows([pick], dims):
        raise op.refuse("mixes-tokens", "adds to rows of a token axis by number")
    return _written(op, base, dim, dims, pick.dims, op.axes("source"))


def _made_for(op: Operands, base: Axes, permutation: Axes) -> Axes:
    """A tensor made like the sorted rows, to put them back into: its rows are nobody's yet."""
    (factor,) = permutation.dims[0]
    assert isinstance(factor, Sorted)
    if operator_name(op["self"]) in _MADE and base.dims and base.dims[0] == (factor,):
        return base.with_dims([factor.of, *base.dims[1:]])
    return base


def _indices(op: Operands) -> tuple[int, list[fx.Node]]:
    """The first dimension that is indexed, and the tensors that index it and those next to it."""
    used = [dim for dim, index in enumerate(op["indices"]) if index is not None]
    indices = [op["indices"][dim] for dim in used]
    if used != list(range(used[0], used[-1] + 1)):
        raise op.refuse("index", "indexes dimensions that are not next to each other")
    if len(used) > 1 and any(fake(index).dtype in _CONDITIONS for index in indices):
        raise op.refuse("index", "indexes by a condition and by something else")
    return used[0], indices


def _rest(op: Operands, axes: Axes, first: int, dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """The dimensions behind those that are indexed, which must be `dims` and all that has tokens."""
    after = axes.dims[first + len(dims) :]
    if axes.dims[first : first + len(dims)] != tuple(dims) or any(
        map(has_token, (*axes.dims[:first], *after))
    ):
        raise op.refuse("mixes-tokens", "indexes along a token axis")
    return after


def _number_rows(picks: Sequence[Axes], dims: Sequence[Dim]) -> bool:
    """Whether numbers that index `dims` are known to number the rows of the token axes among these."""
    pairs = [(pick, dim) for pick, dim in zip(picks, dims, strict=True) if has_token(dim)]
    if not pairs:
        return False
    pick, rows = pairs[0]
    if pick.meaning is Meaning.PLACES:
        (factor,) = next(dim for dim in pick.dims if dim)
        assert isinstance(factor, Picked)
        covered = [token for _, dim in pairs for token in token_factors(dim)]
        return covered == token_factors(factor.of) and all(
            other.meaning is Meaning.PLACES and other.along == (dim,) and _rows(other) == (factor,)
            for other, dim in pairs
        )
    if len(picks) != 1 or len(pick) != 1:
        return False
    if pick.meaning is Meaning.INVERSE:
        found = rows[0] if len(rows) == 1 else None
        return isinstance(found, Sorted) and (found.of, found.key) == (pick.dims[0], pick.key)
    if len(pick.dims[0]) != 1 or not isinstance(factor := pick.dims[0][0], Sorted):
        return False
    if pick.meaning is Meaning.PERMUTATION:
        return rows == factor.of
    return pick.meaning is Meaning.ROW_OF_SORTED and rows == _tokens_of(factor.of)


def _rows(pick: Axes) -> Dim:
    return next(dim for dim in pick.dims if dim)


def _tokens_of(rows: Dim) -> Dim:
    """The token axis of (token, choice) rows: their factors without a trailing number of choices."""
    return rows[:-1] if rows and isinstance(rows[-1], int) else rows


def _are_picked_by(dim: Dim, condition: fx.Node, op: Operands) -> bool:
    """Whether a dimension holds the very rows that a condition holds for."""
    if len(dim) != 1 or not isinstance(factor := dim[0], Picked):
        return False
    return factor.of == canonical(op.axes(condition).factors) and factor.key == op.key(condition)


def _written(
    op: Operands, base: Axes, first: int, dims: Sequence[Dim], rows: Sequence[Dim], values: Axes
) -> Verdict:
    """Rows written to where they were taken from: the values, broadcast, have to be those of the very rows."""
    after = _rest(op, base, first, dims)
    place = Axes((*base.dims[:first], *rows, *after))
    if base.sequences != 1 or not any(map(has_token, dims)) or values.meaning is not None:
        raise op.refuse("mixes-tokens", "writes to rows of a token axis by number")
    if merge([place, values], "aten.index_put") != place.dims:
        raise op.refuse("mixes-tokens", "writes values of other rows")
    return Verdict(base.with_dims(base.dims), reads_numbers=True)


def _inverse(op: Operands, base: Axes, permutation: Axes) -> Verdict:
    """`inverse[permutation] = arange(rows)`."""
    factor = permutation.dims[0][0]
    assert isinstance(factor, Sorted)
    # A plain arange(S) could be positions as well as row numbers (B = 1, one choice): not proven.
    known = op.axes("values").dims == (canonical(factor.of),) and len(factor.of) >= 2 and len(base) == 1
    if not known or op._arguments.get("accumulate", False):
        raise op.refuse("mixes-tokens", "writes to rows of a token axis by number")
    return Verdict(Axes((factor.of,), Meaning.INVERSE, permutation.key))
