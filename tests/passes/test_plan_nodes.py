"""The token plan is found in the graph, and the symbols of B and S with it."""

from __future__ import annotations

import pytest
import torch
from captured import calls, run_on, run_until
from torch import Tensor, nn

from regate_fx.passes.base import Refused
from regate_fx.passes.pipeline import NORMALISE
from regate_fx.passes.plan_nodes import FindPlan, PlanNodes

IDS = torch.randint(11, (2, 5))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        x = self.embedding(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return x if labels is None else x + labels[..., None]


def test_the_plan_and_the_symbols_are_found() -> None:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS + 1}
    run = run_until("find_plan", Plain(), inputs, torch.rand(2, 5) < 0.6)

    plan: PlanNodes = run.context.findings["plan"]
    symbols = run.context.findings["symbols"]
    assert run.rewrites["find_plan"] == 0
    shapes = [
        tuple(node.meta["val"].shape) for node in (plan.rows, plan.row_of, plan.slot_rows, plan.row_slots)
    ]
    assert [len(shape) for shape in shapes] == [1, 2, 2, 1]
    assert [size.node.expr for size in plan.row_of.meta["val"].shape] == [symbols.batch, symbols.length]
    assert symbols.batch.is_Symbol
    assert symbols.length.is_Symbol
    assert plan.attention_mask is not None
    assert plan.labels is not None
    assert plan.labels is not plan.attention_mask
    assert [len(nodes) for nodes in (plan.token_loss, plan.counted)] == [1, 1]


def test_what_the_caller_left_out_is_absent() -> None:
    plan: PlanNodes = run_until("find_plan", Plain(), {"input_ids": IDS}).context.findings["plan"]
    assert plan.attention_mask is None
    assert plan.labels is None


def test_one_sample_is_a_size_of_one() -> None:
    symbols = run_until("find_plan", Plain(), {"input_ids": IDS[:1]}).context.findings["symbols"]
    assert symbols.batch == 1
    assert symbols.length.is_Symbol


def test_static_sizes_are_refused_by_name() -> None:
    with pytest.raises(Refused, match="sequence length is the constant 5") as caught:
        run_on(Plain(), {"input_ids": IDS.clone()}, (*NORMALISE, FindPlan()), dynamic=False)
    assert caught.value.code == "static-length"


def test_a_graph_without_the_plan_is_refused() -> None:
    class DropAnchor:
        name, after = "drop_anchor", ("open_brackets",)

        def run(self, gm, ctx):  # type: ignore[no-untyped-def]
            (anchor,) = calls(gm, "regate_fx.anchor")
            for user in list(anchor.users):
                user.replace_all_uses_with(anchor.args[1])
                gm.graph.erase_node(user)
            gm.graph.erase_node(anchor)
            from regate_fx.passes.base import PassResult

            return PassResult(gm, 1)

    with pytest.raises(Refused, match="does not reach") as caught:
        run_on(Plain(), {"input_ids": IDS}, (*NORMALISE, DropAnchor(), FindPlan()))
    assert caught.value.code == "no-plan"
