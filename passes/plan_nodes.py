"""Find the token plan in a captured graph, and with it the symbols that stand for B and S."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

import regate_fx.ops  # noqa: F401  (registers the operators)
from regate_fx.passes.base import PassContext, PassResult, Refused, fake
from regate_fx.passes.token_symbols import TokenSymbols

ANCHOR = torch.ops.regate_fx.anchor.default


@dataclass(frozen=True)
class PlanNodes:
    """The graph's nodes for the tensors of a `TokenPlan`, the labels, and the two outputs to be filled.

    `token_loss` and `counted` are the nodes whose uses the loss rewrite replaces; several anchors (one for
    each place where a graph may start after a break) share one plan.
    """

    rows: fx.Node
    row_of: fx.Node
    cu_seqlens: fx.Node
    slot_rows: fx.Node
    row_slots: fx.Node
    attention_mask: fx.Node | None
    labels: fx.Node | None
    token_loss: tuple[fx.Node, ...]
    counted: tuple[fx.Node, ...]


@dataclass(frozen=True)
class FindPlan:
    """Locate the anchor; puts `plan` and `symbols` into the findings. Refuses a graph without symbolic sizes."""

    name: str = "find_plan"
    after: tuple[str, ...] = ("open_brackets",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        anchors = gm.graph.find_nodes(op="call_function", target=ANCHOR)
        if not anchors:
            raise Refused("no-plan", "the token plan does not reach this part of the model")
        slots: tuple[list[fx.Node], list[fx.Node]] = ([], [])
        for anchor in anchors:
            for user in anchor.users:
                assert user.target is operator.getitem
                slots[user.args[1]].append(user)
        rows, row_of, cu_seqlens, slot_rows, row_slots, attention_mask, labels = anchors[0].args
        assert isinstance(row_of, fx.Node)
        symbols = TokenSymbols(*fake(row_of).shape)
        batch, length = symbols.batch, symbols.length
        if length.is_Integer:
            raise Refused(
                "static-length", f"the sequence length is the constant {length} in the captured graph", row_of
            )
        if batch.is_Integer and batch != 1:
            raise Refused(
                "static-batch", f"the batch size is the constant {batch} in the captured graph", row_of
            )
        ctx.findings["symbols"] = symbols
        ctx.findings["plan"] = PlanNodes(
            rows, row_of, cu_seqlens, slot_rows, row_slots, attention_mask, labels, *map(tuple, slots)
        )
        return PassResult(gm, 0)


def made_from(source: fx.Node) -> set[fx.Node]:
    """A node and everything that depends on it: labels, say."""
    found, todo = {source}, [source]
    while todo:
        fresh = [user for user in todo.pop().users if user not in found]
        found.update(fresh)
        todo.extend(fresh)
    return found
