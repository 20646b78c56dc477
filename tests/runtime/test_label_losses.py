"""Losses of labels from a few logits at a time, compared with the logits of the whole batch.

Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import MODELS, PAD, build, random_batch
from small_vlms import VLMS, build_vlm, image_batch
from torch import Tensor, nn

from regate_fx.runtime import label_losses
from regate_fx.runtime.label_losses import LabelLosses


def from_whole_logits(model: nn.Module, inputs: dict[str, Any], labels: Tensor, shifted: bool) -> Tensor:
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    if not shifted:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return F.pad(losses.view(len(labels), -1), (1, 0))


class Widest(torch.overrides.TorchFunctionMode):
    """Notes the most logits that any operator made at once."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.rows = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        is_value = isinstance(made, Tensor) and not isinstance(made, nn.Parameter)
        if is_value and made.dim() > 1 and made.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, made.numel() // self.vocabulary)
        return made


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_they_are_the_model_s_own_and_few_at_a_time(
    name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caps, scales and biases after the projection included."""
    model = build(name).eval()
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(label_losses, "_LOGITS_AT_ONCE", 7 * vocabulary)
    monkeypatch.setattr(label_losses, "_PROBES", 7)
    losses = LabelLosses(model)
    for padding in ("right", "left", None):
        batch = random_batch(generator, 3, 12, padding=padding)
        shifted = MODELS[name].shifted
        expected = from_whole_logits(model, batch.model_inputs(), batch.labels, shifted)
        with Widest(vocabulary) as widest:
            found = losses(batch.model_inputs(), batch.labels, shifted)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
        assert 0 < widest.rows <= 7
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_vision_language_models_too(
    name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_vlm(name).eval()
    vocabulary = model.config.get_text_config().vocab_size
    monkeypatch.setattr(label_losses, "_LOGITS_AT_ONCE", 5 * vocabulary)
    monkeypatch.setattr(label_losses, "_PROBES", 5)
    batch = image_batch(name, generator, (1, 2))
    inputs = {
        "input_ids": batch.input_ids.masked_fill(batch.visual, PAD),
        "attention_mask": batch.attention_mask,
    }
    with Widest(vocabulary) as widest:
        found = LabelLosses(model)(inputs, batch.labels, shifted=True)
    torch.testing.assert_close(
        found, from_whole_logits(model, inputs, batch.labels, True), rtol=2e-5, atol=2e-5
    )
    assert 0 < widest.rows <= 5


class Wrapped(nn.Module):
    """A causal model whose logits are not what its projection and a row of states make of each other."""

    def __init__(self, model: Any, change: Any) -> None:
        super().__init__()
        self.model = model
        self.change = change

    def get_decoder(self) -> Any:
        return self.model.get_decoder()

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        out.logits = self.change(out.logits)
        return out


OTHERS = {
    "depends on the neighbour": lambda logits: logits + logits.roll(1, 1),
    "depends on the row": lambda logits: logits * torch.arange(1, 4)[:, None, None],
    "depends on the position": lambda logits: logits * torch.arange(1, 1 + logits.shape[1])[:, None],
}


@pytest.mark.parametrize("change", OTHERS)
@torch.no_grad()
def test_a_model_that_cannot_be_taken_apart_is_run_whole(change: str, generator: torch.Generator) -> None:
    model = Wrapped(build("llama").eval(), OTHERS[change])
    losses = LabelLosses(model)
    for _ in range(2):
        batch = random_batch(generator, 3, 12)
        expected = from_whole_logits(model, batch.model_inputs(), batch.labels, True)
        found = losses(batch.model_inputs(), batch.labels, shifted=True)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_a_model_without_named_parts(generator: torch.Generator) -> None:
    inner = build("llama").eval()

    class Bare(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return inner(**inputs)

    batch = random_batch(generator, 2, 9)
    found = LabelLosses(Bare())(batch.model_inputs(), batch.labels, shifted=True)
    assert torch.equal(found, LabelLosses(inner)(batch.model_inputs(), batch.labels, shifted=True))


@torch.no_grad()
def test_low_precision_and_autocast(generator: torch.Generator) -> None:
    batch = random_batch(generator, 3, 12)
    inputs = batch.model_inputs()
    exact = LabelLosses(build("gemma2").eval())(inputs, batch.labels, shifted=True)
    half = LabelLosses(build("gemma2").eval().to(torch.bfloat16))(inputs, batch.labels, shifted=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = LabelLosses(build("gemma2").eval())(inputs, batch.labels, shifted=True)
    for found in (half, cast):
        assert found.dtype == torch.float32
        assert not torch.equal(found, exact)
        torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_no_label(generator: torch.Generator) -> None:
    batch = random_batch(generator, 2, 9)
    found = LabelLosses(build("llama").eval())(batch.model_inputs(), batch.labels.fill_(-100), shifted=True)
    assert torch.equal(found, torch.zeros(2, 9))
