"""Rules for operators that move, regroup, cut or join dimensions, and for those that make constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from regate_fx.passes.axes import Axes, Cut, Dim, Meaning, Token, has_token
from regate_fx.passes.base import fake
from regate_fx.passes.rules import Kind, Operands, Verdict, kind_of, rowwise, rule
from regate_fx.passes.token_symbols import reshape, size_expr


def _view(op: Operands, of: str = "self") -> Verdict:
    axes = op.axes(of)
    result = axes.viewed(reshape(axes.dims, op.shape, op.symbols))
    return Verdict(result, kind_of(result))


rule(
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.squeeze",
    "aten.unsqueeze", "aten.view_as", "aten.reshape_as",
)(_view)  # fmt: skip


@rule("aten.view.dtype")
def _view_dtype(op: Operands) -> Verdict:
    """The same bits as other numbers."""
    axes = op.axes("self")
    is_as_wide = fake(op.node).dtype.itemsize == fake(op["self"]).dtype.itemsize
    result = axes.with_dims(axes.dims)
    if not is_as_wide and has_token(axes.dims[-1]):
        raise op.refuse("cuts-tokens", "takes the numbers of a token axis for others")
    if not is_as_wide:
        result = axes.with_dims([*axes.dims[:-1], feature_size(op, op.shape[-1])])
    return Verdict(result, kind_of(result))


@rule("aten.view_as_complex")
def _view_as_complex(op: Operands) -> Verdict:
    axes = op.axes("self")  # the last dimension holds real and imaginary part
    result = axes.with_dims(axes.dims[:-1])
    return Verdict(result, kind_of(result))


@rule("aten.view_as_real")
def _view_as_real(op: Operands) -> Verdict:
    axes = op.axes("self")
    result = axes.with_dims([*axes.dims, (2,)])
    return Verdict(result, kind_of(result))


@rule("aten.expand", "aten.expand_as", "aten.broadcast_to")
def _expand(op: Operands) -> Verdict:
    axes = op.axes("self")
    padded = [()] * (len(op.shape) - len(axes)) + list(axes.dims)
    dims = [
        old if old != () else op.symbols.dim_of_size(size) for old, size in zip(padded, op.shape, strict=True)
    ]
    result = axes.with_dims(dims)
    return Verdict(result, kind_of(result))


@rule("aten.permute")
def _permute(op: Operands) -> Verdict:
    axes = op.axes("self")
    result = axes.with_dims([axes.dims[op.dim(dim, axes)] for dim in op["dims"]])
    return Verdict(result, kind_of(result))


@rule("aten.transpose", "aten.t", "aten.mT", "aten.swapaxes")
def _transpose(op: Operands) -> Verdict:
    axes = op.axes("self")
    dims = list(axes.dims)
    if len(dims) > 1:
        first, second = (op["dim0"], op["dim1"]) if "dim0" in op._arguments else (-2, -1)
        first, second = op.dim(first, axes), op.dim(second, axes)
        dims[first], dims[second] = dims[second], dims[first]
    result = axes.with_dims(dims)
    return Verdict(result, kind_of(result))


def feature_size(op: Operands, size: Any) -> Dim:
    """A feature dimension cut or grown to a size; one as long as a token axis is no token axis for that."""
    dim = op.symbols.dim_of_size(size)
    if has_token(dim):
        raise op.refuse("cuts-tokens", "cuts a feature dimension to the length of a token axis")
    return dim


def is_whole_slice(op: Operands) -> bool:
    """Whether a slice keeps its whole dimension."""
    before, after = fake(op["self"]).shape, op.shape
    dim = op["dim"] % len(before)
    return op["step"] == 1 and bool(sympy.simplify(size_expr(before[dim]) - size_expr(after[dim])) == 0)


@rule("aten.slice")
def _slice(op: Operands) -> Verdict:
    axes = op.axes("self")
    dim = op.dim(op["dim"], axes)
    if not has_token(axes.dims[dim]):
        sizes = feature_size(op, op.shape[dim])
        result = axes.with_dims([*axes.dims[:dim], sizes, *axes.dims[dim + 1 :]])
        return Verdict(result, kind_of(result))
    if is_whole_slice(op):
        return Verdict(axes, kind_of(axes))
    if axes.dims[dim] != (Token.S,) or axes.sequences > 1:
        raise op.refuse("cuts-tokens", "takes part of a token axis")
    cut = _cut(op, dim)
    return Verdict(axes.with_dims([*axes.dims[:dim], (cut,), *axes.dims[dim + 1 :]]))


def _cut(op: Operands, dim: int) -> Cut:
    head = 0 if op["start"] is None else op["start"]
    missing = sympy.simplify(op.symbols.length - size_expr(op.shape[dim]))
    if op["step"] != 1 or not isinstance(head, int) or head < 0 or not missing.is_Integer or missing < head:
        raise op.refuse("cuts-tokens", "takes part of the sequence by position")
    return Cut(head, int(missing) - head)


@rule("aten.select")
def _select(op: Operands) -> Verdict:
    axes = op.axes("self")
    dim = op.dim(op["dim"], axes)
    if has_token(axes.dims[dim]):
        raise op.refuse("cuts-tokens", "picks one entry of a token axis")
    if len(axes.along) > 1 and dim == len(axes) - 1:
        return Verdict(_column(axes, op["index"]), reads_numbers=True)
    result = axes.with_dims([*axes.dims[:dim], *axes.dims[dim + 1 :]])
    return Verdict(result, kind_of(result))


def _column(places: Axes, index: int) -> Axes:
    """One column of places [M, rank]; along what is no token axis they are values like others."""
    along = places.along[index]
    if not has_token(along):
        return Axes(places.dims[:-1])
    return replace(places, dims=places.dims[:-1], along=(along,))


@rule("aten.split", "aten.chunk", "aten.unbind", "aten.tensor_split")
def split(op: Operands) -> Verdict:
    """A tensor split along a dimension that is no token axis."""
    axes = op.axes("self")
    dim = op.dim(op["dim"], axes)
    if has_token(axes.dims[dim]):
        raise op.refuse("cuts-tokens", "splits a token axis")
    if len(axes.along) > 1 and dim == len(axes) - 1 and len(fake(op.node)[0].shape) < len(axes):
        columns = tuple(_column(axes, index) for index in range(len(axes.along)))
        return Verdict(columns, reads_numbers=True)
    parts = []
    for part in fake(op.node):
        sizes = [feature_size(op, part.shape[dim])] if len(part.shape) == len(axes) else []
        parts.append(axes.with_dims([*axes.dims[:dim], *sizes, *axes.dims[dim + 1 :]]))
    return Verdict(tuple(parts), kind_of(parts[0]))


@rule("getitem")
def _getitem(op: Operands) -> Verdict:
    result = op.result_of("0")
    axes = result[op["1"]] if isinstance(result, tuple) else result
    return Verdict(axes, kind_of(axes))


@rule("aten.stack")
def join(op: Operands) -> Verdict:
    """Tensors joined along a dimension, of theirs or a new one, that is no token axis."""
    rank = len(op.shape)
    dim = op["dim"] % rank
    # Of any rank, `cat` takes [0] for nothing: so begin the caches of keys and values.
    parts = [op.axes(part) for part in op["tensors"] if rank == 1 or not _is_nothing(fake(part))]
    stacking = rank > len(parts[0])
    if len(parts) == 1 and not stacking:
        whole = parts[0].with_dims(parts[0].dims)
        return Verdict(whole, kind_of(whole))
    if stacking:
        parts = [Axes((*axes.dims[:dim], (), *axes.dims[dim:])) for axes in parts]
    if any(has_token(axes.dims[dim]) for axes in parts):
        raise op.refuse("joins-tokens", "joins along a token axis")
    joined = rowwise(op, [axes.with_dims([*axes.dims[:dim], (), *axes.dims[dim + 1 :]]) for axes in parts])
    assert isinstance(joined.axes, Axes)
    size = feature_size(op, op.shape[dim])
    result = joined.axes.with_dims([*joined.axes.dims[:dim], size, *joined.axes.dims[dim + 1 :]])
    return Verdict(result, joined.kind)


def _is_nothing(value: torch.Tensor) -> bool:
    return value.dim() == 1 and isinstance(value.shape[0], int) and value.shape[0] == 0


@rule("aten.slice_scatter")
def _slice_scatter(op: Operands) -> Verdict:
    axes, source = op.axes("self"), op.axes("src")
    dim = op.dim(op["dim"], axes)
    if has_token(axes.dims[dim]) or has_token(source.dims[dim]):
        raise op.refuse("cuts-tokens", "writes to part of a token axis")
    without = [Axes((*a.dims[:dim], (), *a.dims[dim + 1 :])) for a in (axes, source)]
    merged = rowwise(op, without)
    assert isinstance(merged.axes, Axes)
    dims = merged.axes.dims
    return Verdict(merged.axes.with_dims([*dims[:dim], axes.dims[dim], *dims[dim + 1 :]]), merged.kind)


@rule("aten.select_scatter")
def _select_scatter(op: Operands) -> Verdict:
    axes, source = op.axes("self"), op.axes("src")
    dim = op.dim(op["dim"], axes)
    if has_token(axes.dims[dim]):
        raise op.refuse("cuts-tokens", "writes to one entry of a token axis")
    widened = Axes((*source.dims[:dim], (), *source.dims[dim:]))
    return rowwise(op, [axes, widened])


@rule("aten.constant_pad_nd", "aten.pad")
def _pad(op: Operands) -> Verdict:
    axes = op.axes("self")
    dims = list(axes.dims)
    for index in range(len(op["pad"]) // 2):
        dim = len(dims) - 1 - index
        if any(not (isinstance(side, int) and side == 0) for side in op["pad"][2 * index : 2 * index + 2]):
            if has_token(dims[dim]):
                raise op.refuse("cuts-tokens", "pads a token axis")
            dims[dim] = feature_size(op, op.shape[dim])
    result = axes.with_dims(dims)
    return Verdict(result, kind_of(result))


@rule("aten.repeat")
def _repeat(op: Operands) -> Verdict:
    axes = op.axes("self")
    dims: list[Dim] = [()] * (len(op["repeats"]) - len(axes)) + list(axes.dims)
    for index, times in enumerate(op["repeats"]):
        if isinstance(times, int) and times == 1:
            continue
        if not has_token(dims[index]):
            dims[index] = op.symbols.dim_of_size(op.shape[index])
        elif isinstance(times, int):
            dims[index] = (times, *dims[index])  # the whole axis, several times in a row
        else:
            raise op.refuse("cuts-tokens", "repeats a token axis as often as there are tokens")
    result = axes.with_dims(dims)
    return Verdict(result, kind_of(result))


@rule("aten.repeat_interleave")
def _repeat_interleave(op: Operands) -> Verdict:
    axes = op.axes("self")
    if not isinstance(op["repeats"], int) or (op["dim"] is None and len(axes) != 1):
        raise op.refuse("cuts-tokens", "repeats by counts or over flattened dimensions")
    dim = op.dim(op["dim"] or 0, axes)
    if any(not isinstance(factor, (int, sympy.Expr, Token)) for factor in axes.dims[dim]):
        raise op.refuse("cuts-tokens", "repeats a token axis")
    result = axes.with_dims([*axes.dims[:dim], (*axes.dims[dim], op["repeats"]), *axes.dims[dim + 1 :]])
    return Verdict(result, kind_of(result))


def _made(op: Operands) -> Verdict:
    result = op.symbols.axes_of_shape(op.shape)
    return Verdict(result, Kind.CONSTANT if result.has_tokens else Kind.ROWS, reads_numbers=True)


rule(
    "aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.new_zeros", "aten.new_ones", "aten.new_full",
    "aten.new_empty", "aten.scalar_tensor",
)(_made)  # fmt: skip


@rule("aten.arange")
def _arange(op: Operands) -> Verdict:
    result = op.symbols.axes_of_shape(op.shape)
    counts_from_zero = op._arguments.get("start", 0) == 0 and op._arguments.get("step", 1) == 1
    if not result.has_tokens or not counts_from_zero:
        return Verdict(result)
    return Verdict(Axes(result.dims, Meaning.ARANGE))


def shape_without(dims: Sequence[Any], drop: Sequence[int], keep: bool) -> list[Any]:
    """Dims after a reduction over `drop`."""
    reduced = [() if index in drop else dim for index, dim in enumerate(dims)]
    return reduced if keep else [dim for index, dim in enumerate(dims) if index not in drop]
