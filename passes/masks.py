"""Prove what an attention mask lets a query see: everything before it, a window, all, or whatever it says.

The mask's own sub-graph is evaluated over a small abstract domain: indices along a dimension, comparisons of two
of them, and the padding mask. What cannot be expressed there is not guessed; the mask is then read at the active
pairs as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from regate_fx.passes.axes import Axes, Meaning, Token
from regate_fx.passes.base import PassContext, PassResult, fake, operator_name
from regate_fx.passes.plan_nodes import PlanNodes
from regate_fx.passes.rules import Kind, Operands
from regate_fx.passes.rules_shape import is_whole_slice
from regate_fx.passes.token_axes import TokenAxes
from regate_fx.passes.token_symbols import size_expr


@dataclass(frozen=True)
class MaskProof:
    """What a query at position q sees. `explicit`: nothing could be proven, read the mask itself.

    causal: keys k <= q. window: 0, or W for keys k > q - W. Padding is left out: it is never active.
    """

    causal: bool = False
    window: int = 0
    explicit: bool = False

    def __str__(self) -> str:
        if self.explicit:
            return "mask read at active pairs"
        kind = "causal" if self.causal else "full"
        return f"{kind}, window {self.window}" if self.window else kind


@dataclass(frozen=True)
class Index:
    """Integers `index along dim + offset`; `dim` counts from the right, as broadcasting does."""

    token: Token
    dim: int
    offset: int = 0


@dataclass(frozen=True)
class Padding:
    """Whether position `dim` of the sample is no padding."""

    dim: int


@dataclass(frozen=True)
class Sees:
    """Booleans over (query, key) = dims (-2, -1): `low <= key - query <= high`, padding apart."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Constant:
    value: float


Form = Index | Padding | Sees | Constant | None


@dataclass(frozen=True)
class ProveMasks:
    """Prove the mask of every attention operator; puts `{node: MaskProof}` into the findings.

    Beside it, as `padding`: the nodes that are the padding mask, by key; as `forms`: what is known of each node.
    """

    name: str = "prove_masks"
    after: tuple[str, ...] = ("token_axes",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        analysis: TokenAxes = ctx.findings["token_axes"]
        plan: PlanNodes = ctx.findings["plan"]
        forms: dict[fx.Node, Form] = {}
        for node in gm.graph.nodes:
            forms[node] = _form(node, forms, analysis, plan)
        masks = {
            node: _proof(Operands(node, analysis.axes, analysis.symbols), forms)
            for node, kind in analysis.kinds.items()
            if kind is Kind.ATTENTION
        }
        ctx.findings["masks"] = masks
        ctx.findings["forms"] = forms
        ctx.findings["padding"] = {node for node, form in forms.items() if form == Padding(-1)}
        return PassResult(gm, sum(not proof.explicit for proof in masks.values()))


def _proof(op: Operands, forms: dict[fx.Node, Form]) -> MaskProof:
    mask = op["attn_mask"]
    if mask is None:
        return MaskProof(causal=bool(op["is_causal"]))
    return MaskProof(explicit=True) if op["is_causal"] else proof_of([forms[mask]])


def proof_of(masks: Sequence[Form]) -> MaskProof:
    """What a query sees behind masks of these forms, padding apart."""
    form: Form = Sees()
    for mask in masks:
        form = None if isinstance(mask, Constant) else _both(form, _as_sees(mask))
    if not isinstance(form, Sees) or form.high not in (0, math.inf):
        return MaskProof(explicit=True)
    if form.low == -math.inf:
        return MaskProof(causal=form.high == 0)
    window = int(1 - form.low)
    if form.high != 0 or window < 1:
        return MaskProof(explicit=True)
    return MaskProof(causal=True, window=window)


_KEEPS = {
    "aten.expand", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy",
    "aten.expand_as", "aten.broadcast_to",
}  # fmt: skip
_AND = {"aten.__and__", "aten.bitwise_and", "aten.logical_and"}


def _form(node: fx.Node, forms: dict[fx.Node, Form], analysis: TokenAxes, plan: PlanNodes) -> Form:
    if node is plan.attention_mask:
        return Padding(-1)
    if node.op != "call_function" or not isinstance(fake(node), torch.Tensor):
        return None
    op = Operands(node, analysis.axes, analysis.symbols)
    name = operator_name(node)
    if name in _KEEPS:
        return forms.get(node.args[0])
    if name in _AND and all(_is_shown(arg) for arg in node.args):
        return _both(*(_as_sees(forms.get(arg)) for arg in node.args))
    evaluate = _EVALUATE.get(name)
    return evaluate(op, forms) if evaluate is not None else None


def _is_shown(mask: Any) -> bool:
    """Whether what is not zero in a mask is seen; a mask that is added to scores has zeros there."""
    return isinstance(mask, fx.Node) and not fake(mask).is_floating_point()


def _as_sees(form: Form) -> Form:
    if isinstance(form, Constant):
        return Sees() if form.value else None
    return Sees() if form == Padding(-1) else form


def _both(a: Form, b: Form) -> Form:
    if isinstance(a, Sees) and isinstance(b, Sees):
        return Sees(max(a.low, b.low), min(a.high, b.high))
    return None


def _arange(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    axes = op._axes.get(op.node)
    if isinstance(axes, Axes) and axes.meaning is Meaning.ARANGE and axes.dims[0] in ((Token.B,), (Token.S,)):
        return Index(axes.dims[0][0], -1)
    return None


def _shift(sign: int) -> Callable[[Operands, dict[fx.Node, Form]], Form]:
    def shift(op: Operands, forms: dict[fx.Node, Form]) -> Form:
        form, other = forms.get(op["self"]), op["other"]
        if isinstance(form, Index) and isinstance(other, int) and op._arguments.get("alpha", 1) == 1:
            return replace(form, offset=form.offset + sign * other)
        return None

    return shift


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
    """`unsqueeze`: dims left of the new one move away from the right edge."""
    form = forms.get(op["self"])
    rank = len(op.shape)
    new = op["dim"] % rank - rank
    if isinstance(form, Sees):
        return form if new < -2 else None
    if not isinstance(form, (Index, Padding)):
        return form if isinstance(form, Constant) else None
    return replace(form, dim=form.dim - 1) if form.dim <= new else form


def _slice(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    return forms.get(op["self"]) if is_whole_slice(op) else None


def _view(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    before, after = ([size_expr(size) for size in fake(node).shape] for node in (op["self"], op.node))
    return forms.get(op["self"]) if before == after else None


def _cast(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    form = forms.get(op["self"])
    if not isinstance(form, (Padding, Sees)):
        return form
    if not _is_shown(op["self"]) or not _is_shown(op.node):
        return None
    return form if isinstance(form, Padding) or fake(op.node).dtype is torch.bool else None


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
    return Constant(float(value)) if isinstance(value, (bool, int, float)) else None


def _where(op: Operands, forms: dict[fx.Node, Form]) -> Form:
    """An additive mask: zero where the condition sees, the lowest number elsewhere."""
    condition = forms.get(op["condition"])
    if not isinstance(condition, (Sees, Padding)):
        return None
    kept, dropped = (_constant(op[name], forms) for name in ("self", "other"))
    return _as_sees(condition) if kept == 0 and dropped is not None and _hides(dropped, op) else None


def _constant(value: Any, forms: dict[fx.Node, Form]) -> float | None:
    if isinstance(value, fx.Node):
        form = forms.get(value)
        return form.value if isinstance(form, Constant) else None
    return float(value)


def _hides(value: float, op: Operands) -> bool:
    dtype = fake(op.node).dtype
    return dtype.is_floating_point and value <= torch.finfo(dtype).min


_EVALUATE: dict[str, Callable[[Operands, dict[fx.Node, Form]], Form]] = {
    "aten.arange": _arange,
    "aten.add": _shift(1),
    "aten.sub": _shift(-1),
    "aten.le": _compare(None, 0),
    "aten.lt": _compare(None, -1),
    "aten.ge": _compare(0, None),
    "aten.gt": _compare(1, None),
    "aten.unsqueeze": _moved,
    "aten.slice": _slice,
    "aten.view": _view,
    "aten.reshape": _view,
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
