"""A gated model inside a compiled caller, and a number of labels that counts too many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from key_masked_engine import batch, gradients, without_mask
from small_models import build
from tiers import tiers

import regate_fx


def whole(gated: Any) -> Any:
    return torch.compile(gated, backend="eager")


def called_inside(gated: Any) -> Any:
    return torch.compile(lambda **inputs: gated(**inputs), backend="eager")


@pytest.mark.parametrize("compiled", tiers([whole, called_inside], called_inside))
def test_a_compiled_caller_gets_the_gated_step(compiled: Any) -> None:
    model = build("llama")
    gated = regate_fx.compile(model, backend="eager", validate=False)
    caller = compiled(gated)
    output = caller(**batch())
    output.loss.backward()
    found = gradients(model)
    model.zero_grad()
    regate_fx.compile(model, backend="eager", validate=False)(**batch()).loss.backward()
    assert gated.report.gated == 2
    assert found.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient)
    torch.testing.assert_close(caller(**without_mask(batch())).loss, model(**without_mask(batch())).loss)


def test_a_number_of_labels_without_a_gate_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    gated = regate_fx.compile(build("llama"), backend="eager", validate=False)
    gated(**batch())
    assert "num_items_in_batch" not in caplog.text
    for _ in range(2):
        gated(**batch(), num_items_in_batch=9)
    assert caplog.text.count("num_items_in_batch with token_mask has to be") == 1
    assert "trainer.model_accepts_loss_kwargs = False" in caplog.text
