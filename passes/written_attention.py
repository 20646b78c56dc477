"""Recognise attention that a model writes by hand, where one variable-length operator computes the same.

Softmax over scores of queries and keys, scaled by a number, capped, hidden by masks, beside a sink for each head, times
values. What has more in it (biases that are learned, weights that are read) keeps its own operators.

Masks are added to the scores, or filled into them (`masked_fill`, `where`). All of them may be proven to show every
query itself: then what is hidden counts for nothing. Else what they write is written again at the active pairs, and
must be nothing that a query without keys would see: a number that is filled in has no gradient, and the lowest one,
unlike minus infinity, would count.

Shapes: B samples, H heads, S positions, d width of a query and key, dv width of a value. What has B and H may have them
as one dimension B * H.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from regate_fx.passes.attention_operands import (
    CASTS,
    EXPANDS,
    PRODUCTS,
    Unlike,
    check_operands,
    heads_of,
    is_last,
    must,
    rounds_nothing,
    sinks_of,
)
from regate_fx.passes.base import fake, is_tensor, operator_name
from regate_fx.passes.hidden_keys import SOFTMAX
from regate_fx.passes.layers import Attention
from regate_fx.passes.mask_forms import Constant, Form, shown_by
from regate_fx.passes.masks import MaskProof, proof_of
from regate_fx.passes.shared_heads import COPIES
from regate_fx.passes.sink_softmax import read_sink_softmax
from regate_fx.passes.token_axes import TokenAxes
from regate_fx.passes.written_masks import Mask, why_not_one

aten = torch.ops.aten

_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
# Filled in for what is hidden: beside any score that is seen, it counts for nothing.
_HIDES = -1e4


@dataclass(frozen=True)
class WrittenAttention:
    """`softmax(query @ key * scale, capped, behind masks, beside sinks) @ value`.

    query: [B, H, S, d], key: [B, H, d, S], value: [B, H, S, dv]. result: the last product; inside: the operators before
    it, which nothing else reads. proof: what all masks together let a query see, or that they have to be read. softcap:
    0 where there is none. sinks: [1, 1 or H, 1, 1].
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    result: fx.Node
    scale: float
    inside: tuple[fx.Node, ...]
    proof: MaskProof
    masks: tuple[Mask, ...]
    softcap: float = 0.0
    sinks: fx.Node | None = None


@dataclass(frozen=True)
class OwnOperators:
    """An attention that keeps its operators: one operator could not do what `node` does."""

    node: fx.Node


def written_attention(
    attention: Attention,
    analysis: TokenAxes,
    forms: dict[fx.Node, Form],
    varying: Set[fx.Node],
) -> WrittenAttention | OwnOperators:
    """What a group of operators over pairs computes, where one operator could compute the same.

    varying: what depends on token content or carries gradients, which no mask may.
    """
    members = dict.fromkeys(attention.nodes)
    for node in attention.nodes:
        # Sums over keys are not over pairs any more, and belong to the softmax all the same.
        if (softmax := read_sink_softmax(node)) is not None and softmax.scores in members:
            members |= dict.fromkeys(softmax.inside)
    results = [node for node in members if any(user not in members for user in node.users)]
    other = next((node for node in results if operator_name(node) not in PRODUCTS), None)
    if other is not None or len(results) != 1:
        return OwnOperators(results[0] if other is None else other)
    return _Reader(tuple(members), results[0], analysis, forms, varying).read()


@dataclass
class _Reader:
    """Reads an attention from its result back to queries and keys.

    at: the member that is read. scale: the factors so far, of a cap those before it.
    keeps_finite: scores are kept from being less than the lowest number.
    """

    members: Sequence[fx.Node]
    result: fx.Node
    analysis: TokenAxes
    forms: dict[fx.Node, Form]
    varying: Set[fx.Node]
    inside: list[fx.Node] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    scale: float = 1.0
    softcap: float = 0.0
    sinks: fx.Node | None = None
    keeps_finite: bool = False
    at: fx.Node = field(init=False)

    def read(self) -> WrittenAttention | OwnOperators:
        self.at = self.result
        try:
            return self._read()
        except Unlike:
            return OwnOperators(self.at)

    def _read(self) -> WrittenAttention:
        weights, value = self.result.args[:2]
        softmax = self._behind(weights, self._hands_on_weights)
        product = self._behind(self._operand(softmax), self._hands_on_scores)
        must(operator_name(product) in PRODUCTS | {"aten.baddbmm"})
        query, key = self._factors(product)
        inside = (*self.inside, product)
        others = [node for node in self.members if node not in inside and node is not self.result]
        self.at = others[0] if others else product
        must(not others)
        must(not any(node in self.members for node in (query, key, value)))
        check_operands(query, key, value, product, self.result, self.analysis)
        proof = proof_of([mask.seen for mask in self.masks])
        if proof.explicit:
            must(not self.keeps_finite)
            strange = why_not_one(
                self.masks, self.analysis, heads_of(self.analysis.of(self.result), self.result)
            )
            self.at = strange or self.at
            must(strange is None)
        scale = self.scale * (self.softcap or 1.0)
        return WrittenAttention(
            query, key, value, self.result, scale, inside, proof, tuple(self.masks), self.softcap, self.sinks
        )

    def _behind(self, node: Any, passes: Callable[[fx.Node], bool]) -> fx.Node:
        while True:
            must(node in self.members)
            assert isinstance(node, fx.Node)
            self.at = node
            if not passes(node):
                return node
            node = self._through(node)

    def _operand(self, softmax: fx.Node) -> Any:
        """What a softmax over keys takes; notes the sinks."""
        found = read_sink_softmax(softmax)
        if found is None:
            must(
                operator_name(softmax) in SOFTMAX
                and is_last(softmax.args[1], softmax)
                and rounds_nothing(softmax)
            )
            return self._through(softmax)
        self.inside += [softmax, *found.inside]
        self.sinks = sinks_of(found.sink, self.result, self.analysis)
        must(self.sinks not in self.members)
        return found.scores

    def _through(self, node: fx.Node) -> Any:
        """The member that an operator takes: the only one, or others are missing among those inside."""
        self.inside.append(node)
        return next((source for source in node.all_input_nodes if source in self.members), None)

    def _hands_on_weights(self, node: fx.Node) -> bool:
        if operator_name(node) == "aten.dropout":
            must(node.args[1] == 0 or not node.args[2])
            return True
        return self._hands_on(node, fake(self.result.args[1]).dtype)

    def _hands_on(self, node: fx.Node, narrow: torch.dtype | None = None) -> bool:
        """Copies, samples and heads as one dimension or two, and casts that round nothing or to `narrow`."""
        name, source = operator_name(node), node.args[0] if node.args else None
        if name in CASTS:
            before, after = fake(source).dtype, fake(node).dtype
            must(before.is_floating_point and after.is_floating_point)
            must(after == narrow or rounds_nothing(node))
            return True
        if node.target in _VIEWS:
            heads = [heads_of(self.analysis.of(value), value) for value in (source, node)]
            must(heads[0] is not None and heads[0] == heads[1])
            return True
        return name in COPIES

    def _hands_on_scores(self, node: fx.Node) -> bool:
        """What is done to a score before the softmax; notes masks, factors and a cap."""
        if self._hands_on(node) or self._keeps_finite(node):
            return True
        if (factor := self._factor(node)) is not None:
            self.scale *= factor
            return True
        return self._caps(node) or self._hides(node)

    def _keeps_finite(self, node: fx.Node) -> bool:
        """`max(score, lowest number)`: of a pair that is proven to be hidden as good, of another the same."""
        if operator_name(node) not in ("aten.maximum", "aten.max") or len(node.args) != 2:
            return False
        bound = self._number(next((other for other in node.args if other not in self.members), None))
        must(bound is not None and bound <= torch.finfo(fake(node).dtype).min)
        self.keeps_finite = True
        return True

    def _caps(self, node: fx.Node) -> bool:
        """Whether scores are capped: `c * tanh(score / c)`, of which `c` was read as a factor."""
        if operator_name(node) != "aten.tanh":
            return False
        must(self.softcap == 0.0 and self.scale > 0.0)
        self.softcap, self.scale = self.scale, 1.0
        return True

    def _factor(self, node: fx.Node) -> float | None:
        """What a score is multiplied by."""
        name = operator_name(node)
        if name not in ("aten.mul", "aten.div"):
            return None
        must(len(node.args) == 2 and not node.kwargs and node.args[0] in self.members)
        number = self._finite(node.args[1])
        return number if name == "aten.mul" else 1.0 / number

    def _hides(self, node: fx.Node) -> bool:
        """Whether a mask is added or filled in."""
        name, args = operator_name(node), node.args
        if name == "aten.add":
            others = [argument for argument in args if argument not in self.members]
            must(len(args) == 2 and not node.kwargs and len(others) == 1)
            self._add(others[0], fake(node).dtype)
        elif name == "aten.masked_fill":
            self._fill(node, args[1], args[2], is_shown=False)
        elif name == "aten.where" and len(args) == 3:
            is_shown = args[1] in self.members
            self._fill(node, args[0], args[2] if is_shown else args[1], is_shown)
        else:
            return False
        # A factor or a cap behind a mask would be the mask's, too.
        must(self.scale == 1.0 and self.softcap == 0.0)
        return True

    def _add(self, mask: Any, dtype: torch.dtype) -> None:
        mask = self._source(mask)
        # What is not zero in a mask of bools or integers is shown, as a mask that is added it is something else.
        must(fake(mask).is_floating_point())
        self.masks.insert(0, Mask(mask, dtype, self.forms.get(mask)))

    def _fill(self, node: fx.Node, condition: Any, value: Any, is_shown: bool) -> None:
        condition, number = self._source(condition), self._number(value)
        must(fake(condition).dtype is torch.bool and number is not None and number <= _HIDES)
        seen = shown_by(self.forms.get(condition), is_shown)
        self.masks.insert(0, Mask(condition, fake(node).dtype, seen, number, is_shown))

    def _source(self, mask: Any) -> fx.Node:
        """A mask before it was expanded, or got samples and heads as one dimension."""
        must(is_tensor(mask) and mask not in self.members)
        while operator_name(mask) in EXPANDS or operator_name(mask) in COPIES or self._merges(mask):
            mask = mask.args[0]
        must(mask not in self.varying)
        return mask

    def _merges(self, mask: fx.Node) -> bool:
        if mask.target not in _VIEWS:
            return False
        before, after = self.analysis.of(mask.args[0]), self.analysis.of(mask)
        return (len(before), len(after)) == (4, 3) and before.dims[2:] == after.dims[1:]

    def _number(self, value: Any) -> float | None:
        """A number that is the same in every call; one in a tensor may be learned, or set later."""
        if is_tensor(value):
            form = self.forms.get(value)
            value = form.value if isinstance(form, Constant) and not fake(value).dim() else None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return float(value)

    def _finite(self, value: Any) -> float:
        """A number that scores may be multiplied with, or divided by."""
        number = self._number(value)
        if number is None or number == 0.0 or not math.isfinite(number):
            raise Unlike
        return number

    def _factors(self, product: fx.Node) -> tuple[Any, Any]:
        """Queries and keys; of `baddbmm`, notes what it adds to their products."""
        if operator_name(product) != "aten.baddbmm":
            return product.args[0], product.args[1]
        added, query, key = product.args
        beta, alpha = (product.kwargs.get(name, 1) for name in ("beta", "alpha"))
        number = self._finite(alpha)
        if beta != 0 and self.forms.get(added) != Constant(0.0):
            must(beta == 1 and self.scale == 1.0 and self.softcap == 0.0)
            self._add(added, fake(product).dtype)
        self.scale *= number
        return query, key
