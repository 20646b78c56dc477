"""Sums over tokens beside attention and the loss, as in a router's auxiliary loss: they are over the active tokens.

So is what they are divided by: a sum over the padding mask, or the number of positions. Any other number that depends
on how many positions there are, or on which are padding or labelled, is over all positions, and refused beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from regate_fx.passes.axes import Axes, Meaning
from regate_fx.passes.base import SCALARS_OF_TENSORS, Refused, fake, is_tensor, operator_name
from regate_fx.passes.layers import DecoderStack
from regate_fx.passes.plan_nodes import PlanNodes, made_from
from regate_fx.passes.rules import Kind, parts_of
from regate_fx.passes.scalars import computes_with_sizes
from regate_fx.passes.token_axes import TokenAxes

# Rows of each expert, counted to find them again.
_COUNTED = (Meaning.COUNTS, Meaning.OFFSETS)
# What of a mask or of positions is no number of them.
_NO_NUMBERS = {"aten.amax", "aten.amin", "aten.max", "aten.min", "aten.any", "aten.all"}
# What has nothing of its operand but device and dtype.
_MADE = {"aten.new_ones", "aten.new_zeros", "aten.new_full", "aten.new_empty"}


@dataclass(frozen=True)
class TokenSums:
    """What sums over tokens, and all that is computed from such sums.

    content: from token embeddings, the loss included. beside: from masks, and divided by alone. plain: those of both
    that no loss is in. begins: those of `plain` that sum rows, in graph order; the others compute with sums.
    """

    content: frozenset[fx.Node]
    beside: frozenset[fx.Node]
    plain: frozenset[fx.Node]
    begins: tuple[fx.Node, ...]

    @cached_property
    def all(self) -> frozenset[fx.Node]:
        return self.content | self.beside


def find_token_sums(
    nodes: Iterable[fx.Node], stack: DecoderStack, analysis: TokenAxes, plan: PlanNodes
) -> TokenSums:
    """Raises `Refused` where a sum over active tokens meets a number that is over all positions."""
    return _Search([node for node in nodes if is_tensor(node)], stack, analysis, plan).found()


def refuse_sums_over_all(
    nodes: Sequence[fx.Node], packed: Iterable[fx.Node], stack: DecoderStack, analysis: TokenAxes
) -> None:
    """Raise `Refused` where the loss has a sum over tokens in it that is not one over the active ones.

    packed: what is computed on active rows.
    """
    packed = set(packed)
    reaching: set[fx.Node] = set()
    for node in reversed(nodes):
        if _sequences(node, analysis) or not any(u.op == "output" or u in reaching for u in node.users):
            continue
        reaching.add(node)
        if node in stack.content and node not in packed and _sums_positions(node, stack.content, analysis):
            if node in analysis.unproven:
                raise analysis.unproven[node]
            raise Refused(
                "token-sum",
                f"{operator_name(node)} sums over tokens on the way to the loss, and is not known to be a sum over all "
                "tokens of the batch, which could be one over the active ones",
                node,
            )


class _Search:
    def __init__(
        self, nodes: list[fx.Node], stack: DecoderStack, analysis: TokenAxes, plan: PlanNodes
    ) -> None:
        self.nodes, self.stack, self.analysis, self.plan = nodes, stack, analysis, plan
        self.from_labels = made_from(plan.labels) if plan.labels is not None else set[fx.Node]()
        self.finding = self._only_finding()
        self.sums = [node for node in nodes if self._is_sum(node)]
        self.content = {node for node in self.sums if node in stack.content}
        self.of_losses = self._downstream(n for n in self.sums if analysis.kinds.get(n) is Kind.LOSS)

    def found(self) -> TokenSums:
        content = self.content | {node for reader in self.content for node in self._counts_read(reader)}
        beside: set[fx.Node] = set()
        for node in (user for source in self.nodes if source in content for user in source.users):
            if node in self.content:
                mates = [mate for mate in _sources(node) if mate in self.on_batch and mate not in content]
                beside |= self._divisors(node, mates) if mates else set()
            elif node in self.analysis.unproven and operator_name(node) == "autograd_function_apply":
                reason = "an autograd.Function takes a sum over tokens, which it may add to the loss unseen"
                raise Refused("token-sum", reason, node)
        self._check_users(beside, content)
        plain = (content - self.of_losses) | beside
        begins = [node for node in self.nodes if node in plain and any(map(self._has_tokens, _sources(node)))]
        if begins:
            self._check_summands(set(begins), plain)
        return TokenSums(frozenset(content), frozenset(beside), frozenset(plain), tuple(begins))

    # -- what is a sum -----------------------------------------------------------------------------------

    def _is_sum(self, node: fx.Node) -> bool:
        axes = self.analysis.axes.get(node)
        if not isinstance(axes, Axes) or node in self.analysis.unproven:
            return False
        return axes.aggregate and axes.meaning not in _COUNTED and node not in self.finding

    def _only_finding(self) -> set[fx.Node]:
        """Numbers of rows that are read as sizes alone, by which rows are cut into groups."""
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node.users and all(user.target in SCALARS_OF_TENSORS or user in found for user in node.users):
                found.add(node)
        return found

    def _has_tokens(self, node: fx.Node) -> bool:
        return any(axes.has_tokens for axes in parts_of(self.analysis.axes.get(node, Axes(()))))

    def _counts_read(self, reader: fx.Node) -> list[fx.Node]:
        """Numbers of each expert's rows that a sum is computed from: then they are sums too."""
        found = []
        for source in _sources(reader):
            axes = self.analysis.axes.get(source)
            if not isinstance(axes, Axes) or axes.meaning not in _COUNTED:
                continue
            if axes.meaning is not Meaning.COUNTS or not all(user in self.content for user in source.users):
                reason = "computes with numbers of rows by which rows are found too"
                raise Refused("mixed-sums", f"{operator_name(reader)} {reason}", reader)
            found.append(source)
        return found

    def _downstream(self, first: Iterable[fx.Node]) -> set[fx.Node]:
        found = set(first)
        for node in self.sums:
            if not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    # -- what is read with them --------------------------------------------------------------------------

    @cached_property
    def on_batch(self) -> set[fx.Node]:
        """Values that depend on the batch: its masks, labels and sizes, or its content."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            depends = self._has_tokens(node) or not found.isdisjoint(node.all_input_nodes)
            if depends or computes_with_sizes(node, self.analysis.symbols):
                found.add(node)
        return found

    def _divisors(self, node: fx.Node, mates: list[fx.Node]) -> set[fx.Node]:
        """The sums over masks that a sum is divided by; anything else is refused."""
        is_division = operator_name(node) == "aten.div" and [*node.args[1:], *node.kwargs] == mates
        closure = self._upstream(mates)
        if not is_division or node.args[0] in self.of_losses or closure is None:
            raise Refused(
                "mixed-sums",
                f"{operator_name(node)} combines a sum over the active tokens with a number over all positions",
                node,
            )
        return closure

    def _upstream(self, last: list[fx.Node]) -> set[fx.Node] | None:
        """The sums that some are computed from; None where not all of it is sums of one entry for each position."""
        found: set[fx.Node] = set()
        todo = list(last)
        while todo:
            node = todo.pop()
            if node in found:
                continue
            if not self._is_sum(node) or node in self.stack.content or node in self.from_labels:
                return None
            found.add(node)
            for source in _sources(node):
                if self._has_tokens(source):
                    axes = self.analysis.of(source)
                    if not axes.has_batch and self.analysis.symbols.batch != 1:
                        return None
                elif self._is_sum(source):
                    todo.append(source)
                elif computes_with_sizes(source, self.analysis.symbols):
                    return None
        return found

    def _check_users(self, beside: set[fx.Node], content: set[fx.Node]) -> None:
        for node in beside:
            for user in node.users:
                if user not in beside and user not in content:
                    reason = "reads a number of tokens that is to be one of active tokens elsewhere"
                    raise Refused("mixed-sums", f"{operator_name(user)} {reason}", user)

    # -- what is summed ----------------------------------------------------------------------------------

    def _check_summands(self, begins: set[fx.Node], plain: set[fx.Node]) -> None:
        """Refuse weights that were divided by a number over all positions before they are summed over fewer."""
        divided: dict[fx.Node, fx.Node] = {}
        states = self._states()
        for node in self.nodes:
            origin = next((divided[source] for source in _sources(node) if source in divided), None)
            if node in plain:
                if node in begins and origin is not None:
                    reason = "sums what was computed with a number over all positions"
                    raise Refused("mixed-sums", f"{operator_name(node)} {reason}", origin)
                continue
            if self._is_over_all(node):
                origin = node
            if origin is not None and node not in states:
                divided[node] = origin

    def _states(self) -> set[fx.Node]:
        """What layers hand on is made of: they may compute with sizes, lengths and masks as they like."""
        found = {layer.end for layer in self.stack.layers if layer.end is not None}
        todo = list(found)
        while todo:
            fresh = {node for node in todo.pop().all_input_nodes if node in self.stack.content} - found
            found |= fresh
            todo.extend(fresh)
        return found

    def _is_over_all(self, node: fx.Node) -> bool:
        """Whether a value is a number of positions, of padding or of labels, or computed with one of sizes."""
        if computes_with_sizes(node, self.analysis.symbols):
            return True
        if node in self.stack.content or operator_name(node) in _NO_NUMBERS:
            return False
        return _sums_positions(node, None, self.analysis)


def _sources(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if is_tensor(source)]


def _sequences(node: fx.Node, analysis: TokenAxes) -> bool:
    """Whether a value has an axis of positions."""
    return any(axes.sequences for axes in parts_of(analysis.axes.get(node, Axes(()))))


def _sums_positions(node: fx.Node, among: set[fx.Node] | None, analysis: TokenAxes) -> bool:
    """Whether a node has an operand (one of `among`, if given) with positions, and none itself."""
    if _sequences(node, analysis) or fake(node) is None or operator_name(node) in _MADE:
        return False
    operands = _sources(node) if among is None else [source for source in _sources(node) if source in among]
    return any(_sequences(source, analysis) for source in operands)
