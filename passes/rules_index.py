"""Rules for table look-ups and for mixture-of-experts dispatch.

Dispatch sorts (token, choice) rows by expert, runs one grouped product over the sorted rows and puts them back.
Every row is still computed from its own token alone. The proof follows the row numbers: what was sorted by which
ids, whose rows an index selects, and that group sizes count the very same ids.
"""

from __future__ import annotations

from regate_fx.passes.axes import Axes, Dim, Meaning, Sorted, canonical, has_token, merge
from regate_fx.passes.base import fake
from regate_fx.passes.rules import Operands, Verdict, kind_of, rowwise, rule


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
    used = [dim for dim, index in enumerate(op["indices"]) if index is not None]
    picks = [op.axes(op["indices"][dim]) for dim in used]
    if used != list(range(used[0], used[-1] + 1)):
        raise op.refuse("index", "indexes dimensions that are not next to each other")
    if any(has_token(axes.dims[dim]) for dim in used):
        if used != [0] or len(picks) != 1:
            raise op.refuse("mixes-tokens", "indexes along a token axis")
        return _pick_rows(op, axes, picks[0])
    merged = merge(picks, "aten.index")
    result = axes.with_dims([*axes.dims[: used[0]], *merged, *axes.dims[used[-1] + 1 :]])
    return Verdict(result, kind_of(result))


def _pick_rows(op: Operands, axes: Axes, pick: Axes) -> Verdict:
    """Rows of a token tensor by row numbers whose meaning is known."""
    rows = axes.dims[0]
    sources: dict[Meaning, Dim] = {}
    if len(pick) == 1 and len(pick.dims[0]) == 1 and isinstance(pick.dims[0][0], Sorted):
        of = pick.dims[0][0].of
        sources = {Meaning.PERMUTATION: of, Meaning.ROW_OF_SORTED: _tokens_of(of)}
    elif pick.meaning is Meaning.INVERSE:
        sources = {Meaning.INVERSE: (Sorted(pick.dims[0], pick.key),)}
    if pick.meaning is None or sources.get(pick.meaning) != rows:
        raise op.refuse("mixes-tokens", "picks rows of a token axis by numbers of unknown meaning")
    return Verdict(axes.with_dims([*pick.dims, *axes.dims[1:]]))


def _tokens_of(rows: Dim) -> Dim:
    """The token axis of (token, choice) rows: their factors without a trailing number of choices."""
    return rows[:-1] if rows and isinstance(rows[-1], int) else rows


@rule("aten.sort", "aten.argsort")
def _sort(op: Operands) -> Verdict:
    axes = op.axes("self")
    dim = op.dim(op["dim"], axes)
    several = isinstance(fake(op.node), (tuple, list))
    if not has_token(axes.dims[dim]):
        plain = axes.with_dims(axes.dims)
        return Verdict((plain, plain) if several else plain, kind_of(plain))
    if len(axes) != 1 or fake(op["self"]).is_floating_point() or axes.meaning is not None:
        raise op.refuse("mixes-tokens", "sorts along token positions")
    key = op["self"].name
    order = ((Sorted(axes.dims[0], key),),)
    values, indices = Axes(order, Meaning.SORTED_IDS, key), Axes(order, Meaning.PERMUTATION, key)
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
    if op["other"] != choices or op._arguments.get("rounding_mode", "floor") != "floor":
        raise op.refuse("row-numbers", "divides row numbers by something else than the number of choices")
    return Verdict(Axes(axes.dims, Meaning.ROW_OF_SORTED, axes.key))


@rule("aten.index_put")
def _inverse(op: Operands) -> Verdict:
    """`inverse[permutation] = arange(rows)`, the only write by row numbers that is known to be sound."""
    base, values = op.axes("self"), op.axes("values")
    indices = [op.axes(index) for index in op["indices"]]
    known = (
        len(indices) == 1
        and indices[0].meaning is Meaning.PERMUTATION
        and values.meaning is Meaning.ARANGE
        and not op._arguments.get("accumulate", False)
    )
    if not known:
        raise op.refuse("mixes-tokens", "writes to rows of a token axis by number")
    factor = indices[0].dims[0][0]
    assert isinstance(factor, Sorted)
    # A plain arange(S) could be positions as well as row numbers (B = 1, one choice): not proven.
    if values.dims != (canonical(factor.of),) or len(factor.of) < 2 or len(base) != 1:
        raise op.refuse("mixes-tokens", "writes to rows of a token axis by number")
    return Verdict(Axes((factor.of,), Meaning.INVERSE, indices[0].key))


@rule("aten.histc", "aten.bincount")
def _counts(op: Operands) -> Verdict:
    axes = op.axes("self")
    if not axes.has_tokens:
        return Verdict(op.symbols.axes_of_shape(op.shape))
    key = axes.key if axes.meaning is Meaning.SORTED_IDS else op["self"].name
    return Verdict(Axes(((fake(op.node).shape[0],),), Meaning.COUNTS, key, aggregate=True))


@rule("transformers.grouped_mm_fallback", "aten._grouped_mm")
def _grouped(op: Operands) -> Verdict:
    names = [argument.name for argument in op.node.target._schema.arguments]
    rows, weight, offsets = op.axes(names[0]), op.axes(names[1]), op.axes(names[2])
    factor = rows.dims[0][0] if rows.dims[0] else None
    if weight.has_tokens or weight.aggregate or len(rows) != 2 or not isinstance(factor, Sorted):
        raise op.refuse("grouped-product", "multiplies rows that were not sorted by expert")
    if offsets.meaning is not Meaning.OFFSETS or offsets.key != factor.key:
        raise op.refuse("grouped-product", "groups rows by something else than what they were sorted by")
    result = rows.with_dims([rows.dims[0], op.symbols.dim_of_size(op.shape[-1])])
    return Verdict(result, reads_offsets=True)


@rule("aten._to_copy", "aten.clone", "aten.to", "aten.contiguous", "aten.alias", "aten.detach")
def _same_values(op: Operands) -> Verdict:
    """A cast or a copy keeps what is known of the values."""
    axes = op.axes("self")
    return Verdict(axes, kind_of(axes))


@rule("aten.cumsum")
def _cumsum(op: Operands) -> Verdict:
    axes = op.axes("self")
    if axes.meaning is Meaning.COUNTS:
        return Verdict(Axes(axes.dims, Meaning.OFFSETS, axes.key, aggregate=True))
    if has_token(axes.dims[op.dim(op["dim"], axes)]):
        raise op.refuse("mixes-tokens", "runs along token positions")
    return Verdict(axes.with_dims(axes.dims), kind_of(axes))
