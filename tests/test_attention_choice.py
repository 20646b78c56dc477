"""What computes attention, where somebody else than the compiler chooses. `test_cuda.py` has the CUDA kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import check_step, observe
from small_models import MODELS, build, random_batch
from tiers import tiers

import regate_fx
from regate_fx import api
from regate_fx.errors import InvalidInput, NotGateable


@pytest.mark.parametrize("name", tiers(sorted(MODELS), "mistral", "deepseek_v3"))
def test_the_models_own_operators(name: str, generator: torch.Generator) -> None:
    model = build(name)
    gated = regate_fx.compile(model, backend="eager", attention="model")
    for B, S, padding in ((3, 11, "left"), (2, 17, "right")):
        check_step(gated, model, MODELS[name], random_batch(generator, B, S, padding=padding), name)
    assert {layer.kind for layer in gated.report.layers} == {"compact"}


def test_says_that_they_were_preferred(generator: torch.Generator) -> None:
    gated = regate_fx.compile(build("llama"), backend="eager", validate=False, attention="model")
    observe(gated, random_batch(generator, 2, 9))
    assert {layer.reason for layer in gated.report.layers} == {"the model's own operators are preferred"}


@pytest.mark.parametrize("attention", ["torch", "flex"])
def test_a_cuda_kernel_is_refused_on_the_cpu(attention: Any, generator: torch.Generator) -> None:
    gated = regate_fx.compile(build("llama"), backend="eager", attention=attention)
    with pytest.raises(
        NotGateable, match=f"attention='{attention}' names a CUDA kernel, and this attention is on the CPU"
    ):
        observe(gated, random_batch(generator, 2, 9))


def test_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = "eager"
    with pytest.raises(InvalidInput, match=r"attention: is 'eager'.*'flash_attn', 'torch', 'flex', 'model'"):
        regate_fx.compile(build("llama"), attention=wrong)
    monkeypatch.setattr(api, "flash_attn_installed", lambda: False)
    with pytest.raises(InvalidInput, match="is 'flash_attn', which is not installed"):
        regate_fx.compile(build("llama"), attention="flash_attn")
