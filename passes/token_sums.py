"""Sums over tokens outside attention: a router's auxiliary loss, say. They are sums over the active tokens.

So is what they are divided by: a sum over the padding mask, or the number of positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from regate_fx.passes.axes import Axes, Meaning
from regate_fx.passes.base import Refused, is_tensor, operator_name
from regate_fx.passes.layers import DecoderStack
from regate_fx.passes.plan_nodes import PlanNodes, made_from
from regate_fx.passes.rules import Kind
from regate_fx.passes.token_axes import TokenAxes

# Rows of each expert, counted to find them again: that is no sum to be taken over other rows than are grouped.
FOR_FINDING = (Meaning.COUNTS, Meaning.OFFSETS)


@dataclass(frozen=True)
class TokenSums:
    """What sums over tokens, and all that is computed from such sums.

    content: from token embeddings, the loss included. beside: from masks and positions, and read with sums of `content`
    alone. plain: those of both that no loss is in, whose number of summands may be one over positions.
    """

    content: frozenset[fx.Node]
    beside: frozenset[fx.Node]
    plain: frozenset[fx.Node]

    @property
    def all(self) -> frozenset[fx.Node]:
        return self.content | self.beside

    def begin_at(self, analysis: TokenAxes) -> list[fx.Node]:
        """The nodes that sum rows, in graph order; the others compute with sums."""
        return [
            node
            for node in analysis.axes
            if node in self.plain
            and any(analysis.of(source).has_tokens for source in node.all_input_nodes if is_tensor(source))
        ]


def find_token_sums(stack: DecoderStack, analysis: TokenAxes, plan: PlanNodes) -> TokenSums:
    """Raises `Refused` where a sum over active tokens meets one over all positions that cannot be over fewer."""
    sums = [node for node in analysis.axes if is_sum(node, analysis) and node not in analysis.unproven]
    content = {node for node in sums if node in stack.content}
    of_losses = _downstream((node for node in sums if analysis.kinds[node] is Kind.LOSS), sums)
    beside: set[fx.Node] = set()
    for node in (node for node in analysis.axes if node in stack.content):
        others = [n for n in node.all_input_nodes if is_sum(n, analysis) and n not in stack.content]
        mates = [n for n in node.all_input_nodes if is_sum(n, analysis) and n in stack.content]
        if others and mates:
            found = _upstream(others, analysis)
            if not of_losses.isdisjoint(mates) or not _are_free(found, content, plan):
                raise Refused(
                    "mixed-sums",
                    f"{operator_name(node)} combines a sum over the active tokens with one over all positions",
                    node,
                )
            beside |= found
    return TokenSums(frozenset(content), frozenset(beside), frozenset((content - of_losses) | beside))


def is_sum(node: fx.Node, analysis: TokenAxes) -> bool:
    axes = analysis.axes.get(node)
    return isinstance(axes, Axes) and axes.aggregate and axes.meaning not in FOR_FINDING


def _downstream(first: Iterable[fx.Node], sums: list[fx.Node]) -> set[fx.Node]:
    found = set(first)
    for node in sums:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _upstream(last: Iterable[fx.Node], analysis: TokenAxes) -> set[fx.Node]:
    found, todo = set(last), list(last)
    while todo:
        fresh = {source for source in todo.pop().all_input_nodes if is_sum(source, analysis)} - found
        found |= fresh
        todo.extend(fresh)
    return found


def _are_free(beside: set[fx.Node], content: set[fx.Node], plan: PlanNodes) -> bool:
    """Whether sums are read by sums over tokens alone, and are not of labels, which belong to other rows."""
    from_labels = made_from(plan.labels) if plan.labels is not None else set()
    return from_labels.isdisjoint(beside) and all(
        user in beside | content for n in beside for user in n.users
    )
