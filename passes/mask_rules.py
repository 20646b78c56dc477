"""Find the form of a mask's values by evaluating the operators that make it over the forms of what they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from regate_fx.passes.axes import Axes, Meaning, Token
from regate_fx.passes.base import fake, held_number, operator_name
from regate_fx.passes.mask_forms import (
    Constant,
    Form,
    Hides,
    Index,
    Padding,
    Sees,
    Two,
    as_sees,
    both,
    opposite,
    shown_by,
)
from regate_fx.passes.mask_values import constant, hides, hiding, of_values, rounded, two
from regate_fx.passes.plan_nodes import PlanNodes
from regate_fx.passes.rules import Operands
from regate_fx.passes.rules_shape import is_whole_slice
from regate_fx.passes.token_axes import TokenAxes
from regate_fx.passes.token_symbols import size_expr

_KEEPS = {
    "aten.expand", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy",
    "aten.expand_as", "aten.broadcast_to",
}  # fmt: skip


def form_of(node: fx.Node, forms: dict[fx.Node, Form], analysis: TokenAxes, plan: PlanNodes) -> Form:
    if node is plan.attention_mask:
        return None if fake(node).is_floating_point() else Padding(-1)
    if (number := held_number(node)) is not None:
        return Constant(number)
    if node.op != "call_function" or not isinstance(fake(node), torch.Tensor):
        return None
    op = Operands(node, analysis.axes, analysis.symbols)
    name = operator_name(node)
    if name in _KEEPS:
        return forms.get(node.args[0])
    if name in _AND and all(map(_AND[name], node.args)):
        return both(*(as_sees(forms.get(arg)) for arg in node.args))
    if name in _OR and all(map(_is_bool, node.args)):
        return opposite(both(*(shown_by(forms.get(arg), False) for arg in node.args)))
    form = _EVALUATE[name](op, forms) if name in _EVALUATE else None
    return form if form is not None else of_values(op, forms)


def _is_shown(mask: Any) -> bool:
    """Whether what is not zero in a mask is seen; a mask that is added to scores has zeros there."""
    return isinstance(mask, fx.Node) and not fake(mask).is_floating_point()


def _is_bool(mask: Any) -> bool:
    return isinstance(mask, fx.Node) and fake(mask).dtype is torch.bool


# What they must take to be true where both are shown: ands of integers are those of their bits.
_AND = {"aten.__and__": _is_bool, "aten.bitwise_and": _is_bool, "aten.logical_and": _is_shown}
_OR = {"aten.__or__", "aten.bitwise_or", "aten.logical_or"}


def _arange(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    axes = op.known(op.node)
    if not _counts(op) or not isinstance(axes, Axes) or axes.meaning is not Meaning.ARANGE:
        return None
    return Index(axes.dims[0][0], -1) if axes.dims[0] in ((Token.B,), (Token.S,)) else None


def _counts(op: Operands) -> bool:
    """Whether a dtype has all positions of a sequence, and all differences of two."""
    return fake(op.node).dtype in (torch.int32, torch.int64, torch.float32, torch.float64)


def _shift(sign: int) -> Callable[[Operands, dict[fx.Node, Form]], Form]:
    def shift(op: Operands, forms: dict[fx.Node, Form]) -> Form:
        form, other = forms.get(op["self"]), op["other"]
        if op._arguments.get("alpha", 1) != 1:
            return None
        if isinstance(form, Index) and isinstance(other, int) and _counts(op):
            return replace(form, offset=form.offset + sign * other)
        if sign == 1 and _hide(forms, op["self"], other):
            return hiding(both(*(as_sees(forms.get(mask)) for mask in (op["self"], other))))
        return None

    return shift


def _hide(forms: dict[fx.Node, Form], *masks: Any) -> bool:
    """Whether all are masks that are added to scores: what one hides, their sum hides."""
    return all(isinstance(forms.get(mask), Hides) for mask in masks)


def _compare(low: int | None, high: int | None) -> Callable[[Operands, dict[fx.Node, Form]], Form]:
    """`self - other` lies in [low, high]."""

    def compare(op: Operands, forms: dict[fx.Node, Form]) -> Form:
        left, right = (
            forms.get(op["self"]),
            forms.get(op["other"]) if isinstance(op["other"], fx.Node) else None,
        )
        if not isinstance(left, Index) or not isinstance(right, Index):
            return None
        if left.token is not Token.S or right.token is not Token.S:
            return None
        # left.index + left.offset - right.index - right.offset in [low, high]
        shift = right.offset - left.offset
        bounds = (
            -math.inf if low is None else low + shift,
            math.inf if high is None else high + shift,
        )
        if (left.dim, right.dim) == (-1, -2):
            return Sees(*bounds)
        if (left.dim, right.dim) == (-2, -1):
            return Sees(-bounds[1], -bounds[0])
        return None

    return compare


def _moved(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    """Views that only add and take away dimensions of size one."""
    before, after = ([size_expr(size) for size in fake(node).shape] for node in (op["self"], op.node))
    old, new = (
        [dim - len(sizes) for dim, size in enumerate(sizes) if size != 1] for sizes in (before, after)
    )
    if [before[dim] for dim in old] != [after[dim] for dim in new]:
        return None
    return _renumbered(forms.get(op["self"]), dict(zip(old, new, strict=True)))


def _renumbered(form: Form, dims: dict[int, int]) -> Form:
    if isinstance(form, (Two, Hides)):
        of = _renumbered(form.of, dims)
        return replace(form, of=of) if isinstance(of, (Sees, Padding)) else None
    if isinstance(form, Sees):
        return form if dims.get(-1) == -1 and dims.get(-2) == -2 else None
    if isinstance(form, (Index, Padding)):
        return replace(form, dim=dims[form.dim]) if form.dim in dims else None
    return form


def _slice(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    return forms.get(op["self"]) if is_whole_slice(op) else None


def _cast(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    """What is no padding stays that, whatever number it is, unless it is added to scores."""
    form = forms.get(op["self"])
    is_kept = isinstance(form, Padding) and not fake(op.node).is_floating_point()
    return form if is_kept or (isinstance(form, Index) and _counts(op)) else None


def _triangle(upper: bool) -> Callable[[Operands, dict[fx.Node, Form]], Form]:
    """A constant on one side of a diagonal, and zeros on the other."""

    def triangle(op: Operands, forms: dict[fx.Node, Form]) -> Form:
        value, diagonal, axes = constant(op["self"], forms), op["diagonal"], op.known(op["self"])
        if value is None or not isinstance(diagonal, int) or not isinstance(axes, Axes):
            return None
        if axes.dims[-2:] != ((Token.S,), (Token.S,)):
            return None
        of = Sees(low=diagonal) if upper else Sees(high=diagonal)
        return two(op, of, value, 0.0)

    return triangle


def _look_up(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    """`padding[sample, position]` by two indices."""
    source = forms.get(op["self"])
    picks = [forms.get(index) for index in op["indices"]]
    if source != Padding(-1) or len(picks) != 2 or fake(op["self"]).dtype is not torch.bool:
        return None
    sample, position = picks
    if not isinstance(position, Index) or position.token is not Token.S or position.offset != 0:
        return None
    if op.symbols.batch != 1 and not (
        isinstance(sample, Index) and sample.token is Token.B and not sample.offset
    ):
        return None
    return Padding(position.dim)


def _filled(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    name = operator_name(op.node)
    value = op["fill_value"] if "fill_value" in op._arguments else float("ones" in name)
    if not isinstance(value, (bool, int, float)):
        return None
    held = rounded(float(value), fake(op.node).dtype)
    return None if held is None else Constant(held)


def _fill(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    return _hidden_further(op, forms, op["self"], op["value"], shown_by(forms.get(op["mask"]), False))


def _where(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    condition = forms.get(op["condition"])
    mask, number, is_shown = ("self", "other", True) if _hide(forms, op["self"]) else ("other", "self", False)
    return _hidden_further(op, forms, op[mask], op[number], shown_by(condition, is_shown))


def _hidden_further(op: Operands, forms: dict[fx.Node, Form], mask: Any, value: Any, shown: Form) -> Form:
    """A mask that is added to scores, in which one more thing is hidden."""
    number = constant(value, forms)
    if number is None or not hides(number, fake(op.node).dtype) or not _hide(forms, mask):
        return None
    return hiding(both(as_sees(forms.get(mask)), shown))


_EVALUATE: dict[str, Callable[[Operands, dict[fx.Node, Form]], Form]] = {
    "aten.arange": _arange,
    "aten.add": _shift(1),
    "aten.sub": _shift(-1),
    "aten.le": _compare(None, 0),
    "aten.lt": _compare(None, -1),
    "aten.ge": _compare(0, None),
    "aten.gt": _compare(1, None),
    "aten.tril": _triangle(upper=False),
    "aten.triu": _triangle(upper=True),
    "aten.masked_fill": _fill,
    "aten.unsqueeze": _moved,
    "aten.slice": _slice,
    "aten.view": _moved,
    "aten.reshape": _moved,
    "aten._to_copy": _cast,
    "aten.index": _look_up,
    "aten.new_ones": _filled,
    "aten.ones": _filled,
    "aten.zeros": _filled,
    "aten.new_zeros": _filled,
    "aten.full": _filled,
    "aten.new_full": _filled,
    "aten.where": _where,
}
