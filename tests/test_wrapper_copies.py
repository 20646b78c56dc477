"""Copies and files of gated models."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from key_masked_engine import B, S, batch, engine_of, gate, is_gated, without_mask
from small_models import build
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import (
    AutoModelForCausalLM,
)

from regate_fx.outputs import GatedOutput
from regate_fx.plan import make_plan
from regate_fx.wrapper import ungated


def test_deepcopy_is_a_gated_model_of_its_own() -> None:
    gated, engine = gate(build("llama"))
    engine.note = "an option"
    gated(**batch())
    gated.gating = False
    copied = copy.deepcopy(gated)
    assert copied.gating is False
    assert copied.report is None
    copied.gating = True
    assert engine_of(copied) is not engine
    assert engine_of(copied).note == "an option"
    assert engine_of(copied).model is ungated(copied)
    assert ungated(copied) is not ungated(gated)
    assert torch.equal(copied(**batch()).loss, engine.fresh(engine.model)(*plan_and_inputs()).loss)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert gated.lm_head.weight.abs().sum() > 0
    assert not torch.equal(copied(**batch()).loss, engine(*plan_and_inputs()).loss)


def plan_and_inputs() -> tuple[Any, dict[str, Any]]:
    inputs = batch()
    return make_plan(inputs["token_mask"]), without_mask(inputs)


def test_copy_shares_tensors_like_any_module() -> None:
    gated, engine = gate(build("llama"))
    copied = copy.copy(gated)
    assert copied.lm_head is gated.lm_head
    copied.training = not gated.training
    assert gated.training != copied.training
    copied(**batch())
    assert engine.seen == []
    assert len(engine_of(copied).seen) == 1


def test_torch_save_and_load(tmp_path: Path) -> None:
    gated, engine = gate(build("llama"))
    engine.note = "an option"
    gated.gating = False
    expected = engine(*plan_and_inputs()).loss
    torch.save(gated, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert isinstance(loaded, type(ungated(gated)))
    assert loaded.gating is False
    loaded.gating = True
    assert engine_of(loaded).note == "an option"
    assert engine_of(loaded).model is ungated(loaded)
    assert torch.equal(loaded(**batch()).loss, expected)
    assert len(engine_of(loaded).seen) == 1


class Doubling:
    """A forward that somebody assigned, and that refers back to the model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Tensor) -> Any:
        output = type(self.model).forward(self.model, **inputs)
        output.loss = output.loss * 2
        return output


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda gated: pickle.loads(pickle.dumps(gated))])
def test_an_assigned_forward_goes_with_the_copy(duplicate: Callable[[Any], Any]) -> None:
    gated, _ = gate(build("llama"))
    single = gated(**batch()).loss
    gated.forward = Doubling(gated)
    copied = duplicate(gated)
    assert copied.forward.model is copied
    assert torch.equal(copied(**batch()).loss, single * 2)
    assert len(engine_of(copied).seen) == 1
    plain = duplicate(ungated(gated))
    assert "forward" not in vars(plain)


def test_the_users_object_pickles_without_the_gate() -> None:
    model = build("llama")
    gated, _ = gate(model)
    plain = pickle.loads(pickle.dumps(model))
    assert type(plain) is type(model)
    assert type(copy.deepcopy(model)) is type(model)
    assert is_gated(gated)


def test_save_pretrained_writes_the_users_model(tmp_path: Path) -> None:
    gated, _ = gate(build("llama"))
    gated.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), type(gated).from_pretrained(tmp_path)):
        assert type(loaded) is type(ungated(gated))
        weights = loaded.state_dict()
        assert weights.keys() == gated.state_dict().keys()
        assert all(torch.equal(weights[name], weight) for name, weight in gated.state_dict().items())


def test_the_output_survives_what_wraps_models() -> None:
    output = GatedOutput(
        loss=torch.ones((), dtype=torch.bfloat16), counted=torch.ones(B, S, dtype=torch.bool)
    )
    leaves, structure = pytree.tree_flatten(output)
    rebuilt = pytree.tree_unflatten(leaves, structure)
    assert isinstance(rebuilt, GatedOutput)
    assert torch.equal(rebuilt.counted, output.counted)
    assert rebuilt.logits is None
    as_tuple = gate(build("llama"))[0](**batch(), return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], gate(build("llama"))[0](**batch()).loss)


def test_a_config_that_asks_for_tuples_gets_them() -> None:
    model = build("bloom")  # most models fail themselves with this setting
    expected = gate(build("bloom"))[0](**batch()).loss
    model.config.return_dict = False
    assert isinstance(model(**without_mask(batch())), tuple)
    as_tuple = gate(model)[0](**batch())
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], expected)
