"""Translation validation finds a compiler that is wrong, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from key_masked_engine import batch, gradients
from small_models import build
from small_vlms import ImageBatch, build_vlm, image_batch
from tiers import exhaustive, tiers
from torch._dynamo.utils import counters

import regate_fx
from regate_fx import engine, validation
from regate_fx.errors import ValidationFailed
from regate_fx.passes import masks, rewrite_loss
from regate_fx.passes.masks import MaskProof
from regate_fx.validation import VALIDATED, Probe, _compare, _half, _sketch, validate


def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_proof", lambda op, forms: MaskProof(causal=False))
    gated = regate_fx.compile(build("llama"), backend="eager")
    for _ in range(2):
        with pytest.raises(ValidationFailed, match="against the untouched model") as failure:
            gated(**batch())
    assert "the loss is" in str(failure.value)


def test_a_window_taken_in_packed_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # With every token active, packed rows and positions are the same: only the dense reference can tell.
    def no_window(op: object, forms: object) -> MaskProof:
        return MaskProof(causal=True, window=3)

    monkeypatch.setattr(masks, "_proof", no_window)
    model = build("mistral", sliding_window=4)
    with pytest.raises(ValidationFailed):
        regate_fx.compile(model, backend="eager")(**batch())


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = rewrite_loss.emit_loss

    def severed(rewriter: object, node: object) -> object:
        loss = original(rewriter, node)  # type: ignore[arg-type]
        halves = rewriter.emit.call(torch.ops.aten.mul.Scalar, loss, 0.5)  # type: ignore[attr-defined]
        constant = rewriter.emit.call(torch.ops.aten.detach.default, halves)  # type: ignore[attr-defined]
        return rewriter.emit.call(torch.ops.aten.add.Tensor, halves, constant)  # type: ignore[attr-defined]

    monkeypatch.setattr("regate_fx.passes.elide.emit_loss", severed)
    with pytest.raises(ValidationFailed, match="the gradient of"):
        regate_fx.compile(build("llama"), backend="eager")(**batch())


def probe(**gradients: float) -> Probe:
    return Probe(1.0, {name: _sketch(torch.full((3,), value)) for name, value in gradients.items()})


def test_zeros_are_no_gradient_where_eager_has_none() -> None:
    """What `torch.compile` gives of a result, in a graph of its own, that nobody reads."""
    _compare("a check", probe(read=1.0, unread=0.0), probe(read=1.0), torch.float32)
    for found in (probe(read=1.0, unread=1e-6), probe(), probe(unread=0.0)):
        with pytest.raises(ValidationFailed, match="the same parameters must have a gradient"):
            _compare("a check", found, probe(read=1.0), torch.float32)


def test_validation_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_proof", lambda op, forms: MaskProof(causal=False))
    regate_fx.compile(build("llama"), backend="eager", validate=False)(**batch())


def test_what_was_validated_is_told() -> None:
    gated = regate_fx.compile(build("llama"), backend="eager")
    gated(**batch())
    assert gated.report.validation == "validated against the untouched model and the dense reference"
    assert "dense reference" in str(gated.report)


def test_a_batch_without_labels_to_compare_is_named(caplog: pytest.LogCaptureFixture) -> None:
    inputs = batch()
    inputs["labels"] = inputs["labels"].new_full(inputs["labels"].shape, -100)
    gated = regate_fx.compile(build("llama"), backend="eager")
    gated(**inputs)
    assert gated.report.validation == "not validated: the batch has no labels"
    assert "not validated" in caplog.text


@pytest.mark.parametrize("name", tiers(["llama", "gpt2"], "llama"))
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = build(name, dropout=0.1 if name == "gpt2" else 0.0)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state()
    first = regate_fx.compile(model, backend="eager")(**batch())
    assert gradients(model) == {}
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    # The step draws the same dropout whether or not it was validated before.
    torch.set_rng_state(states)
    second = regate_fx.compile(model, backend="eager", validate=False)(**batch())
    assert torch.equal(first.loss, second.loss)


@pytest.mark.parametrize(
    "name",
    tiers(
        ["llama", "mistral", "gemma2", "bloom", "opt", "bart", "deepseek_v3"],
        "llama",
        "gemma2",
    ),
)
def test_the_dense_reference_gives_the_gated_step(name: str) -> None:
    model = build(name)
    steps = []
    for reference in (False, True):
        model.zero_grad()
        gated = regate_fx.compile(model, backend="eager", validate=False, reference=reference)
        output = gated(**batch())
        output.loss.backward()
        steps.append((output.loss.detach(), gradients(model)))
    torch.testing.assert_close(steps[0][0], steps[1][0])
    assert steps[0][1].keys() == steps[1][1].keys()
    total = sum(float(g.norm()) ** 2 for g in steps[1][1].values()) ** 0.5
    for key, gradient in steps[0][1].items():
        assert float((gradient - steps[1][1][key]).norm()) < 1e-5 * total, key


@pytest.mark.parametrize("S", [*range(1, 40), 64, 127, 128, 300])
def test_half_of_the_positions_is_no_pattern_that_hides_an_error(S: int) -> None:
    present = torch.ones(2, S, dtype=torch.bool)
    kept = _half(present)
    assert torch.equal(kept, _half(present))
    assert bool(kept[:, 0].all())
    is_prefix = kept.sum(1) == kept.long().cumprod(1).sum(1)
    assert not (S >= 3 and bool(is_prefix.any()))
    assert not (S >= 4 and int(kept[0].sum()) == int(kept[1].sum()))
    assert abs(int(kept.sum()) - S) <= 2
    if S >= 64:  # as many runs as a draw has, not a period
        assert S / 4 < int((kept[:, 1:] != kept[:, :-1]).sum(1).min()) < 3 * S / 4
        assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_half_of_the_positions_leaves_padding_out(side: str) -> None:
    lengths = torch.tensor([[3], [9], [1], [0]])
    present = torch.arange(9) < lengths
    present = present.flip(1) if side == "left" else present
    kept = _half(present)
    assert not bool((kept & ~present).any())
    assert kept.sum(1).tolist() == [2, 3, 1, 0]
    starts = present & (present.cumsum(1) == 1)
    assert bool(kept[starts].all())


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The outcome of each validation of the test."""
    outcomes: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> str:
        outcomes.append(validate(*args, **kwargs))
        return outcomes[-1]

    monkeypatch.setattr(engine, "validate", counted)
    return outcomes


def break_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every later capture wrong."""
    monkeypatch.setattr(masks, "_proof", lambda op, forms: MaskProof(causal=False))


def unlabelled(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"labels": torch.full_like(inputs["labels"], -100)}


def single_position(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:, :1] for name, value in inputs.items()} | {"token_mask": torch.ones(2, 1).bool()}


@pytest.mark.parametrize("first", tiers([unlabelled, single_position], unlabelled))
def test_validation_waits_for_a_batch_with_labels(
    first: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_masks(monkeypatch)
    gated = regate_fx.compile(build("llama"), backend="eager")
    for _ in range(2):
        gated(**first(batch()))
    assert caplog.text.count("not validated") == 1
    with pytest.raises(ValidationFailed):
        gated(**batch())


def test_validation_waits_for_a_batch_that_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regate_fx.validation._WHOLE_BATCH", 20)
    break_masks(monkeypatch)
    gated = regate_fx.compile(build("llama"), backend="eager")
    small = batch() | {"position_ids": torch.arange(9)[None]}  # cannot be cut by sample
    large = {key: value if key == "position_ids" else value.repeat(2, 1) for key, value in small.items()}
    gated(**large)
    assert gated.report.validation.startswith("not validated: the batch is large")
    with pytest.raises(ValidationFailed):
        gated(**small)


def one_sample(gated: Any) -> dict[str, Any]:
    return {name: value[:1] for name, value in batch().items()}


def another_argument(gated: Any) -> dict[str, Any]:
    return batch() | {"attention_mask": torch.ones(2, 9).long(), "position_ids": torch.arange(9).expand(2, 9)}


def another_mode(gated: Any) -> dict[str, Any]:
    gated.eval()
    return batch()


@pytest.mark.parametrize("change", tiers([one_sample, another_argument, another_mode], one_sample))
def test_a_later_trace_is_validated_before_its_result_is_handed_out(
    change: Any, monkeypatch: pytest.MonkeyPatch, validations: list[str]
) -> None:
    gated = regate_fx.compile(build("llama"), backend="eager")
    gated(**batch())
    gated(**batch(seed=1))
    assert validations == [VALIDATED]
    with monkeypatch.context() as patched:
        break_masks(patched)
        inputs = change(gated)
        for _ in range(2):
            with pytest.raises(ValidationFailed):
                gated(**inputs)
    assert validations == [VALIDATED]


def test_a_trace_is_validated_once(validations: list[str]) -> None:
    gated = regate_fx.compile(build("llama"), backend="eager")
    for inputs in (batch(), one_sample(gated), batch(seed=1), one_sample(gated)):
        gated(**inputs).loss.backward()
    assert validations == [VALIDATED] * 2
    assert gated.report.validation == VALIDATED


def one_active_position_each(B: int) -> dict[str, Any]:
    ids = torch.arange(3, 3 + 9 * B).view(B, 9)
    mask = torch.zeros(B, 9, dtype=torch.bool)
    mask[:, 3] = True
    return {"input_ids": ids, "labels": ids, "token_mask": mask}


@exhaustive
def test_a_trace_made_for_a_size_of_one_is_validated_on_the_batch_itself(validations: list[str]) -> None:
    gated = regate_fx.compile(build("llama"), backend="eager")
    gated(**one_active_position_each(3))
    gated(**one_active_position_each(4))
    assert validations == [VALIDATED] * 2
    assert gated.report.validation == VALIDATED


def test_a_part_cut_from_longer_samples_runs_the_trace_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regate_fx.validation._POSITIONS", 6)
    gated = regate_fx.compile(build("llama"), backend="eager")
    gated(**batch())
    assert gated.report.traces == 1
    assert gated.report.validation == VALIDATED


@exhaustive
def test_a_trace_that_the_small_batch_does_not_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regate_fx.validation._SAMPLES", 1)
    gated = regate_fx.compile(build("llama"), backend="eager")
    gated(**batch())
    assert (
        gated.report.validation == f"{VALIDATED}; not those traces that a small part of a batch does not run"
    )
    gated(**one_sample(gated))
    assert gated.report.validation.endswith("does not run")


@pytest.mark.parametrize("dropout", tiers([0.0, 0.1], 0.0))
def test_validation_after_the_call_leaves_its_step_as_it_was(dropout: float, validations: list[str]) -> None:
    model = build("gpt2", dropout=dropout)
    gated = regate_fx.compile(model, backend="eager")
    gated(**batch())
    torch.manual_seed(1)
    gated(**one_sample(gated)).loss.backward()
    assert validations == [VALIDATED] * 2
    validated, state = gradients(model), torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(1)
    regate_fx.compile(model, backend="eager", validate=False)(**one_sample(gated)).loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, validated[name]), name


def test_a_wrong_call_leaves_the_capture_as_it_was() -> None:
    model = build("llama")
    gated = regate_fx.compile(model, backend="eager")
    inputs = batch()
    wrong = inputs | {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    gated(**inputs)
    for _ in range(2):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            gated(**wrong)
        traces = counters["stats"]["unique_graphs"]
        gated(**inputs).loss.backward()
        assert counters["stats"]["unique_graphs"] == traces
    assert gated.report.gated == 2


def test_a_wrong_first_call_does_no_harm() -> None:
    model = build("llama")
    gated = regate_fx.compile(model, backend="eager")
    inputs = batch()
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        gated(**inputs, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
    gated(**inputs)
    assert gated.report.traces == 1
    assert gated.report.validation == VALIDATED


def test_a_float64_model_may_compute_its_norms_in_float32() -> None:
    gated = regate_fx.compile(build("llama").double(), backend="eager")
    gated(**batch())
    assert gated.report.validation == VALIDATED


@exhaustive
def test_a_step_whose_buffers_are_saved_survives_a_later_validation() -> None:
    gated = regate_fx.compile(build("gemma2"), backend="eager")
    gated(**batch())
    gated(**one_sample(gated)).loss.backward()
    assert gated.report.validation == VALIDATED


def large_image_batch(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> ImageBatch:
    """One of which two samples are small enough to be validated; counts: images of each sample."""
    images = image_batch("llava", generator, counts)
    monkeypatch.setattr(validation, "_WHOLE_BATCH", 2 * images.input_ids.shape[1])
    return images


def test_of_a_large_batch_with_images_whole_samples_are_validated(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    images = large_image_batch((1, 1, 1, 1), monkeypatch, generator)
    monkeypatch.setattr(masks, "_proof", lambda op, forms: MaskProof(causal=False))
    with pytest.raises(ValidationFailed, match="against the untouched model"):
        regate_fx.compile(build_vlm("llava"), backend="eager")(
            **images.model_inputs(), labels=images.labels, token_mask=images.token_mask
        )


def test_as_many_images_as_samples_need_not_be_one_for_each(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    model = build_vlm("llava")

    def part(counts: tuple[int, ...]) -> dict[str, Any] | None:
        images = large_image_batch(counts, monkeypatch, generator)
        assert len(images.images["pixel_values"]) == len(images.labels) == 4
        inputs = {**images.model_inputs(), "labels": images.labels}
        return validation._part(model, inputs, lambda plan, batch: model(**batch))

    taken = part((1, 1, 1, 1))
    assert taken is not None and len(taken["pixel_values"]) == len(taken["labels"]) == 2
    assert part((0, 2, 2, 0)) is None


def test_only_entries_of_samples_are_taken_for_some(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([[-100, 5], [5, 5], [5, 5], [-100, -100]])
    pixels = torch.arange(4.0)[:, None, None, None]
    inputs = {"input_ids": labels, "labels": labels, "pixel_values": pixels, "use_cache": False}
    part = validation._whole_samples(inputs)
    assert part is not None and part["input_ids"] is part["labels"]
    assert part["labels"].tolist() == [[5, 5], [5, 5]]
    assert part["pixel_values"].flatten().tolist() == [1.0, 2.0]
    for other in (torch.zeros(5, 3), [pixels[0]] * 4, torch.zeros(3, 4, 2)):
        assert validation._whole_samples({**inputs, "pixel_values": other}) is None
    monkeypatch.setattr(validation, "_WHOLE_BATCH", 1)  # fewer than the positions of one sample
    assert validation._whole_samples(inputs) is None
