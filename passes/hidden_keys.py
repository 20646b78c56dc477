"""What a pair of positions holds where a mask hides its key, and which sums over keys would count that.

The compact layout leaves an elided key out of every sum over keys. The model itself would hide it, by writing a
constant: the lowest number before a softmax, zero behind it. Where that constant is known to count for something
(`where(visible, scores, 0).amax(-1)`), leaving the key out and hiding it are not the same, and the layer is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from regate_fx.passes.axes import Axes, has_token, is_sequence
from regate_fx.passes.base import fake, held_number, is_tensor, operator_name
from regate_fx.passes.contractions import MATRIX_PRODUCTS, contractions, over_positions
from regate_fx.passes.hidden_elements import (
    NEGLIGIBLE,
    NOT_ZERO,
    UNKNOWN,
    Constants,
    counting,
    is_elementwise,
    of_elements,
)
from regate_fx.passes.layers import DecoderStack
from regate_fx.passes.rules import Operands
from regate_fx.passes.rules_math import MASKABLE, reduced_dims
from regate_fx.passes.token_axes import TokenAxes
from regate_fx.passes.token_content import MOVES, order_after

_FILL = {
    "aten.full": None, "aten.new_full": None, "aten.full_like": None, "aten.zeros": 0.0, "aten.new_zeros": 0.0,
    "aten.zeros_like": 0.0, "aten.ones": 1.0, "aten.new_ones": 1.0, "aten.ones_like": 1.0,
}  # fmt: skip
SOFTMAX = {"aten.softmax", "aten._softmax"}
# Operators that reorder, regroup or pick features, or only say something about memory and gradients.
_KEEP = MOVES | {
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.squeeze",
    "aten.unsqueeze", "aten.expand", "aten.expand_as", "aten.broadcast_to", "aten.clone", "aten.contiguous",
    "aten.alias", "aten.detach", "aten.lift_fresh_copy", "aten.slice", "aten.select", "aten.split",
    "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.repeat", "aten.repeat_interleave", "getitem",
}  # fmt: skip
_NOT_NEGATIVE = {
    "aten.exp", "aten.sigmoid", "aten.square", "aten.abs", "aten.relu", "aten.softplus", "aten.exp2",
} | SOFTMAX  # fmt: skip
_VALUES = {"aten.where": (1, 2), "aten.masked_fill": (0, 2)}  # the operands whose values are the result's
_NOT_NEGATIVE_OF_SUCH = {"aten.add", "aten.mul", "aten.div", "aten.where", "aten.masked_fill", "aten.sqrt"}


@dataclass
class HiddenKeys:
    """`constants[x]`: what x may hold along its last axis of positions where a mask hides that position.

    not_negative: values that are nowhere below zero. of_padding: values that depend on the padding mask.
    """

    constants: dict[fx.Node, Constants] = field(default_factory=dict)
    not_negative: set[fx.Node] = field(default_factory=set)
    of_padding: set[fx.Node] = field(default_factory=set)

    def of(self, node: object) -> Constants:
        return self.constants.get(node, UNKNOWN) if isinstance(node, fx.Node) else UNKNOWN

    def why_counted(self, op: Operands) -> str | None:
        """Why an operator that reduces or sums over keys would count hidden ones, if it is known to."""
        name = operator_name(op.node)
        if name == "aten.scaled_dot_product_attention":
            counted = self._counted_by_mask(op)
        elif name in MATRIX_PRODUCTS or name == "aten.einsum":
            counted = self._counted_in_product(op)
        elif name == "aten.sum":
            counted = counting(self.of(op["self"]))
        elif name in MASKABLE:
            counted = [value for value in self.of(op["self"]) if value > NEGLIGIBLE]
            if name == "aten.amax" and op["self"] in self.not_negative:
                counted = counting(counted)
        else:
            return None
        return _reason(counted) if counted else None

    def _counted_in_product(self, op: Operands) -> list[float]:
        """Constants along the keys that a product sums over, unless a zero in another factor leaves them out."""
        for factors in over_positions(op):
            constants = [
                self.of(factor.source) if factor.dim - len(factor.axes) == _key_dim(factor.axes) else UNKNOWN
                for factor in factors
            ]
            counted = [value for known in constants for value in counting(known)]
            if counted and not any(known and not counting(known) for known in constants):
                return counted
        return []

    def _counted_by_mask(self, op: Operands) -> list[float]:
        """What a mask of numbers adds to the scores of padding, if that hides nothing."""
        mask = op["attn_mask"]
        if mask not in self.of_padding or _dtype(mask) is torch.bool or not has_token(op.axes(mask).dims[-1]):
            return []
        constants = list(self.of(mask))
        return constants if not any(value <= NEGLIGIBLE for value in constants) else []


def _reason(counted: list[float]) -> str:
    value = counted[0]
    shown = "more than nothing" if math.isnan(value) else f"{value + 0.0:g}"
    return f"counts {shown} for every key that a mask hides, and would count nothing for one that is elided"


def hidden_keys(
    nodes: Iterable[fx.Node], stack: DecoderStack, analysis: TokenAxes, padding: set[fx.Node]
) -> HiddenKeys:
    """Follow what masks write through a graph, whose nodes are given in order.

    padding: nodes known to be the padding mask, by key.
    """
    found = HiddenKeys(of_padding=set(padding))
    for node in nodes:
        if not is_tensor(node) and not isinstance(fake(node), (tuple, list)):
            continue
        if any(source in found.of_padding for source in node.all_input_nodes):
            found.of_padding.add(node)
        if node in padding:
            found.constants[node] = frozenset({0.0})
        elif constants := _constants(node, found, stack, analysis):
            found.constants[node] = constants
        if _is_not_negative(node, found):
            found.not_negative.add(node)
    return found


def _is_not_negative(node: fx.Node, found: HiddenKeys) -> bool:
    name = operator_name(node)
    if name in _NOT_NEGATIVE or _dtype(node) is torch.bool:
        return True
    if name in _KEEP or name in ("aten.sum", "aten._to_copy", "aten.dropout"):
        return node.args[0] in found.not_negative
    if name in ("aten.pow", "aten.clamp", "aten.clamp_min"):
        number = node.args[1] if len(node.args) > 1 else None
        return isinstance(number, (int, float)) and (number % 2 == 0 if name == "aten.pow" else number >= 0)
    if name not in _NOT_NEGATIVE_OF_SUCH or node.kwargs:
        return False
    places = _VALUES.get(name, range(len(node.args)))
    if len(node.args) <= max(places):
        return False  # `where(condition)` gives places
    return all(_is_known_above_zero(node.args[place], found) for place in places)


def _is_known_above_zero(value: object, found: HiddenKeys) -> bool:
    if isinstance(value, fx.Node):
        return value in found.not_negative
    return isinstance(value, (bool, int, float)) and value >= 0


def _key_dim(axes: object) -> int | None:
    """The last dimension with a sequence axis, counted from the right (-1 is the last)."""
    if not isinstance(axes, Axes):
        return None
    places = [index for index, dim in enumerate(axes.dims) if any(map(is_sequence, dim))]
    return places[-1] - len(axes) if places else None


def _axes_of(node: fx.Node, analysis: TokenAxes) -> Axes | None:
    result = analysis.axes.get(node)
    return result[0] if isinstance(result, tuple) else result


def _constants(node: fx.Node, found: HiddenKeys, stack: DecoderStack, analysis: TokenAxes) -> Constants:
    axes = _axes_of(node, analysis)
    if axes is None or node in analysis.unproven or node.op != "call_function":
        return _given(node, axes)
    if node in stack.content and axes.sequences < 2:
        return UNKNOWN
    constants = _computed(node, axes, found, analysis)
    if node in stack.content or _key_dim(axes) is None or _dtype(node) is not torch.bool:
        return constants
    # A mask over keys that is not made of the padding hides some pairs, and it is not known which ones.
    return constants if constants and node in found.of_padding else frozenset({0.0, 1.0})


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = fake(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def _given(node: fx.Node, axes: Axes | None) -> Constants:
    """A mask over pairs or keys that the caller or a buffer gives, or a number that the code holds as a tensor."""
    if (number := held_number(node)) is not None:
        return frozenset({number})
    is_mask = node.op in ("placeholder", "get_attr") and _dtype(node) is torch.bool
    return frozenset({0.0, 1.0}) if is_mask and _key_dim(axes) is not None else UNKNOWN


def _computed(node: fx.Node, axes: Axes, found: HiddenKeys, analysis: TokenAxes) -> Constants:
    name = operator_name(node)
    op = Operands(node, analysis.axes, analysis.symbols)
    if name in _KEEP:
        return _kept(op, name, axes, found)
    if name.endswith("dropout"):
        return _of_dropout(found.of(op.node.args[0]))
    if name in SOFTMAX:
        return _of_softmax(op, found)
    if name in ("aten.cat", "aten.concat", "aten.stack"):
        parts = [found.of(part) for part in op["tensors"]]
        return frozenset().union(*parts) if all(parts) else UNKNOWN
    if name in MATRIX_PRODUCTS or name in ("aten.einsum", "aten.linear"):
        return _of_product(op, name, axes, found)
    if name in ("aten.sum", "aten.mean"):
        return _of_sum(op, axes, found)
    if name in _FILL:
        value = _FILL[name] if _FILL[name] is not None else op["fill_value"]
        return frozenset({float(value)}) if isinstance(value, (bool, int, float)) else UNKNOWN
    if not is_elementwise(node):
        return UNKNOWN
    operands = op.tensors()
    constants = [_aligned(operand, axes, op, found) for operand in operands]
    # A pair that is multiplied with a constant may be hidden itself, or only later; a row is not.
    scalable = all(
        _key_dim(op.axes(operand)) is not None if known else op.axes(operand).sequences < 2
        for operand, known in zip(operands, constants, strict=True)
    )
    return of_elements(node, operands, constants, scalable)


def _aligned(operand: fx.Node, axes: Axes, op: Operands, found: HiddenKeys) -> Constants:
    """An operand's constants at the keys of a result: its own keys, or a constant without positions."""
    constants, key = found.of(operand), _key_dim(op.axes(operand))
    return constants if key == _key_dim(axes) or (key is None and len(constants) == 1) else UNKNOWN


def _kept(op: Operands, name: str, axes: Axes, found: HiddenKeys) -> Constants:
    source = op.node.args[0]
    assert isinstance(source, fx.Node)
    constants = found.of(source)
    result = op.known(source)
    assert result is not None
    before = result[0] if isinstance(result, tuple) else result
    if before.sequences != axes.sequences and _key_dim(before) not in (None, _key_dim(axes)):
        return UNKNOWN  # queries, repeated for every key
    if name in MOVES and before.sequences > 1:
        order = [dim for dim in order_after(op, before) if any(map(is_sequence, before.dims[dim]))]
        return constants if order == sorted(order) else UNKNOWN
    return constants


def _of_dropout(constants: Constants) -> Constants:
    """Zero stays; what is no zero is one at some pairs, and scaled at the others."""
    if not constants or any(value <= NEGLIGIBLE for value in constants):
        return UNKNOWN
    return frozenset({NOT_ZERO if counting(constants) else 0.0})


def _of_softmax(op: Operands, found: HiddenKeys) -> Constants:
    axes, constants = op.axes("self"), found.of(op["self"])
    if not has_token(axes.dims[op.dim(op["dim"], axes)]):
        return frozenset({NOT_ZERO}) if len(constants) == 1 else UNKNOWN  # the same share for each
    hides = bool(constants) and all(value <= NEGLIGIBLE for value in constants)
    return frozenset({0.0}) if hides else UNKNOWN


def _of_product(op: Operands, name: str, axes: Axes, found: HiddenKeys) -> Constants:
    """A product over features of pairs: zero where they are, up to a bias."""
    if axes.sequences < 2 or name in ("aten.addmm", "aten.baddbmm"):
        return UNKNOWN
    if name == "aten.linear":
        if found.of(op["input"]) != {0.0}:
            return UNKNOWN
        return frozenset({0.0 if op["bias"] is None else NOT_ZERO})
    pairs = [factor.source for factors in contractions(op) for factor in factors if factor.axes.sequences > 1]
    if over_positions(op) or not any(found.of(source) == {0.0} for source in pairs):
        return UNKNOWN
    return frozenset({0.0})


def _of_sum(op: Operands, axes: Axes, found: HiddenKeys) -> Constants:
    """A sum over features of pairs: zero where all of them are; a mean of one constant is that."""
    before = op.axes("self")
    constants = found.of(op["self"])
    if axes.sequences < 2 or any(has_token(before.dims[dim]) for dim in reduced_dims(op, before)):
        return UNKNOWN
    is_one_mean = operator_name(op.node) == "aten.mean" and len(constants) == 1
    return constants if is_one_mean else constants & {0.0}
