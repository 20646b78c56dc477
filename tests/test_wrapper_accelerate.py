"""Gated models in the hands of accelerate."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState, GradientState, PartialState
from key_masked_engine import batch, engine_of, gate, is_gated, without_mask
from small_models import build
from torch import nn

from regate_fx.outputs import GatedOutput


@pytest.fixture(autouse=True)
def _no_accelerator() -> Iterator[None]:
    """Accelerate keeps the settings of the first `Accelerator` of a process."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def test_accelerate_autocast_wraps_the_gated_model_only() -> None:
    model = build("llama")
    gated, engine = gate(model)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(gated)
    assert prepared is gated
    dtypes = []
    gated.lm_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    output = prepared(**batch())
    assert isinstance(output, GatedOutput)
    assert output.counted is not None
    assert dtypes == [torch.bfloat16]
    assert output.logits.dtype == torch.float32
    prepared(**without_mask(batch()))
    assert len(engine.seen) == 1
    model(**without_mask(batch()))
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    copied = copy.deepcopy(prepared)
    assert copied.forward.__self__ is copied
    assert copied(**batch()).counted is not None
    assert len(engine_of(copied).seen) == 1
    assert len(engine.seen) == 1


def test_a_prepared_model_still_pickles() -> None:
    gated, _ = gate(build("llama"))
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(gated)
    loaded = pickle.loads(pickle.dumps(prepared))
    assert loaded.forward.__self__ is loaded
    assert is_gated(loaded)


def test_unwrap_model_gives_the_gated_model_back() -> None:
    gated, engine = gate(build("llama"))
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(gated)
    assert accelerator.unwrap_model(prepared) is gated
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert bare is gated
    logits = bare(**batch()).logits
    torch.testing.assert_close(logits, gate(build("llama"))[0](**batch()).logits)
    assert len(engine.seen) == 1
    assert "_original_forward" not in vars(gated)


def test_a_model_prepared_before_it_is_gated() -> None:
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(build("llama"))
    gated, engine = gate(model)
    dtypes = []
    gated.lm_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    gated(**batch())
    assert dtypes == [torch.bfloat16]
    assert len(engine.seen) == 1


def test_accelerate_module_hooks() -> None:
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    gated, engine = gate(build("llama"))
    hook = Counting()
    add_hook_to_module(gated, hook)
    gated(**batch())
    gated(**without_mask(batch()))
    assert (hook.calls, len(engine.seen)) == (2, 1)
    remove_hook_from_module(gated)
    assert is_gated(gated)
    assert hook.calls == 2
