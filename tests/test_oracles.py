"""The oracles are evidence only if they agree with each other and notice what is wrong."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from comparison import Outcome, check_no_bit_differs, compare
from oracles import golden, run_key_masked, run_subsequences, run_untouched
from small_models import FIRST_WORD, MODELS, VOCABULARY, WINDOW, Batch, build, random_batch

NO_SUBSEQUENCE = {"mistral", "gemma2", "gemma3", "bart"}


def all_active(batch: Batch) -> Batch:
    return replace(batch, token_mask=torch.ones_like(batch.token_mask))


@pytest.mark.parametrize("name", MODELS)
def test_masking_nothing_is_the_untouched_model(name: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    batch = all_active(random_batch(generator, 3, 10, padding=None))
    untouched, masked = run_untouched(model, small, batch), run_key_masked(model, small, batch)
    compare(masked, untouched, golden(model, small, batch, run_untouched), batch.active).check(name)


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("name", sorted(MODELS.keys() - NO_SUBSEQUENCE))
def test_subsequences_agree_with_masked_keys(name: str, padding: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    batch = random_batch(generator, 3, 10, padding=padding)
    reference = golden(model, small, batch)
    in_float32 = run_subsequences(model, small, batch)
    compare(in_float32, run_key_masked(model, small, batch), reference, batch.active).check(name)
    in_float64 = golden(model, small, batch, run_subsequences)
    assert relative_distance(in_float64, reference, batch.active) < 1e-11


def relative_distance(one: Outcome, other: Outcome, active: torch.Tensor) -> float:
    assert one.logits is not None
    assert other.logits is not None
    distances = [(one.logits[active] - other.logits[active]).norm() / other.logits[active].norm()]
    total = sum(grad.norm() ** 2 for grad in other.gradients.values() if grad is not None) ** 0.5
    assert one.gradients.keys() == other.gradients.keys()
    for name, grad in other.gradients.items():
        found = one.gradients[name]
        assert (grad is None) == (found is None), name
        if grad is not None and found is not None:
            distances.append((found - grad).norm() / total)
    return float(max(distances))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", sorted(NO_SUBSEQUENCE))
def test_windows_by_index_agree_with_masks_written_by_hand(
    name: str, padding: str, generator: torch.Generator
) -> None:
    model, small = build(name), MODELS[name]
    batch = random_batch(generator, 3, 10, padding=padding)
    reference = golden(model, small, batch).logits
    assert reference is not None
    ahead = torch.arange(10)[:, None] - torch.arange(10)  # [query, key]
    full = (ahead >= 0) & batch.active[:, None, None, :]
    sliding = full & (ahead < WINDOW)
    mixed = {"full_attention": full, "sliding_attention": sliding}
    mask = {"mistral": sliding, "bart": full}.get(name, mixed)
    if name == "gemma2":  # adds its mask to the scores
        mask = {kind: torch.where(seen, 0.0, -1e9) for kind, seen in mixed.items()}
    positions = {} if name == "bart" else {"position_ids": torch.arange(10).expand(3, 10)}
    with torch.no_grad():
        found = model(input_ids=batch.input_ids, attention_mask=mask, **positions).logits
    error = (found - reference)[batch.active].norm() / reference[batch.active].norm()
    assert error < 1e-5


@pytest.mark.parametrize("name", sorted(NO_SUBSEQUENCE))
def test_no_subsequence_where_it_means_something_else(name: str, generator: torch.Generator) -> None:
    with pytest.raises(oracles.NotApplicableError, match="index"):
        run_subsequences(build(name), MODELS[name], random_batch(generator, 2, 6))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_positions_are_those_of_the_original(name: str, padding: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    batch = all_active(random_batch(generator, 3, 10, padding=padding))
    with torch.no_grad():
        as_called = model(**batch.model_inputs()).logits[batch.active]
    logits = run_key_masked(model, small, batch).logits
    assert logits is not None
    torch.testing.assert_close(logits[batch.active], as_called, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_elided_ids_reach_nothing(name: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    batch = random_batch(generator, 3, 10, padding="left")
    other = torch.randint(FIRST_WORD, VOCABULARY, batch.input_ids.shape, generator=generator)
    changed = replace(batch, input_ids=torch.where(batch.active, batch.input_ids, other))
    before, after = run_key_masked(model, small, batch), run_key_masked(model, small, changed)
    compare(after, before, golden(model, small, batch), batch.active).check(name)


@pytest.mark.parametrize("name", MODELS)
def test_one_key_too_many_is_noticed(name: str, generator: torch.Generator) -> None:
    model, small = build(name), MODELS[name]
    batch = random_batch(generator, 3, 10, share=0.6, padding=None)
    extra = batch.token_mask.clone()
    place = tuple((~extra[:, :-1]).nonzero()[0].tolist())
    extra[place] = True
    wrong = run_key_masked(model, small, replace(batch, token_mask=extra))
    right = run_key_masked(model, small, batch)
    assert right.logits is not None
    comparison = compare(
        replace(wrong, counted=right.counted, token_loss=right.token_loss, loss=right.loss),
        right,
        golden(model, small, batch),
        batch.active,
    )
    assert "logits: error" in str(comparison.failures)
    assert "gradient of" in str(comparison.failures)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - NO_SUBSEQUENCE))
def test_packed_positions_are_noticed(name: str, generator: torch.Generator) -> None:
    model = build(name)
    batch = random_batch(generator, 3, 10, padding=None)
    alone = [batch.input_ids[b, batch.active[b]] for b in range(3)]
    right = run_key_masked(model, MODELS[name], batch).logits
    assert right is not None
    with torch.no_grad():
        packed = torch.cat([model(input_ids=ids[None]).logits[0] for ids in alone])
    scale = right[batch.active].norm()
    assert (packed - right[batch.active]).norm() / scale > 1e-3


def outcome_pair(generator: torch.Generator) -> tuple[Outcome, Outcome, Batch]:
    model, batch = build("llama"), random_batch(generator, 3, 10)
    return run_key_masked(model, MODELS["llama"], batch), golden(model, MODELS["llama"], batch), batch


def test_the_set_of_gradients_is_compared(generator: torch.Generator) -> None:
    right, reference, batch = outcome_pair(generator)
    name = "model.norm.weight"
    missing = replace(right, gradients={**right.gradients, name: None})
    assert f"no gradient for {name}" in compare(missing, right, reference, batch.active).failures
    without = replace(reference, gradients={**reference.gradients, name: None})
    failures = compare(right, right, without, batch.active).failures
    assert failures == [f"a gradient for {name}, which has none in the original"]


def test_zeros_are_not_the_gradient(generator: torch.Generator) -> None:
    right, reference, batch = outcome_pair(generator)
    for name, grad in right.gradients.items():
        assert grad is not None
        zeros = replace(right, gradients={**right.gradients, name: torch.zeros_like(grad)})
        (failure,) = compare(zeros, right, reference, batch.active).failures
        assert failure.startswith(f"gradient of {name}: error")


def test_uncounted_losses_and_nan_are_noticed(generator: torch.Generator) -> None:
    right, reference, batch = outcome_pair(generator)
    noisy = replace(right, token_loss=torch.where(right.counted, right.token_loss, 1e-3))
    assert "token_loss is not 0 at uncounted" in str(compare(noisy, right, reference, batch.active).failures)
    broken = replace(right, loss=torch.tensor(torch.nan))
    assert "loss: error nan" in str(compare(broken, right, reference, batch.active).failures)
    shifted = replace(right, counted=right.counted.roll(1, dims=1))
    assert "counted labels differ" in str(compare(shifted, right, reference, batch.active).failures)


def test_logits_that_are_missing_are_noticed(generator: torch.Generator) -> None:
    right, reference, batch = outcome_pair(generator)
    without = replace(right, logits=None)
    assert compare(without, right, reference, batch.active).ok
    (failure,) = compare(without, right, reference, batch.active, with_logits=True).failures
    assert failure == "no logits, which were asked for"
    (failure,) = compare(right, right, replace(reference, logits=None), batch.active).failures
    assert failure == "no logits to compare those of the run with"
    with pytest.raises(AssertionError):
        check_no_bit_differs(right, replace(right, logits=reference.logits), batch.active)


def test_the_failure_names_everything_that_differs(generator: torch.Generator) -> None:
    right, reference, batch = outcome_pair(generator)
    assert right.logits is not None
    wrong = replace(right, loss=right.loss + 1, logits=right.logits + 1)
    with pytest.raises(AssertionError, match=r"(?s)step 3 differs:.*loss: error 1.00e\+00.*logits: error"):
        compare(wrong, right, reference, batch.active).check("step 3")


def test_no_counted_label_is_a_zero_loss_with_zero_gradients(generator: torch.Generator) -> None:
    model, batch = build("llama"), random_batch(generator, 2, 6)
    silent = replace(batch, labels=torch.full_like(batch.labels, oracles.NO_LABEL))
    outcome = run_key_masked(model, MODELS["llama"], silent)
    assert outcome.loss == 0
    assert all(grad is not None and not grad.any() for grad in outcome.gradients.values())
