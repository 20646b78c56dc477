"""Rules for elementwise operators, reductions, norms and matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from regate_fx.passes.axes import Axes, Dim, Meaning, Token, has_token, merge
from regate_fx.passes.base import fake, operator_name
from regate_fx.passes.rules import Kind, Operands, Verdict, kind_of, kind_of_product, rowwise, rule
from regate_fx.passes.rules_shape import feature_size, shape_without


# Elementwise operators that do not carry `torch.Tag.pointwise`; those that do need no entry.
@rule(
    "aten.lift_fresh_copy", "aten.dropout", "aten.feature_dropout", "aten.masked_fill", "aten.__and__",
    "aten.__or__", "aten.__xor__", "aten.fill", "aten.log_sigmoid", "aten.selu", "aten.celu", "aten.relu6",
    "aten.square", "aten.float_power", "aten.true_divide", "aten.multiply", "aten.subtract", "aten.divide",
    "aten.greater", "aten.greater_equal", "aten.less", "aten.less_equal", "aten.not_equal", "aten.clip",
    "aten.isfinite", "aten.absolute", "aten.negative", "aten.softplus", "aten.mish", "aten.hardtanh",
    "aten.rsub", "aten.where", "aten.polar", "aten.complex", "aten.exponential", "aten.uniform",
    "aten.normal_functional", "aten.bernoulli", "aten.cauchy", "aten.geometric", "aten.log_normal",
)  # fmt: skip
def elementwise(op: Operands) -> Verdict:
    """Broadcast all tensor operands, every element by itself."""
    return rowwise(op, [op.axes(node) for node in op.tensors()])


@rule("aten.type_as")
def _type_as(op: Operands) -> Verdict:
    axes = op.axes("self")  # the other operand gives its dtype alone
    result = axes.with_dims(axes.dims)
    return Verdict(result, kind_of(result))


@rule(
    "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like", "aten.rand_like", "aten.randn_like",
)  # fmt: skip
def _like(op: Operands) -> Verdict:
    axes = op.axes("self")
    return Verdict(Axes(axes.dims), Kind.CONSTANT if axes.has_tokens else Kind.ROWS, reads_numbers=True)


# Reductions over keys whose result is exact once the empty slots hold the named filler.
MASKABLE = {"aten.softmax": "lowest", "aten._softmax": "lowest", "aten.amax": "lowest", "aten.logsumexp": "lowest",
            "aten.sum": "zero"}  # fmt: skip


def reduced_dims(op: Operands, axes: Axes) -> list[int]:
    dims = op._arguments.get("dim", op._arguments.get("dims"))
    if dims is None or dims == []:
        return list(range(len(axes)))
    return [op.dim(dim, axes) for dim in ([dims] if isinstance(dims, int) else dims)]


def _check_key_reduction(op: Operands, axes: Axes, dims: Sequence[int]) -> None:
    """A reduction over one whole sequence axis, batch apart, that masking the empty slots makes exact."""
    name = operator_name(op.node)
    if name not in MASKABLE:
        raise op.refuse("mixes-tokens", "reduces over token positions")
    if axes.sequences < 2:
        raise op.refuse("mixes-tokens", "reduces over token positions")
    if [axes.dims[dim] for dim in dims if has_token(axes.dims[dim])] != [(Token.S,)]:
        raise op.refuse("mixes-tokens", "reduces over a batch axis or several token axes")


@rule(
    "aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.logsumexp", "aten.prod", "aten.any", "aten.all",
    "aten.var", "aten.std", "aten.linalg_vector_norm", "aten.norm", "aten.argmax", "aten.argmin", "aten.max",
    "aten.min", "aten.median", "aten.count_nonzero",
)  # fmt: skip
def _reduce(op: Operands) -> Verdict:
    axes = op.axes("self")
    if "other" in op._arguments:
        return elementwise(op)
    dims = reduced_dims(op, axes)
    several = isinstance(fake(op.node), (tuple, list))
    reduced = axes.with_dims(shape_without(axes.dims, dims, bool(op._arguments.get("keepdim", False))))
    kind = kind_of(reduced, axes)
    tokens = [dim for dim in dims if has_token(axes.dims[dim])]
    if tokens and not reduced.has_tokens and axes.sequences == 1:
        if operator_name(op.node) not in ("aten.sum", "aten.mean"):
            raise op.refuse("mixes-tokens", "reduces over all tokens")
        if axes.meaning is Meaning.ONE_HOT and dims == list(range(len(axes) - 1)) and _is_sum(op):
            return Verdict(Axes(reduced.dims, Meaning.COUNTS, axes.key, aggregate=True))
        return Verdict(Axes(reduced.dims, aggregate=True))
    if tokens:
        _check_key_reduction(op, axes, dims)
        kind = Kind.PAIRS
    return Verdict((reduced,) * len(fake(op.node)) if several else reduced, kind)


def _is_sum(op: Operands) -> bool:
    """A sum that counts ones exactly."""
    is_sum = operator_name(op.node) == "aten.sum" and not op._arguments.get("keepdim", False)
    return is_sum and fake(op.node).dtype in (torch.int32, torch.int64, torch.float32, torch.float64)


@rule("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax")
def _softmax(op: Operands) -> Verdict:
    axes = op.axes("self")
    dim = op.dim(op["dim"], axes)
    if not has_token(axes.dims[dim]):
        return Verdict(axes.with_dims(axes.dims), kind_of(axes))
    _check_key_reduction(op, axes, [dim])
    return Verdict(axes.with_dims(axes.dims), Kind.PAIRS)


@rule("aten.cumprod", "aten.logcumsumexp", "aten.flip", "aten.roll", "aten.glu")
def _along_features(op: Operands) -> Verdict:
    axes = op.axes("self")
    dims: Any = op._arguments.get("dim", op._arguments.get("dims"))
    listed = [op.dim(dim, axes) for dim in ([dims] if isinstance(dims, int) else dims)]
    if not listed or any(has_token(axes.dims[dim]) for dim in listed):
        raise op.refuse("mixes-tokens", "runs along token positions")
    result = axes.with_dims(
        [
            dim if has_token(dim) else op.symbols.dim_of_size(size)
            for dim, size in zip(axes.dims, op.shape, strict=True)
        ]
    )
    return Verdict(result, kind_of(result))


@rule("aten.topk", "aten.kthvalue")
def _topk(op: Operands) -> Verdict:
    axes = op.axes("self")
    dim = op.dim(op["dim"], axes)
    if has_token(axes.dims[dim]):
        raise op.refuse("mixes-tokens", "picks the largest along token positions")
    size = feature_size(op, fake(op.node)[0].shape[dim])
    result = axes.with_dims([*axes.dims[:dim], size, *axes.dims[dim + 1 :]])
    return Verdict((result, result), kind_of(result))


@rule("aten.gather", "aten.scatter", "aten.scatter_add", "aten.scatter_reduce", "aten.take_along_dim")
def _along_dim(op: Operands) -> Verdict:
    dim = op.dim(op["dim"], op.axes("self"))
    if operator_name(op.node) == "aten.scatter_add" and not op.axes("self").has_tokens:
        return _added_up(op)
    operands = [op.axes(node) for node in op.tensors()]
    if any(has_token(axes.dims[dim]) for axes in operands):
        raise op.refuse("mixes-tokens", "indexes along a token axis")
    if "scatter" in operator_name(op.node):
        _check_index_covers(op, dim)
    # Outside `dim` these operators read entry for entry, without broadcasting.
    without = [Axes((*a.dims[:dim], (), *a.dims[dim + 1 :])) for a in operands]
    merged = rowwise(op, without)
    assert isinstance(merged.axes, Axes)
    size = op.symbols.dim_of_size(op.shape[dim])
    result = merged.axes.with_dims([*merged.axes.dims[:dim], size, *merged.axes.dims[dim + 1 :]])
    if dim == len(result) - 1 and _writes_ones(op):
        result = replace(result, meaning=Meaning.ONE_HOT, key=op.key(op["index"]))
    return Verdict(result, merged.kind)


def _added_up(op: Operands) -> Verdict:
    """Entries added to those of a tensor without tokens, at the places that an index says: a sum over tokens."""
    index, added = op.axes("index"), op.axes("src")
    if not index.has_tokens and not added.has_tokens:
        return Verdict(op.symbols.axes_of_shape(op.shape))
    if index.dims != added.dims or index.sequences != 1 or len(index) != 1:
        raise op.refuse("mixes-tokens", "adds up entries that are not one for each token row")
    return Verdict(Axes(op.axes("self").dims, aggregate=True))


def _writes_ones(op: Operands) -> bool:
    """Whether a scatter writes ones to zeros."""
    is_scatter = operator_name(op.node) == "aten.scatter" and "reduce" not in op._arguments
    zeros = op["self"]
    made = operator_name(zeros) in ("aten.zeros", "aten.zeros_like", "aten.new_zeros")
    return is_scatter and made and op._arguments.get("value") == 1


def _check_index_covers(op: Operands, dim: int) -> None:
    """An index shorter than the tensor written to writes to the first positions or samples only."""
    written, index = op.axes("self"), op.axes("index")
    for place, (wanted, given) in enumerate(zip(written.dims, index.dims, strict=False)):
        if place != dim and has_token(wanted) and given != wanted:
            raise op.refuse("mixes-tokens", "writes to part of the tokens only")


@rule("aten.one_hot")
def _one_hot(op: Operands) -> Verdict:
    axes = op.axes("self")
    result = axes.with_dims([*axes.dims, op.symbols.dim_of_size(op.shape[-1])])
    if result.meaning is None:
        result = replace(result, meaning=Meaning.ONE_HOT, key=op.key(op["self"]))
    return Verdict(result)


@rule("aten.layer_norm", "aten.rms_norm", "aten._fused_rms_norm", "aten.native_layer_norm")
def _norm(op: Operands) -> Verdict:
    axes = op.axes("input")
    if any(has_token(dim) for dim in axes.dims[len(axes) - len(op["normalized_shape"]) :]):
        raise op.refuse("mixes-tokens", "normalises over token positions")
    if op.axes("weight").has_tokens or op.axes("bias" if "bias" in op._arguments else None).has_tokens:
        raise op.refuse("mixes-tokens", "has a weight with token axes")
    return Verdict(axes.with_dims(axes.dims), kind_of(axes))


@rule("aten.linear")
def _linear(op: Operands) -> Verdict:
    axes = op.axes("input")
    if op.axes("weight").has_tokens or op.axes("bias").has_tokens:
        raise op.refuse("mixes-tokens", "has a weight with token axes")
    if has_token(axes.dims[-1]):
        raise op.refuse("mixes-tokens", "projects along token positions")
    result = axes.with_dims([*axes.dims[:-1], op.symbols.dim_of_size(op.shape[-1])])
    return Verdict(result, kind_of(result))


@rule("aten.conv1d")
def _convolution(op: Operands) -> Verdict:
    """Over single positions, `[B, C, S]`: a linear layer."""
    axes = op.axes("input")
    if fake(op["weight"]).shape[2] != 1 or list(op["stride"]) != [1] or list(op["padding"]) != [0]:
        raise op.refuse("mixes-tokens", "mixes neighbouring positions")
    if op.axes("weight").has_tokens or op.axes("bias").has_tokens or has_token(axes.dims[-2]):
        raise op.refuse("mixes-tokens", "has token positions for channels")
    result = axes.with_dims([*axes.dims[:-2], op.symbols.dim_of_size(op.shape[-2]), axes.dims[-1]])
    return Verdict(result, kind_of(result))


def product(op: Operands, left: Axes, right: Axes) -> Verdict:
    """`[..., m, k] @ [..., k, n]`: rows where `k` is a feature, pairs where `m` and `n` or `k` are positions."""
    if len(left) < 2 or len(right) < 2:
        raise op.refuse("matmul", "multiplies a vector along a token axis")
    batch = merge([Axes(left.dims[:-2]), Axes(right.dims[:-2])], operator_name(op.node))
    contracted = {left.dims[-1], right.dims[-2]}
    pairs = Kind.ROWS
    if any(has_token(dim) for dim in contracted):
        if contracted != {(Token.S,)}:
            raise op.refuse("mixes-tokens", "contracts a batch axis or unequal token axes")
        pairs = Kind.PAIRS
    result = Axes((*batch, left.dims[-2], right.dims[-1]))
    if sum(Token.B in dim for dim in result.dims) > 1:
        raise op.refuse("mixes-tokens", "pairs tokens of different samples")
    kind = Kind.PAIRS if pairs is Kind.PAIRS else kind_of_product(result, left, right)
    return Verdict(result, kind)


@rule("aten.matmul", "aten.bmm", "aten.mm")
def _matmul(op: Operands) -> Verdict:
    left, right = op.axes("self"), op.axes("mat2" if "mat2" in op._arguments else "other")
    if not left.has_tokens and not right.has_tokens:
        return Verdict(op.symbols.axes_of_shape(op.shape))
    return product(op, left, right)


@rule("aten.addmm", "aten.baddbmm")
def _add_product(op: Operands) -> Verdict:
    names = ("mat1", "mat2") if "mat1" in op._arguments else ("batch1", "batch2")
    multiplied = product(op, op.axes(names[0]), op.axes(names[1]))
    assert isinstance(multiplied.axes, Axes)
    summed = rowwise(op, [op.axes("self"), multiplied.axes])
    return Verdict(summed.axes, multiplied.kind if summed.kind is Kind.ROWS else summed.kind)


@rule("aten.einsum")
def _einsum(op: Operands) -> Verdict:
    inputs, _, output = op["equation"].replace(" ", "").partition("->")
    operands = [op.axes(node) for node in op["tensors"]]
    letters: dict[str, Dim] = {}
    owners: dict[str, int] = {}
    for index, (subscript, axes) in enumerate(zip(inputs.split(","), operands, strict=True)):
        if len(subscript) != len(axes) or len(set(subscript)) != len(subscript):
            raise op.refuse("einsum", f"has the equation {op['equation']!r}, which is not analysed")
        for letter, dim in zip(subscript, axes.dims, strict=True):
            if letters.setdefault(letter, dim) != dim:
                raise op.refuse("broadcast", f"pairs different axes under {letter!r}")
            owners[letter] = index
    contracted = [dim for letter, dim in letters.items() if letter not in output and has_token(dim)]
    if any(dim != (Token.S,) for dim in contracted):
        raise op.refuse("mixes-tokens", "contracts a batch axis")
    result = Axes(tuple(letters[letter] for letter in output))
    if sum(Token.B in dim for dim in result.dims) > 1:
        raise op.refuse("mixes-tokens", "pairs tokens of different samples")
    kind = Kind.PAIRS if contracted else kind_of_product(result, *operands)
    shared = [axes for axes in operands if axes.sequences and not axes.has_batch]
    if kind is Kind.PAIRS and shared and result.has_batch and op.symbols.batch != 1:
        # At the active positions it is another one for every sample, and the equation has no letter for that.
        raise op.refuse("einsum", "takes an operand over positions that all samples share")
    return Verdict(result, kind)
