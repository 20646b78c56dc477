"""Inductor's modes and options, as `torch.compile` takes them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from small_models import build
from torch import fx

import regate_fx
from regate_fx.errors import InvalidInput
from regate_fx.inductor import Inductor, chosen_backend


def test_options_reach_inductor_and_the_step_is_right() -> None:
    graphs: list[fx.Graph] = []
    model = build("llama")
    gated = regate_fx.compile(
        model, options={"joint_custom_post_pass": graphs.append, "max-autotune": False}, validate=True
    )
    ids = torch.randint(3, 90, (2, 9))
    everything = torch.ones(2, 9, dtype=torch.bool)
    loss = gated(input_ids=ids, labels=ids, token_mask=everything).loss
    assert any("regate_fx" in str(node.target) for graph in graphs for node in graph.nodes)
    torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)


def test_a_mode_is_its_settings() -> None:
    found = chosen_backend("inductor", "reduce-overhead", None)
    assert isinstance(found, Inductor)
    assert found.settings == torch._inductor.list_mode_options("reduce-overhead")
    assert str(found) == "inductor, reduce-overhead"
    for again in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert again == found


def test_without_either_the_backend_is_what_was_given() -> None:
    assert chosen_backend("aot_eager", None, None) == "aot_eager"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fastest"}, r"mode: is 'fastest'\. Use one of 'default'.*'max-autotune'"),
        ({"mode": "default", "options": {}}, "mode: is given together with options"),
        ({"options": {"fastest": True}}, r"options: names fastest\. See torch\._inductor\.list_options"),
        ({"backend": "eager", "mode": "default"}, "mode: is Inductor's, and the backend is 'eager'"),
        ({"backend": "eager", "options": {}}, "options: is Inductor's, and the backend is 'eager'"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        regate_fx.compile(build("llama"), **arguments)
