"""Grad-mode and autocast brackets become facts about nodes, and autocast ones brackets again."""

from __future__ import annotations

import torch
from captured import operators, run_on, run_until
from torch import Tensor, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from regate_fx.passes.brackets import CloseBrackets, OpenBrackets
from regate_fx.passes.checkpointing import InlineCheckpoints
from regate_fx.passes.functionalize import Functionalize

D = 8
NORMAL = (InlineCheckpoints(), Functionalize())
BFLOAT16 = ("cpu", torch.bfloat16, True, True)


class Bracketed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(11, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(input_ids)
        with torch.no_grad():
            frozen = self.first(x).tanh()
        with torch.autocast("cpu", torch.bfloat16):
            y = self.second(x * frozen)
            with torch.autocast("cpu", enabled=False):
                z = x.exp()
        return y, z


IDS = {"input_ids": torch.arange(10).view(2, 5)}


def test_opening_leaves_facts_behind() -> None:
    before = run_on(Bracketed(), IDS, NORMAL).graph_module
    run = run_on(Bracketed(), IDS, (*NORMAL, OpenBrackets()))
    after = run.graph_module

    brackets = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")
    assert [operators(before)[name] for name in brackets] == [2, 2, 2]
    assert [operators(after)[name] for name in brackets] == [0, 0, 0]
    assert run.rewrites["open_brackets"] == 6
    assert operators(after)["aten.detach"] == operators(before)["aten.detach"] + 1
    first, second = after.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert "autocast" not in first.meta
    assert [entry[:3] for entry in second.meta["autocast"]] == [BFLOAT16[:3]]
    (exp,) = after.graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    assert [entry[2] for entry in exp.meta["autocast"]] == [True, False]


def test_closing_puts_every_node_under_its_own_brackets_again() -> None:
    run = run_on(Bracketed(), IDS, (*NORMAL, OpenBrackets(), CloseBrackets()))
    opened: list[object] = []
    for node in run.graph_module.graph.nodes:
        if node.target is _enter_autocast:
            opened.append(tuple(node.args))
        elif node.target is _exit_autocast:
            opened.pop()
        elif node.op == "call_function":
            assert tuple(opened) == node.meta.get("autocast", ())
    assert not opened
    assert run.rewrites["close_brackets"] == operators(run.graph_module)["_enter_autocast"]


def test_a_graph_without_brackets_is_left_alone() -> None:
    plain = nn.Sequential(nn.Embedding(11, D), nn.Linear(D, D))
    run = run_until("open_brackets", plain, {"input": IDS["input_ids"]})
    assert run.rewrites["open_brackets"] == 0


def test_nested_no_grad_detaches_only_where_a_gradient_would_flow() -> None:
    class Nested(Bracketed):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            with torch.no_grad():
                frozen = self.first(x)
                with torch.enable_grad():
                    learned = self.second(x)
                largest = frozen.argmax(-1)
            return learned * frozen + largest[..., None]

    run = run_until("open_brackets", Nested(), IDS)
    detached = [
        node.args[0].target
        for node in run.graph_module.graph.find_nodes(
            op="call_function", target=torch.ops.aten.detach.default
        )
    ]
    assert detached == [torch.ops.aten.linear.default]
    _, second = run.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    users = {user.target for user in second.users}
    assert users == {torch.ops.aten.mul.Tensor}
