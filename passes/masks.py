"""Prove what an attention mask lets a query see: everything before it, a window, all, or whatever it says.

What is proven comes from the form of its values. What has none is not guessed; the mask is then read at the active
pairs as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from regate_fx.passes.base import PassContext, PassResult
from regate_fx.passes.mask_forms import Constant, Form, Padding, Sees, as_sees, both
from regate_fx.passes.mask_rules import form_of
from regate_fx.passes.plan_nodes import PlanNodes
from regate_fx.passes.rules import Kind, Operands
from regate_fx.passes.token_axes import TokenAxes


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
            forms[node] = form_of(node, forms, analysis, plan)
        masks = {
            node: _proof(Operands(node, analysis.axes, analysis.symbols), forms)
            for node, kind in analysis.kinds.items()
            if kind is Kind.ATTENTION
        }
        ctx.findings["masks"] = masks
        ctx.findings["forms"] = forms
        padding = {node for node, form in forms.items() if form == Padding(-1)}
        ctx.findings["padding"] = padding if plan.attention_mask is None else padding | {plan.attention_mask}
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
        form = None if isinstance(mask, Constant) else both(form, as_sees(mask))
    if not isinstance(form, Sees) or form.high not in (0, math.inf):
        return MaskProof(explicit=True)
    if form.low == -math.inf:
        return MaskProof(causal=form.high == 0)
    window = int(1 - form.low)
    if form.high != 0 or window < 1:
        return MaskProof(explicit=True)
    return MaskProof(causal=True, window=window)
