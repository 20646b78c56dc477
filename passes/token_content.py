"""Where a value varies with token content: along which of its position axes, and whether it scores pairs by it.

A pattern over positions (a shift, a triangle of learned weights) has the axes of attention weights without being
any, and a table that happens to have S rows has the axes of keys. What tells them apart is the content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from regate_fx.passes.axes import Axes, Dim, has_token, is_sequence
from regate_fx.passes.base import operator_name
from regate_fx.passes.contractions import MATRIX_PRODUCTS, contractions
from regate_fx.passes.layers import DecoderStack
from regate_fx.passes.rules import Operands
from regate_fx.passes.rules_math import reduced_dims
from regate_fx.passes.token_axes import TokenAxes

# For each sequence factor of a value, outermost first: does the value vary with the tokens along it?
Along = tuple[bool, ...]

MOVES = {"aten.permute", "aten.transpose", "aten.t", "aten.mT", "aten.swapaxes"}
_SUMS = {"aten.sum", "aten.mean", "aten.linalg_vector_norm", "aten.norm"}


@dataclass
class TokenContent:
    """`along[x]`: the sequence axes along which x varies with token content.

    `scored`: values over (query, key) pairs made from a number per pair that content took part in: a product or a
    sum over features, as of queries with keys. A broadcast of rows to pairs is none, whatever it is multiplied with.
    """

    along: dict[fx.Node, Along] = field(default_factory=dict)
    scored: set[fx.Node] = field(default_factory=set)

    def varies(self, node: fx.Node, axes: Axes, dim: int) -> bool:
        """Whether a value of these axes varies with token content along one of its dimensions."""
        return any(_by_dim(axes, self.along.get(node, ()))[dim])


def token_content(nodes: Iterable[fx.Node], stack: DecoderStack, analysis: TokenAxes) -> TokenContent:
    """Follow token content through a graph, whose nodes are given in order."""
    content = TokenContent()
    for node in nodes:
        axes = _axes(node, analysis)
        if axes is None or node not in stack.content:
            continue
        if not any(source in stack.content for source in node.all_input_nodes):
            content.along[node] = (True,) * axes.sequences
            continue
        content.along[node] = _along(node, axes, analysis, content)
        if axes.sequences > 1 and _is_scored(node, axes, analysis, content):
            content.scored.add(node)
    return content


def _axes(node: fx.Node, analysis: TokenAxes) -> Axes | None:
    """Axes of a value; of several values the first's, whose position axes the others share."""
    result = analysis.axes.get(node)
    return result[0] if isinstance(result, tuple) else result


def order_after(op: Operands, axes: Axes) -> list[int]:
    """Which dimension of `axes` comes where, after one of `MOVES`."""
    order = list(range(len(axes)))
    if operator_name(op.node) == "aten.permute":
        return [op.dim(dim, axes) for dim in op["dims"]]
    first, second = (op["dim0"], op["dim1"]) if "dim0" in op._arguments else (-2, -1)
    order[first], order[second] = order[second], order[first]
    return order


# -- along which axes ------------------------------------------------------------------------------------


def _by_dim(axes: Axes, along: Along) -> list[Along]:
    """The entries of `along`, grouped by the dimensions that the sequence factors are in."""
    entries = iter(along)
    return [tuple(next(entries, False) for factor in dim if is_sequence(factor)) for dim in axes.dims]


def _along(node: fx.Node, axes: Axes, analysis: TokenAxes, content: TokenContent) -> Along:
    sources = [
        (known, content.along.get(s, ())) for s in node.all_input_nodes if (known := _axes(s, analysis))
    ]
    if not axes.sequences:
        return ()
    if axes.sequences == 1 and all(known.sequences <= 1 for known, _ in sources):
        return (any(any(along) for _, along in sources),)
    if node in analysis.unproven:
        return (False,) * axes.sequences
    op = Operands(node, analysis.axes, analysis.symbols)
    name = operator_name(node)
    if name == "aten.scaled_dot_product_attention":
        return (any(any(content.along.get(op[side], ())) for side in ("query", "key", "value")),)
    if name == "aten.einsum":
        return _along_einsum(op, content)
    if name in MATRIX_PRODUCTS:
        return _along_product(op, axes, content)
    with_tokens = [(known, along) for known, along in sources if known.has_tokens]
    if len(with_tokens) == 1:
        known, along = with_tokens[0]
        parts = _by_dim(known, along)
        if name in MOVES:
            return _flat(parts[dim] for dim in order_after(op, known))
        if known.sequences > axes.sequences:
            reduced = reduced_dims(op, known)
            return _flat(part for dim, part in enumerate(parts) if dim not in reduced)
        if known.sequences == axes.sequences:
            return along
    if all(known.sequences == axes.sequences for known, _ in with_tokens):
        return _either(axes.sequences, [along for _, along in with_tokens])
    return _broadcast(axes, with_tokens)


def _flat(parts: Iterable[Along]) -> Along:
    return tuple(entry for part in parts for entry in part)


def _either(count: int, alternatives: Sequence[Along]) -> Along:
    return tuple(any(along[i : i + 1] == (True,) for along in alternatives) for i in range(count))


def _broadcast(axes: Axes, sources: Sequence[tuple[Axes, Along]]) -> Along:
    """Dimensions aligned from the right; one that no source has was made by repeating the same values."""
    grouped = [(known, _by_dim(known, along)) for known, along in sources]
    parts: list[Along] = []
    for place, dim in enumerate(axes.dims, start=-len(axes)):
        aligned = [
            part[place] for known, part in grouped if -place <= len(known) and known.dims[place] == dim
        ]
        parts.append(_either(sum(map(is_sequence, dim)), aligned))
    return _flat(parts)


def _along_product(op: Operands, axes: Axes, content: TokenContent) -> Along:
    first = MATRIX_PRODUCTS[operator_name(op.node)]
    left, right = op.node.args[first : first + 2]
    rows, columns = (_by_dim(op.axes(side), content.along.get(side, ())) for side in (left, right))
    batch = _broadcast(
        Axes(axes.dims[:-2]),
        [
            (Axes(op.axes(side).dims[:-2]), _flat(parts[:-2]))
            for side, parts in ((left, rows), (right, columns))
        ],
    )
    return (*batch, *rows[-2], *columns[-1])


def _along_einsum(op: Operands, content: TokenContent) -> Along:
    inputs, _, output = op["equation"].replace(" ", "").partition("->")
    letters: dict[str, Along] = {}
    for subscript, source in zip(inputs.split(","), op["tensors"], strict=True):
        parts = _by_dim(op.axes(source), content.along.get(source, ()))
        for letter, part in zip(subscript, parts, strict=True):
            letters[letter] = _either(len(part), [part, letters.get(letter, ())])
    return _flat(letters[letter] for letter in output)


# -- scores ----------------------------------------------------------------------------------------------


def _is_scored(node: fx.Node, axes: Axes, analysis: TokenAxes, content: TokenContent) -> bool:
    if any(source in content.scored for source in node.all_input_nodes):
        return True
    if node in analysis.unproven:
        return False
    op = Operands(node, analysis.axes, analysis.symbols)
    varying = [source for source in node.all_input_nodes if any(content.along.get(source, ()))]
    if operator_name(node) in _SUMS:
        known = op.axes("self")
        features = [dim for dim in reduced_dims(op, known) if _is_feature(known.dims[dim])]
        return bool(features) and all(content.along[node])
    joins = any(
        _is_feature(factors[0].summed) and sum(f.axes.sequences > 0 for f in factors) > 1
        for factors in contractions(op)
    )
    if not varying or not joins:
        return False
    # A pattern over pairs times rows of one side says nothing on the other side, product over features or not.
    return all(content.along[node]) or all(op.axes(source).sequences == 1 for source in varying)


def _is_feature(dim: Dim) -> bool:
    """Whether a dimension holds several features; a product over a single one is a broadcast."""
    return dim != () and not has_token(dim)
