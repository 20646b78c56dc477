"""`strict=False`: a model that cannot be gated trains as it is, and says so once.

Shapes: B samples, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_compiler
from small_models import build
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

import regate_fx
from regate_fx.errors import InvalidInput, NotGateable

B, S, D, V = 2, 9, 16, 31


class Convolutional(nn.Module):
    """A language model that mixes tokens without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(nn.Conv1d(D, D, 3, padding=2) for _ in range(2))
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutputWithPast:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss, logits)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (B, S), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "token_mask": torch.arange(S).expand(B, S) % 2 == 0}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_the_untouched_model_trains_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Convolutional()
    inputs = batch()
    expected = model(inputs["input_ids"], inputs["labels"]).loss
    expected.backward()
    wanted = gradients(model)
    gated = regate_fx.compile(model, backend="eager", strict=False)
    with caplog.at_level(logging.WARNING, "regate_fx"):
        for _ in range(3):
            out = gated(**inputs)
            assert torch.equal(out.loss, expected)
            out.loss.backward()
            found = gradients(model)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "run the untouched model from here on: every position is computed" in message
    assert "conv" in message


def test_the_report_shows_the_fallback_and_its_reason() -> None:
    gated = regate_fx.compile(Convolutional(), backend="eager", strict=False)
    gated(**batch())
    report = gated.report
    assert report.fallback
    assert report.gated == 0
    text = " ".join(str(report).split())
    assert "Calls with a token mask run the untouched model (strict=False)." in text
    assert "conv" in text


def test_only_what_cannot_be_gated_falls_back() -> None:
    gated = regate_fx.compile(Convolutional(), backend="eager", strict=False)
    inputs = batch()
    with pytest.raises(InvalidInput, match="token_mask"):
        gated(**inputs | {"token_mask": inputs["token_mask"][:, 1:]})
    assert gated.report is None


def test_without_strict_false_the_model_is_refused() -> None:
    with pytest.raises(NotGateable, match="conv"):
        regate_fx.compile(Convolutional(), backend="eager")(**batch())


def test_a_gate_cannot_learn_from_a_fallback() -> None:
    with pytest.raises(InvalidInput, match=r"strict: is False together with a gate.*explain"):
        regate_fx.compile(Convolutional(), gate=object(), strict=False)


def _failing(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
    raise TypeError("cannot generate code for this")


def test_a_backend_that_fails_is_named() -> None:
    with pytest.raises(
        NotGateable, match=r"fails to compile the graph.*cannot generate code for this"
    ) as caught:
        regate_fx.compile(build("llama"), backend=_failing)(**batch())
    assert [refusal.code for refusal in caught.value.refusals] == ["backend"]
    assert "'aot_eager' generates no code" in str(caught.value)
    assert isinstance(caught.value.__cause__, BackendCompilerFailed)


def test_a_backend_that_fails_at_the_backward_is_named_before_anything_runs() -> None:
    backend = aot_autograd(fw_compiler=make_boxed_compiler(lambda gm, _: gm), bw_compiler=_failing)
    with pytest.raises(NotGateable, match=r"fails to compile the graph.*cannot generate code for this"):
        regate_fx.compile(build("llama"), backend=backend)(**batch())


def test_where_a_backend_fails_the_untouched_model_trains() -> None:
    model = build("llama")
    inputs = batch()
    expected = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
    gated = regate_fx.compile(model, backend=_failing, strict=False)
    assert torch.equal(gated(**inputs).loss, expected)
    assert gated.report.fallback


def test_a_backend_that_fails_later_does_not_change_what_is_trained() -> None:
    graphs = 0

    def second_fails(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return gm if graphs == 1 else _failing(gm, example_inputs)

    gated = regate_fx.compile(build("llama"), backend=second_fails, strict=False, validate=False)
    inputs = batch()
    expected = gated(**inputs).loss
    with pytest.raises(NotGateable, match="fails to compile the graph"):
        gated(**inputs, position_ids=torch.arange(S)[None].expand(B, S))
    assert torch.equal(gated(**inputs).loss, expected)
    assert not gated.report.fallback


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), OSError(28, "No space left on device")]
)
def test_what_the_machine_lacks_is_no_refusal(error: Exception) -> None:
    def short(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        raise error

    with pytest.raises(type(error)):
        regate_fx.compile(build("llama"), backend=short, strict=False)(**batch())
