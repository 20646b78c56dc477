"""Every architecture: a gated step is what the untouched model computes when elided keys are masked.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comparison import check_no_bit_differs, compare
from oracles import check_step, embedding_stream_logits, golden, observe, run_key_masked, run_untouched
from small_models import FIRST_WORD, MODELS, REQUIRED, VOCABULARY, Batch, build, random_batch
from tiers import tiers

import regate_fx
from regate_fx import dynamo_settings


def padded_batches(generator: torch.Generator) -> list[Batch]:
    """Both sides, three shapes, few and many active positions."""
    return [
        random_batch(generator, 3, 11, padding="right"),
        random_batch(generator, 3, 11, padding="left"),
        random_batch(generator, 2, 14, padding="left", share=0.2),
        random_batch(generator, 4, 9, padding="right", share=0.85, holes=0.6),
        random_batch(generator, 5, 13, padding="left", share=0.9, holes=0.0),
    ]


def with_other_elided_ids(batch: Batch, generator: torch.Generator) -> Batch:
    other = torch.randint(FIRST_WORD, VOCABULARY, batch.input_ids.shape, generator=generator)
    return replace(batch, input_ids=torch.where(batch.active, batch.input_ids, other))


THROUGH_AUTOGRAD = ("bloom", "mixtral", "mistral", "deepseek_v3")


@pytest.mark.parametrize("name", tiers(MODELS, *REQUIRED))
def test_training_step(name: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    gated = regate_fx.compile(model, backend="aot_eager" if name in THROUGH_AUTOGRAD else "eager")
    for number, batch in enumerate(padded_batches(generator)):
        seen = check_step(gated, model, small, batch, f"{name}, batch {number}")
        assert seen.logits is None
    check_every_layer_is_gated(gated)
    check_elided_ids_change_no_bit(gated, batch, generator)


def check_every_layer_is_gated(gated: Any) -> None:
    layers = gated.report.layers
    assert [layer.index for layer in layers] == list(range(gated.config.num_hidden_layers))
    assert {layer.kind for layer in layers} <= {"varlen", "compact"}, [layer.reason for layer in layers]
    assert gated.report.gated == len(layers)


def check_elided_ids_change_no_bit(gated: Any, batch: Batch, generator: torch.Generator) -> None:
    changed = with_other_elided_ids(batch, generator)
    check_no_bit_differs(observe(gated, batch), observe(gated, changed))


@pytest.mark.parametrize("name", tiers(REQUIRED, "llama", "gemma2", "bart"))
def test_logits(name: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    gated = regate_fx.compile(model, backend="eager")
    for batch in padded_batches(generator)[:3]:
        with torch.no_grad():
            out = gated(**batch.model_inputs(), token_mask=batch.token_mask)
        assert out.loss is None
        baseline = run_key_masked(model, small, batch)
        reference = golden(model, small, batch)
        seen = replace(baseline, logits=out.logits)
        compare(seen, baseline, reference, batch.active, with_logits=True).check(name)
        elided = batch.real & ~batch.active
        passed_through = embedding_stream_logits(model, batch)
        torch.testing.assert_close(out.logits[elided], passed_through[elided], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            changed = with_other_elided_ids(batch, generator)
            again = gated(**changed.model_inputs(), token_mask=batch.token_mask)
        assert torch.equal(again.logits[batch.active], out.logits[batch.active])


@pytest.mark.parametrize("name", tiers(["llama", "gpt2", "gemma2", "bart", "deepseek_v3"], "llama", "bart"))
def test_all_active_is_the_untouched_model(name: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    gated = regate_fx.compile(model, backend="aot_eager", keep_logits=True, validate=False)
    for B, S in ((3, 10), (2, 13)):
        batch = random_batch(generator, B, S, padding=None)
        batch = replace(batch, token_mask=torch.ones_like(batch.token_mask))
        untouched = run_untouched(model, small, batch)
        reference = golden(model, small, batch, run_untouched)
        seen = observe(gated, batch)
        compare(seen, untouched, reference, batch.active, with_logits=True).check(name)


@pytest.mark.parametrize(
    "name",
    tiers(
        ["llama", "mistral", "gemma3", "gpt2", "opt", "bloom", "bart", "mixtral"],
        "gemma3",
        "bloom",
        "mixtral",
    ),
)
def test_no_attention_mask(name: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    gated = regate_fx.compile(model, backend="eager", validate=False)
    for B, S, share in ((3, 11, 0.5), (2, 14, 0.2), (4, 9, 1.0)):
        check_step(gated, model, small, random_batch(generator, B, S, padding=None, share=share), name)
    check_every_layer_is_gated(gated)


@pytest.mark.parametrize("name", tiers(["llama", "gemma2", "bart"], "llama", "bart"))
def test_keep_logits(name: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    gated = regate_fx.compile(model, backend="aot_eager", keep_logits=True, validate=False)
    for batch in padded_batches(generator)[:3]:
        seen = check_step(gated, model, small, batch, name, with_logits=True)
        assert seen.logits is not None  # for the type checker
        elided = batch.real & ~batch.active
        passed_through = embedding_stream_logits(model, batch)
        torch.testing.assert_close(seen.logits[elided], passed_through[elided], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", tiers(["llama", "gemma2", "gpt2"], "llama"))
def test_inductor(name: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    gated = regate_fx.compile(model, backend="inductor")
    for batch in padded_batches(generator)[:3]:
        check_step(gated, model, small, batch, name)


def test_many_models_in_one_process(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo limits the graphs of a code object: models must not share one."""
    monkeypatch.setattr(dynamo_settings, "TRACE_LIMIT", 1)
    for seed in range(3):
        model = build("llama", seed=seed, num_hidden_layers=1)
        gated = regate_fx.compile(model, backend="eager", validate=False)
        batch = random_batch(generator, 2 + seed, 7 + seed)
        check_step(gated, model, MODELS["llama"], batch, f"model {seed}")
        check_every_layer_is_gated(gated)
