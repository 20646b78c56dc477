"""The gated model is the user's own to everything but a call with a token mask.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from types import MethodType
from typing import Any

import pytest
import torch
from key_masked_engine import B, KeyMaskedEngine, S, batch, engine_of, gate, gradients, is_gated, without_mask
from small_models import VOCABULARY, build
from torch import Tensor, nn

from regate_fx.errors import Unsupported
from regate_fx.outputs import GatedOutput
from regate_fx.wrapper import original_forward, ungated, wrap


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_the_users_model(name: str) -> None:
    model = build(name)
    gated, _ = gate(model)
    assert isinstance(gated, type(model))
    for attribute in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(gated), attribute) == getattr(type(model), attribute)
    assert repr(gated) == repr(model)
    assert list(gated.state_dict()) == list(model.state_dict())
    assert all(mine is theirs for mine, theirs in zip(gated.parameters(), model.parameters(), strict=True))
    assert all(mine is theirs for mine, theirs in zip(gated.buffers(), model.buffers(), strict=True))
    assert [n for n, _ in gated.named_modules()] == [n for n, _ in model.named_modules()]
    assert gated.config is model.config
    assert gated.get_input_embeddings() is model.get_input_embeddings()


def test_changes_are_seen_from_both_sides() -> None:
    model = build("llama")
    gated, _ = gate(model)
    gated.eval()
    assert not model.training
    gated.to(torch.float64)
    assert model.dtype == torch.float64
    model.resize_token_embeddings(VOCABULARY + 3)
    assert gated.get_output_embeddings().weight.shape[0] == VOCABULARY + 3
    gated.lm_head = nn.Identity()
    assert isinstance(model.lm_head, nn.Identity)


def test_forward_has_the_models_signature_and_two_arguments_more() -> None:
    model = build("llama")
    gated, _ = gate(model)
    own = list(inspect.signature(model.forward).parameters.values())
    extended = list(inspect.signature(gated.forward).parameters.values())
    assert extended[:-3] == own[:-1]
    assert extended[-1] == own[-1]
    assert [p.name for p in extended[-3:-1]] == ["token_mask", "sample_id"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in extended[-3:-1])
    on_the_class = list(inspect.signature(type(gated).forward).parameters)
    assert on_the_class == ["self", *(p.name for p in extended)]
    assert "token_mask" not in inspect.signature(model.forward).parameters


def test_gating_leaves_nothing_in_the_users_object() -> None:
    model = build("llama")
    before = set(vars(model))
    gated, _ = gate(model)
    gated.gating = False
    gated.gating = True
    gated(**batch())
    assert set(vars(model)) == before


def test_it_is_collected_with_its_class() -> None:
    gated, _ = gate(build("llama"))
    gated(**batch())
    its_class, its_embedding = weakref.ref(type(gated)), weakref.ref(gated.get_input_embeddings())
    del gated, _
    gc.collect()
    assert its_class() is None
    assert its_embedding() is None


def test_without_a_mask_the_untouched_model_runs() -> None:
    model = build("llama")
    gated, engine = gate(model)
    inputs = without_mask(batch())
    expected = model(**inputs)
    for output in (
        gated(**inputs),
        gated(**inputs, token_mask=None),
        gated(inputs["input_ids"], labels=inputs["labels"]),
    ):
        assert type(output) is type(expected)
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.logits, expected.logits)
    assert engine.seen == []
    assert gated.report is None


def test_a_mask_reaches_the_engine_once() -> None:
    gated, engine = gate(build("llama"))
    inputs = batch()
    output = gated(
        inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"}, num_items_in_batch=7
    )
    assert len(engine.seen) == 1
    assert set(engine.seen[0]) == {"input_ids", "labels", "num_items_in_batch"}
    assert gated.report == "1 gated calls"
    expected = engine.model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["token_mask"].long(),
        labels=inputs["labels"].masked_fill(~output.counted, -100),
        num_items_in_batch=7,
    )
    assert torch.equal(output.loss, expected.loss)
    assert is_gated(gated)


def test_gating_can_be_switched_off_and_on() -> None:
    model = build("llama")
    gated, engine = gate(model)
    inputs = batch()
    dense = model(**without_mask(inputs)).loss
    gated.gating = False
    assert torch.equal(gated(**inputs).loss, dense)
    assert torch.equal(gated(**inputs, sample_id=torch.arange(B)).loss, dense)
    assert engine.seen == []
    gated.gating = True
    assert not torch.equal(gated(**inputs).loss, dense)
    assert len(engine.seen) == 1


@pytest.mark.parametrize("masked", [True, False])
def test_hooks_run_exactly_once(masked: bool) -> None:
    gated, _ = gate(build("llama"))
    calls = []
    gated.register_forward_pre_hook(lambda module, args, kwargs: calls.append("pre"), with_kwargs=True)
    gated.register_forward_hook(lambda module, args, output: calls.append("post"))
    gated.model.layers[0].register_forward_hook(lambda module, args, output: calls.append("layer"))
    inputs = batch()
    gated(**(inputs if masked else without_mask(inputs)))
    assert calls == ["pre", "layer", "post"]


def test_generate_uses_the_untouched_model() -> None:
    model = build("llama").eval()
    prompt = batch()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(prompt, **options)
    gated, engine = gate(model)
    assert torch.equal(gated.generate(prompt, **options), expected)
    assert torch.equal(
        gated.generate(prompt, num_beams=2, **options), model.generate(prompt, num_beams=2, **options)
    )
    assert engine.seen == []
    with pytest.raises(Unsupported, match=r"past_key_values|use_cache"):
        gated.generate(prompt, token_mask=torch.ones(B, S, dtype=torch.bool), **options)


def test_an_instance_forward_from_before_is_the_models_own() -> None:
    model = build("llama")

    def doubled(self: nn.Module, input_ids: Tensor, labels: Tensor, extra: int = 0, **kwargs: Any) -> Any:
        output = type(self).forward(self, input_ids=input_ids, labels=labels, **kwargs)
        output.loss = output.loss * 2
        return output

    inputs = batch()
    single = gate(copy.deepcopy(model))[0](**inputs).loss
    model.forward = MethodType(doubled, model)
    gated, engine = gate(model)
    assert torch.equal(gated(**inputs).loss, single * 2)
    assert len(engine.seen) == 1
    assert torch.equal(gated(**without_mask(inputs)).loss, model(**without_mask(inputs)).loss)
    assert list(inspect.signature(gated.forward).parameters)[2:5] == ["extra", "token_mask", "sample_id"]


def test_an_assigned_forward_stays_off_the_users_object() -> None:
    model = build("llama")
    gated, engine = gate(model)
    calls = []

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("counting")
        return type(self).forward(self, *args, **kwargs)

    gated.forward = MethodType(counting, gated)
    gated(**batch())
    model(**without_mask(batch()))
    original_forward(gated)(**without_mask(batch()))
    assert calls == ["counting"]
    assert len(engine.seen) == 1
    del gated.forward
    assert is_gated(gated)
    assert calls == ["counting"]


def test_gradient_checkpointing_is_the_models_own() -> None:
    inputs = batch()
    results = []
    for checkpointed in (False, True):
        gated, engine = gate(build("llama"))
        if checkpointed:
            gated.gradient_checkpointing_enable()
            assert ungated(gated).is_gradient_checkpointing
        gated.train()(**inputs).loss.backward()
        assert len(engine.seen) == 1
        results.append(gradients(gated))
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient)


def test_torch_compile_of_the_untouched_path() -> None:
    model = build("llama").eval()
    gated, engine = gate(model)
    inputs = without_mask(batch())
    compiled = torch.compile(gated, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)
    assert engine.seen == []


def test_wrapping_a_gated_model_replaces_its_engine() -> None:
    model = build("llama")
    once, first = gate(model)
    twice, second = gate(once)
    assert ungated(twice) is model
    twice(**batch())
    assert (len(first.seen), len(second.seen)) == (0, 1)
    foreign = wrap(model, KeyMaskedEngine(once, "an option"))
    assert engine_of(foreign).model is model
    assert engine_of(foreign).note == "an option"


def test_a_name_that_gating_needs_is_refused() -> None:
    class Takes(nn.Module):
        def forward(self, input_ids: Tensor, token_mask: Tensor) -> Tensor:
            return input_ids

    model = Takes()
    with pytest.raises(Unsupported, match=r"already takes 'token_mask'.*Rename"):
        gate(model)
    owner = build("llama")
    owner.report = "mine"
    with pytest.raises(Unsupported, match=r"attribute 'report'.*Rename"):
        gate(owner)


def test_a_model_is_gated_once_and_inside_its_containers() -> None:
    gated, _ = gate(build("llama"))
    with pytest.raises(Unsupported, match=r"twice.*the whole or the part"):
        gate(nn.Sequential(gated))
    with pytest.raises(Unsupported, match=r"DataParallel.*Gate the model first"):
        gate(nn.DataParallel(build("llama")))


def test_a_plain_module_can_be_gated() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 4)

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True
        ) -> Any:
            return GatedOutput(logits=self.embed(input_ids))

    gated, engine = gate(Tiny())
    inputs = batch()
    gated(inputs["input_ids"], token_mask=inputs["token_mask"])
    assert len(engine.seen) == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        gated(**inputs)
