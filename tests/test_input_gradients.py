"""Adapters beside frozen, checkpointed layers: the usual hook on the embedding does not break the capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import check_step, observe
from peft import LoraConfig, get_peft_model
from small_models import MODELS, build, random_batch
from torch import Tensor, nn

import regate_fx
from regate_fx.input_gradients import InputGradients


def adapted(use_reentrant: bool = False) -> Any:
    """As Trainer and PEFT leave a model: LoRA, activations checkpointed, and the hook on the embedding."""
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at first, beside which lora_A has no gradient
            nn.init.normal_(parameter, std=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_adapter_model_is_one_graph(use_reentrant: bool, generator: torch.Generator) -> None:
    model = adapted(use_reentrant)
    gated = regate_fx.compile(model, backend="aot_eager")
    for B, S in ((3, 12), (2, 17)):
        check_step(gated, model, MODELS["llama"], random_batch(generator, B, S))
    assert gated.report.traces == 1
    assert gated.report.head.gated < gated.report.head.dense


def test_its_untouched_calls_keep_the_hook(generator: torch.Generator) -> None:
    model = adapted()
    embedding = model.get_input_embeddings()
    gated = regate_fx.compile(model, backend="eager")
    observe(gated, random_batch(generator, 2, 9))
    assert embedding(torch.tensor([3])).requires_grad


def freezes(module: nn.Module, args: Any, output: Tensor) -> None:
    module.requires_grad_(False)


def wants_gradients(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def computes(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True) * 2


def picks(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output[0].requires_grad_(True)


def returns_its_input(module: nn.Module, args: Any, output: Tensor) -> Any:
    output.requires_grad_(True)
    return args


def returns_a_tuple(module: nn.Module, args: Any, output: Tensor) -> Any:
    return (output.requires_grad_(True),)


@pytest.mark.parametrize("hook", [freezes, computes, picks, returns_its_input, returns_a_tuple])
def test_a_hook_that_could_do_more_stays(hook: Any) -> None:
    embedding = nn.Embedding(3, 2)
    embedding.register_forward_hook(hook)
    with InputGradients(embedding).left_out():
        assert list(embedding._forward_hooks.values()) == [hook]


def doubles(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def test_other_hooks_stay_in_their_order() -> None:
    embedding = nn.Embedding(3, 2)
    for hook in (doubles, wants_gradients, freezes):
        embedding.register_forward_hook(hook)
    kept = embedding._forward_hooks
    with InputGradients(nn.ModuleList([embedding])).left_out():
        assert list(embedding._forward_hooks.values()) == [doubles, freezes]
    assert embedding._forward_hooks is kept
    assert list(kept.values()) == [doubles, wants_gradients, freezes]


def test_hooks_come_back_after_an_error() -> None:
    embedding = nn.Embedding(3, 2)
    embedding.register_forward_hook(wants_gradients)
    with pytest.raises(RuntimeError), InputGradients(embedding).left_out():
        raise RuntimeError
    assert list(embedding._forward_hooks.values()) == [wants_gradients]
