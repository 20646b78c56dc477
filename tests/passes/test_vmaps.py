"""Brackets of `vmap` in a captured graph become operators that can be analysed.

Shapes: B samples, S positions, D hidden size.
"""

from __future__ import annotations

import pytest
import torch
from captured import capture, operators, run_until
from torch import Tensor, fx, nn
from torch._functorch import predispatch

from regate_fx.passes.base import Refused
from regate_fx.passes.vmaps import expand_vmaps


class Windowed(nn.Module):
    """Scores [B, S, S] under a mask of pairs that is written for one query and one key, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        at = torch.arange(input_ids.shape[1])
        of_keys = torch.vmap(lambda query, key: (key <= query) & (query - key < 3), in_dims=(None, 0))
        seen = torch.vmap(of_keys, in_dims=(0, None))(at, at)
        x = self.embedding(input_ids)
        return (x @ x.mT).masked_fill(~seen, -1.0)


class OfStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.vmap(lambda row: row.cumsum(0))(self.embedding(input_ids))


def brackets(gm: fx.GraphModule) -> list[str]:
    return [
        str(n.target) for n in gm.graph.nodes if getattr(n.target, "__module__", "") == predispatch.__name__
    ]


def test_a_bracket_becomes_the_operators_it_stands_for(ids: dict[str, Tensor]) -> None:
    found: list[int] = []

    def rewrite(gm: fx.GraphModule) -> fx.GraphModule:
        before = operators(gm)
        assert before["_vmap_increment_nesting"] == before["_vmap_decrement_nesting"] == 2
        found.append(expand_vmaps(gm))
        gm.graph.lint()
        assert brackets(gm) == []
        assert operators(gm)["aten.le"] == operators(gm)["aten.bitwise_and"] == 1
        return gm

    module = Windowed()
    seen = capture(module, ids, rewrite=rewrite).outputs[0]
    assert found == [1]  # the inner one is part of the outer one
    assert torch.equal(seen, module(**ids))


def test_normalisation_expands_them(ids: dict[str, Tensor]) -> None:
    assert brackets(run_until("functionalize", Windowed(), ids).graph_module) == []


def test_a_graph_without_brackets_is_left_alone(ids: dict[str, Tensor]) -> None:
    gm = fx.symbolic_trace(nn.Linear(2, 2))
    before = str(gm.graph)
    assert expand_vmaps(gm) == 0
    assert str(gm.graph) == before


def test_gradients_do_not_pass_through_a_bracket(ids: dict[str, Tensor]) -> None:
    with pytest.raises(Refused, match="gradients pass through") as caught:
        run_until("functionalize", OfStates(), ids)
    assert caught.value.code == "functorch"
    assert "test_vmaps.py" in caught.value.refusal().source
