"""Ways of calling and training the same model, each against the masked-key oracle.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import NO_LABEL, check_step, golden, observe, run_key_masked
from peft import LoraConfig, get_peft_model
from small_models import FIRST_WORD, MODELS, VOCABULARY, Batch, build, random_batch
from tiers import exhaustive, tiers

import regate_fx


def two_batches(generator: torch.Generator) -> list[Batch]:
    return [random_batch(generator, 3, 11, padding="left"), random_batch(generator, 2, 14, padding="right")]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "aot_eager"),
        pytest.param("gpt2", "aot_eager", marks=exhaustive),
        pytest.param("bloom", "aot_eager", marks=exhaustive),
        ("mixtral", "aot_eager"),
        pytest.param("gemma2", "eager", marks=exhaustive),
        pytest.param("deepseek_v3", "eager", marks=exhaustive),
    ],
)
def test_gradient_checkpointing(name: str, backend: str, generator: torch.Generator) -> None:
    model = build(name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gated = regate_fx.compile(model, backend=backend, validate=False)
    for batch in two_batches(generator):
        check_step(gated, model, MODELS[name], batch, name)
    assert gated.report.gated == len(gated.report.layers) == 2


@pytest.mark.parametrize(
    ("name", "backend"), [pytest.param("gemma2", "aot_eager", marks=exhaustive), ("mixtral", "eager")]
)
def test_layers_compiled_one_by_one(name: str, backend: str, generator: torch.Generator) -> None:
    model = build(name)
    gated = regate_fx.compile(model, backend=backend, scope="layers", validate=False)
    for batch in two_batches(generator):
        check_step(gated, model, MODELS[name], batch, name)
    assert gated.report.gated == len(gated.report.layers) == 2


@pytest.mark.parametrize(
    "name", tiers(["llama", "qwen3", "mistral", "gpt2", "gpt_neox", "gemma2"], "gpt2", "gemma2")
)
def test_bfloat16_autocast(name: str, generator: torch.Generator) -> None:
    model = build(name)
    gated = regate_fx.compile(model, backend="aot_eager", validate=False)
    for batch in two_batches(generator):
        check_step(gated, model, MODELS[name], batch, name, autocast=True)


def test_autocast_switched_on_in_mid_run(generator: torch.Generator) -> None:
    model = build("llama")
    gated = regate_fx.compile(model, backend="eager", validate=False)
    for autocast in (False, True, False):
        batch = random_batch(generator, 3, 11)
        check_step(gated, model, MODELS["llama"], batch, f"autocast {autocast}", autocast=autocast)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_fc"]),
        pytest.param("mixtral", ["q_proj", "v_proj"], marks=exhaustive),
    ],
)
def test_lora(name: str, targets: list[str], generator: torch.Generator) -> None:
    # Both factors random: with the usual B = 0 half of the gradients would be zero.
    adapter = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
    model = get_peft_model(build(name), adapter)
    gated = regate_fx.compile(model, backend="eager", validate=False)
    for batch in two_batches(generator):
        seen = check_step(gated, model, MODELS[name], batch, name)
        trained = {parameter for parameter, grad in seen.gradients.items() if grad is not None}
        assert trained == {parameter for parameter in seen.gradients if "lora_" in parameter}


@pytest.mark.parametrize("name", tiers(["llama", "gpt2"], "llama"))
def test_num_items_in_batch(name: str, generator: torch.Generator) -> None:
    model = build(name)
    gated = regate_fx.compile(model, backend="eager", validate=False)
    for batch, items in zip(two_batches(generator), (7, 31), strict=True):
        check_step(gated, model, MODELS[name], batch, name, num_items_in_batch=items)
        as_tensor = torch.tensor(items)
        check_step(gated, model, MODELS[name], batch, name, num_items_in_batch=as_tensor)


@pytest.mark.parametrize("name", tiers(["llama", "gemma3", "bart"], "llama", "bart"))
def test_labels_are_the_input_ids(name: str, generator: torch.Generator) -> None:
    model = build(name)
    gated = regate_fx.compile(model, backend="eager", validate=False)
    for batch in two_batches(generator):
        check_step(gated, model, MODELS[name], replace(batch, labels=batch.input_ids), name)


@pytest.mark.parametrize("name", tiers(["llama", "gpt2", "gemma2", "opt"], "llama", "opt"))
def test_inputs_embeds(name: str, generator: torch.Generator) -> None:
    model = build(name)
    gated = regate_fx.compile(model, backend="eager", validate=False)
    for batch in two_batches(generator):
        B, S = batch.input_ids.shape
        embeds = torch.randn(B, S, 32, generator=generator).requires_grad_()
        seen = check_step(gated, model, MODELS[name], replace(batch, inputs_embeds=embeds), name)
        of_embeds = seen.gradients["inputs_embeds"]
        assert of_embeds is not None
        assert not of_embeds[~batch.active].any()


@pytest.mark.parametrize("name", tiers(["llama", "gpt2", "opt", "phi"], "llama", "opt"))
def test_position_ids(name: str, generator: torch.Generator) -> None:
    model = build(name)
    gated = regate_fx.compile(model, backend="eager", validate=False)
    for batch in two_batches(generator):
        # Unevenly spaced, so that neither the index nor the packed row could stand in for them.
        steps = torch.randint(1, 4, batch.input_ids.shape, generator=generator)
        check_step(gated, model, MODELS[name], replace(batch, position_ids=steps.cumsum(1)), name)


@pytest.mark.parametrize("name", tiers(["llama", "qwen3", "gpt2"], "llama"))
def test_documents_packed_in_a_row_do_not_see_each_other(name: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    gated = regate_fx.compile(model, backend="eager", validate=False)
    lengths = (5, 8, 3)
    for _ in range(2):
        apart = random_batch(generator, 3, 8, padding=None)
        apart = replace(apart, labels=apart.labels.index_fill(1, torch.tensor(0), NO_LABEL))
        real = torch.arange(8) < torch.tensor(lengths)[:, None]
        in_rows = Batch(
            apart.input_ids, real.long(), apart.labels.masked_fill(~real, NO_LABEL), apart.token_mask
        )
        packed = Batch(
            input_ids=apart.input_ids[real][None],
            attention_mask=None,
            labels=apart.labels[real][None],
            token_mask=apart.token_mask[real][None],
            position_ids=torch.arange(8).expand(3, 8)[real][None],
        )
        seen, expected = observe(gated, packed), run_key_masked(model, small, in_rows)
        reference = golden(model, small, in_rows)
        torch.testing.assert_close(seen.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen.token_loss[0], expected.token_loss[real], rtol=1e-5, atol=1e-5)
        for parameter, grad in reference.gradients.items():
            found = seen.gradients[parameter]
            assert grad is not None
            assert found is not None
            assert (found - grad).norm() <= 1e-5 * grad.norm() + 1e-6, parameter


@pytest.mark.parametrize("name", tiers(["llama", "gemma2", "bart"], "llama", "bart"))
def test_no_counted_label(name: str, generator: torch.Generator) -> None:
    model = build(name)
    gated = regate_fx.compile(model, backend="aot_eager", validate=False)
    batch = random_batch(generator, 3, 9)
    check_step(gated, model, MODELS[name], batch, "before")
    silent = replace(batch, labels=torch.full_like(batch.labels, NO_LABEL))
    seen = check_step(gated, model, MODELS[name], silent, "without labels")
    assert seen.loss == 0
    assert not any(grad.any() for grad in seen.gradients.values() if grad is not None)
    # Labels that exist, none of them with an active predictor.
    labels = silent.labels.clone()
    labels[0, 5] = 40
    apart = replace(silent, labels=labels, token_mask=torch.arange(9).expand(3, 9) < 3)
    assert observe(gated, apart).loss == 0


@pytest.mark.parametrize("name", tiers(["llama", "gemma2", "bart", "mixtral"], "llama", "bart"))
def test_a_sample_without_active_tokens(name: str, generator: torch.Generator) -> None:
    model = build(name)
    gated = regate_fx.compile(model, backend="eager", validate=False)
    for sample in range(3):
        batch = random_batch(generator, 3, 10, padding="left", share=0.7)
        token_mask = batch.token_mask.clone()
        token_mask[sample] = False
        check_step(gated, model, MODELS[name], replace(batch, token_mask=token_mask), f"sample {sample}")


@pytest.mark.parametrize("name", tiers(["llama", "gemma2"], "llama"))
def test_sizes_of_one(name: str, generator: torch.Generator) -> None:
    model = build(name)
    gated = regate_fx.compile(model, backend="eager", validate=False)
    for B, S, share in ((1, 9, 0.5), (3, 9, 0.0), (1, 9, 0.0), (1, 2, 1.0), (2, 9, 0.5)):
        batch = random_batch(generator, B, S, share=share, holes=0.0)
        check_step(gated, model, MODELS[name], batch, f"{name} B {B} S {S} share {share}")


def test_a_boolean_attention_mask(generator: torch.Generator) -> None:
    model = build("llama")
    gated = regate_fx.compile(model, backend="eager", validate=False)
    for batch in two_batches(generator):
        assert batch.attention_mask is not None
        boolean = replace(batch, attention_mask=batch.attention_mask.bool())
        check_step(gated, model, MODELS["llama"], boolean)


def test_without_a_token_mask_it_is_the_untouched_model(generator: torch.Generator) -> None:
    model = build("llama")
    gated = regate_fx.compile(model, backend="eager", validate=False)
    batch = random_batch(generator, 3, 11)
    check_step(gated, model, MODELS["llama"], batch)
    expected = model(**batch.model_inputs(), labels=batch.labels)
    seen = gated(**batch.model_inputs(), labels=batch.labels)
    assert torch.equal(seen.loss, expected.loss)
    assert torch.equal(seen.logits, expected.logits)
    check_step(gated, model, MODELS["llama"], batch, "after the dense step")


def test_evaluation_mode_is_gated_alike(generator: torch.Generator) -> None:
    model = build("gpt2", dropout=0.5)
    gated = regate_fx.compile(model, backend="eager", validate=False)
    gated.eval()
    for batch in two_batches(generator):
        check_step(gated, model, MODELS["gpt2"], batch)


def test_changed_weights_take_part(generator: torch.Generator) -> None:
    model = build("llama")
    gated = regate_fx.compile(model, backend="aot_eager", validate=False)
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.5)
    for step in range(4):
        batch = random_batch(generator, 3, 11, padding="left")
        check_step(gated, model, MODELS["llama"], batch, f"step {step}")
        observe(gated, batch)
        optimizer.step()


def test_frozen_parameters_get_no_gradient(generator: torch.Generator) -> None:
    model = build("llama")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    gated = regate_fx.compile(model, backend="aot_eager", validate=False)
    for batch in two_batches(generator):
        check_step(gated, model, MODELS["llama"], batch)


def test_padding_ids_reach_nothing(generator: torch.Generator) -> None:
    model = build("llama")
    gated = regate_fx.compile(model, backend="eager", validate=False)
    batch = random_batch(generator, 3, 11, padding="left")
    other = torch.randint(FIRST_WORD, VOCABULARY, batch.input_ids.shape, generator=generator)
    changed = replace(batch, input_ids=torch.where(batch.real, batch.input_ids, other))
    before, after = observe(gated, batch), observe(gated, changed)
    assert torch.equal(before.token_loss, after.token_loss)
