"""Rules for what numbers token rows, as mixture-of-experts dispatch does: sorting, picking and counting them.

Dispatch sorts (token, choice) rows by expert, runs one grouped product over the sorted rows and puts them back, or
picks for each expert the rows that chose it. Every row is still computed from its own token alone. The proof follows
the row numbers: what was sorted by which ids, what a condition holds for, and that group sizes count the very same
ids. What reads and writes rows by such numbers is in `rules_index`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from regate_fx.passes.axes import (
    NUMBERING,
    Axes,
    Dim,
    Group,
    Meaning,
    Picked,
    Sorted,
    Token,
    canonical,
    has_token,
    merge,
    token_factors,
)
from regate_fx.passes.base import SCALARS_OF_TENSORS, fake, operator_name
from regate_fx.passes.rules import Operands, Verdict, kind_of, rowwise, rule
from regate_fx.passes.rules_shape import join, split
from regate_fx.passes.token_symbols import note_counts


@rule("aten.nonzero", "aten.nonzero_numpy", "aten.argwhere")
def _nonzero(op: Operands) -> Verdict:
    return _places_of(op, op["self"])


@rule("aten.where.default")
def _where(op: Operands) -> Verdict:
    return _places_of(op, op["condition"])


def _places_of(op: Operands, condition: fx.Node) -> Verdict:
    """Places of what is not zero: [M, rank], or a list of columns [M]."""
    value = fake(op.node)
    axes = op.axes(condition)
    columns = value if isinstance(value, (tuple, list)) else [value]
    rows = picked_rows(op, condition, columns[0].shape[0])
    if columns is value:
        return Verdict(tuple(_places((rows,), (dim,)) for dim in axes.dims))
    result = _places((rows,), axes.dims)
    return Verdict(
        Axes((*result.dims, canonical((len(axes),))), result.meaning, result.key, along=result.along)
    )


def _places(rows: Dim, along: tuple[Dim, ...]) -> Axes:
    """Places along what is no token axis are values like others."""
    if not any(has_token(dim) for dim in along):
        return Axes((rows,))
    (factor,) = rows
    assert isinstance(factor, Picked)
    return Axes((rows,), Meaning.PLACES, factor.key, along=along)


def picked_rows(op: Operands, condition: fx.Node, size: Any) -> Picked:
    """The axis of the rows that a condition over token rows holds for; size: how many, as the capture calls it."""
    axes = op.axes(condition)
    tokens = token_factors(axes.factors)
    wanted = [Token.S] if op.symbols.batch == 1 else [Token.B, Token.S]
    if tokens != wanted or not all(isinstance(factor, (Token, int)) for factor in axes.factors):
        raise op.refuse("mixes-tokens", "picks entries by a condition that is not over single token rows")
    return Picked(canonical(axes.factors), op.key(condition), note_counts(op.symbols, size))


@rule("aten.sort", "aten.argsort")
def _sort(op: Operands) -> Verdict:
    axes = op.axes("self")
    dim = op.dim(op["dim"], axes)
    several = isinstance(fake(op.node), (tuple, list))
    if not has_token(axes.dims[dim]):
        plain = axes.with_dims(axes.dims)
        return Verdict((plain, plain) if several else plain, kind_of(plain))
    if axes.meaning is Meaning.PERMUTATION and len(axes) == 1 and not several and not op["descending"]:
        (factor,) = axes.dims[0]
        assert isinstance(factor, Sorted)
        return Verdict(Axes((factor.of,), Meaning.INVERSE, axes.key))
    if len(axes) != 1 or fake(op["self"]).is_floating_point() or axes.meaning not in (None, Meaning.ONE_HOT):
        raise op.refuse("mixes-tokens", "sorts along token positions")
    # Counts go by rising ids: no groups of rows that are sorted the other way round.
    ids = op.key(op["self"]) + (" descending" if op["descending"] else "")
    factor = Sorted(axes.dims[0], op.key(op.node), ids)
    values, indices = (
        Axes(((factor,),), Meaning.SORTED_IDS, ids),
        Axes(((factor,),), Meaning.PERMUTATION, factor.key),
    )
    return Verdict((values, indices) if several else indices)


@rule("aten.floor_divide", "aten.div")
def _row_of_pair(op: Operands) -> Verdict:
    """(token, choice) row number // choices = token row number."""
    axes = op.axes("self")
    if axes.meaning is not Meaning.PERMUTATION:
        return rowwise(op, [op.axes(node) for node in op.tensors()])
    factor = axes.dims[0][0]
    assert isinstance(factor, Sorted)
    choices = factor.of[-1] if isinstance(factor.of[-1], int) else 1
    if op["other"] != choices or op._arguments.get("rounding_mode", "floor") not in ("floor", "trunc"):
        raise op.refuse("row-numbers", "divides row numbers by something else than the number of choices")
    return Verdict(Axes(axes.dims, Meaning.ROW_OF_SORTED, axes.key))


@rule("aten.split_with_sizes")
def _split_with_sizes(op: Operands) -> Verdict:
    """Sorted rows fall into one group for each expert where they are split by the very numbers of its rows."""
    axes = op.axes("self")
    dim = op.dim(op["dim"], axes)
    factor = axes.dims[dim][0] if len(axes.dims[dim]) == 1 else None
    sizes = op["split_sizes"]
    if not isinstance(factor, Sorted):
        return split(op)
    if not all(_is_count(op, size, index, factor, len(sizes)) for index, size in enumerate(sizes)):
        raise op.refuse("cuts-tokens", "splits sorted rows by something else than what they were sorted by")
    parts = []
    for index, part in enumerate(fake(op.node)):
        group = Group((factor,), index, len(sizes), note_counts(op.symbols, part.shape[dim]))
        parts.append(axes.with_dims([*axes.dims[:dim], (group,), *axes.dims[dim + 1 :]]))
    return Verdict(tuple(parts))


def _is_count(op: Operands, size: Any, index: int, rows: Sorted, groups: int) -> bool:
    """Whether a size was read from place `index` of the numbers of rows that each expert has."""
    if not isinstance(size, fx.Node) or size.target not in SCALARS_OF_TENSORS:
        return False
    (entry,) = size.args
    assert isinstance(entry, fx.Node)
    name = operator_name(entry)
    if name == "getitem" and operator_name(unbound := entry.args[0]) == "aten.unbind":
        counts, place = unbound.args[0], entry.args[1]
    elif name == "aten.select":
        counts, place = entry.args[0], entry.args[2]
    else:
        return False
    axes = op.axes(counts)
    known = axes.meaning is Meaning.COUNTS and axes.key == rows.ids and axes.dims == ((groups,),)
    return known and place == index


@rule("aten.cat", "aten.concat", "aten.concatenate")
def _cat(op: Operands) -> Verdict:
    """All groups of sorted rows, in their order, are the sorted rows; other tensors are joined as `join` says."""
    axes = [op.axes(part) for part in op["tensors"]]
    dim = op["dim"] % len(op.shape)
    dims = [part.dims[dim] if len(part) > dim else () for part in axes]
    groups = [found[0] for found in dims if len(found) == 1 and isinstance(found[0], Group)]
    if len(groups) < len(axes):
        return join(op)
    whole = [replace(groups[0], index=index, size=group.size) for index, group in enumerate(groups)]
    if groups != whole or len(groups) != groups[0].groups:
        raise op.refuse("joins-tokens", "joins groups of rows that are not all groups in their order")
    without = [Axes((*part.dims[:dim], (), *part.dims[dim + 1 :])) for part in axes]
    dims = list(merge(without, "aten.cat"))
    return Verdict(Axes((*dims[:dim], groups[0].of, *dims[dim + 1 :])))


@rule("aten.histc", "aten.bincount")
def _counts(op: Operands) -> Verdict:
    axes = op.axes("self")
    if not axes.has_tokens:
        return Verdict(op.symbols.axes_of_shape(op.shape))
    if axes.meaning in NUMBERING:
        raise op.refuse("row-numbers", "counts row numbers")
    counted = Axes((op.symbols.dim_of_size(op.shape[0]),), aggregate=True)
    if op._arguments.get("weights") is not None:
        return Verdict(counted)
    if "bins" in op._arguments and (op["min"], op["max"]) != (0, op["bins"] - 1):
        return Verdict(counted)  # of ranges, not of single ids
    key = axes.key if axes.meaning is Meaning.SORTED_IDS else op.key(op["self"])
    return Verdict(replace(counted, meaning=Meaning.COUNTS, key=key))


@rule("transformers.grouped_mm_fallback", "aten._grouped_mm")
def _grouped(op: Operands) -> Verdict:
    names = [argument.name for argument in op.node.target._schema.arguments]
    rows, weight, offsets = op.axes(names[0]), op.axes(names[1]), op.axes(names[2])
    factor = rows.dims[0][0] if rows.dims[0] else None
    if weight.has_tokens or weight.aggregate or len(rows) != 2 or not isinstance(factor, Sorted):
        raise op.refuse("grouped-product", "multiplies rows that were not sorted by expert")
    if offsets.meaning is not Meaning.OFFSETS or offsets.key != factor.ids:
        raise op.refuse("grouped-product", "groups rows by something else than what they were sorted by")
    result = rows.with_dims([rows.dims[0], op.symbols.dim_of_size(op.shape[-1])])
    return Verdict(result, reads_offsets=True)


@rule("aten._to_copy", "aten.clone", "aten.to", "aten.contiguous", "aten.alias", "aten.detach")
def _same_values(op: Operands) -> Verdict:
    """A copy keeps what is known of the values, and a cast to a dtype that has them."""
    axes = op.axes("self")
    if not _holds(fake(op.node).dtype, fake(op["self"]).dtype, axes.meaning):
        axes = axes.with_dims(axes.dims)
    return Verdict(axes, kind_of(axes))


def _holds(dtype: torch.dtype, before: torch.dtype, meaning: Meaning | None) -> bool:
    """Whether values of a meaning stay what they are in another dtype: numbers of rows and ids are below 2^31."""
    return dtype == before or meaning is Meaning.ONE_HOT or dtype in _EXACT


_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)


@rule("aten.cumsum")
def _cumsum(op: Operands) -> Verdict:
    axes = op.axes("self")
    if axes.meaning is Meaning.COUNTS:
        return Verdict(Axes(axes.dims, Meaning.OFFSETS, axes.key, aggregate=True))
    if has_token(axes.dims[op.dim(op["dim"], axes)]):
        raise op.refuse("mixes-tokens", "runs along token positions")
    return Verdict(axes.with_dims(axes.dims), kind_of(axes))
