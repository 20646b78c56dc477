"""The teacher pass: what the text alone says about every label, computed once and kept.

Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from image_oracle import original_positions
from small_models import PAD, VOCABULARY, build
from small_vlms import IMAGE, VLMS, ImageBatch, build_vlm, image_batch
from tiers import tiers
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import regate_fx
from regate_fx.errors import InvalidInput, StoreMismatch
from regate_fx.runtime import ReferenceLosses, ReGate, teacher_losses
from regate_fx.runtime.text_only import TextOnly, visual_token_ids


def backbone_alone(model: Any, batch: ImageBatch) -> Tensor:
    """float32 [B, S]: losses of the language backbone called by itself on embeddings of words and placeholders."""
    model.eval()
    with torch.no_grad():
        positions = original_positions(model, batch)
        embedded = model.get_input_embeddings()(batch.input_ids.masked_fill(batch.visual, PAD))
        inputs = {
            "inputs_embeds": embedded,
            "attention_mask": batch.attention_mask,
            "position_ids": positions,
        }
        states = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(states)
    model.train()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none")
    return F.pad(losses.view(len(batch.labels), -1), (1, 0))


def as_call(batch: ImageBatch) -> dict[str, Any]:
    return {**batch.model_inputs(), "labels": batch.labels, "sample_id": torch.zeros(len(batch.labels))}


@pytest.mark.parametrize("name", VLMS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_it_is_the_language_backbone_with_placeholders(
    name: str, padding: Any, generator: torch.Generator
) -> None:
    model = build_vlm(name)
    text_only = TextOnly(model, model, visual_token_ids(model.config), PAD)
    for counts in ((1, 2), (2, 0, 1)):
        batch = image_batch(name, generator, counts, padding=padding)
        found = text_only.token_loss(as_call(batch))
        torch.testing.assert_close(found, backbone_alone(model, batch), rtol=2e-5, atol=2e-5)
        assert model.training
    repainted = {
        key: torch.randn_like(value) if value.is_floating_point() else value
        for key, value in batch.images.items()
    }
    assert torch.equal(text_only.token_loss({**as_call(batch), **repainted}), found)


def test_positions_are_those_with_pictures(generator: torch.Generator) -> None:
    """In a model with positions in space, text after a picture is not where its index says."""
    model = build_vlm("qwen2_vl")
    batch = image_batch("qwen2_vl", generator, (2, 1))
    assert original_positions(model, batch).dim() == 3
    text_only = TextOnly(model, model, (IMAGE,), PAD)
    by_index = torch.arange(batch.labels.shape[1]).expand(3, *batch.labels.shape)
    found = text_only.token_loss(as_call(batch))
    assert not torch.allclose(found, text_only.token_loss({**as_call(batch), "position_ids": by_index}))


def test_visual_ids_are_read_from_the_config() -> None:
    for name in VLMS:
        assert IMAGE in visual_token_ids(build_vlm(name).config)
    assert visual_token_ids(build("llama").config) == ()


def test_pictures_without_known_ids_are_refused(generator: torch.Generator) -> None:
    model = build_vlm("llava")
    batch = image_batch("llava", generator, (1, 1))
    with pytest.raises(
        InvalidInput, match=r"visual_ids: are not known, but the batch holds \['pixel_values'\]"
    ):
        TextOnly(model, model, (), PAD).token_loss(as_call(batch))
    with pytest.raises(InvalidInput, match="placeholder_id: there is neither"):
        TextOnly(model, model, (IMAGE,), None)


def scenes(generator: torch.Generator, count: int) -> list[dict[str, Any]]:
    """Examples with one picture each, as a data set holds them."""
    found = []
    for number in range(count):
        batch = image_batch("llava", generator, (1,), padding=None)
        pixels = batch.images["pixel_values"][0]
        ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
        found.append({"sample_id": 100 + number, "input_ids": ids, "labels": labels, "pixel_values": pixels})
    return found


def pad(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    S = max(len(example["input_ids"]) for example in examples)

    def filled(name: str, fill: int) -> Tensor:
        return torch.tensor([example[name] + [fill] * (S - len(example[name])) for example in examples])

    ids = filled("input_ids", PAD)
    return {
        "input_ids": ids,
        "labels": filled("labels", -100),
        "attention_mask": (ids != PAD).long(),
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
    }


def run_pass(model: nn.Module, data: Any, folder: Path, **arguments: Any) -> ReferenceLosses:
    defaults = {"collator": pad, "placeholder_id": PAD, "batch_size": 3, "progress": False}
    return teacher_losses(model, data, folder, **{**defaults, **arguments})


def test_every_label_has_its_loss(tmp_path: Path, generator: torch.Generator) -> None:
    model, data = build_vlm("llava"), scenes(generator, 7)
    losses = run_pass(model, data, tmp_path)
    assert losses.ids.tolist() == [example["sample_id"] for example in data]
    text_only = TextOnly(model, model, (IMAGE,), PAD)
    for row, example in enumerate(data):
        labels = pad([example])["labels"]
        alone = text_only.token_loss(pad([example]))[labels != -100]
        stored = losses.losses[losses.starts[row] : losses.starts[row + 1]]
        torch.testing.assert_close(stored, alone, rtol=1e-5, atol=1e-5)


def test_it_runs_once(tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build_vlm("llava"), scenes(generator, 4)
    losses = run_pass(model, data, tmp_path)
    monkeypatch.setattr(TextOnly, "token_loss", lambda *_: pytest.fail("computed again"))
    again = run_pass(model, data, tmp_path)
    assert again.fingerprint == losses.fingerprint
    assert torch.equal(again.losses, losses.losses)


@pytest.mark.parametrize("change", ["weights", "placeholder_id", "special_ids", "tokenizer"])
def test_losses_of_something_else_are_refused(
    tmp_path: Path, generator: torch.Generator, change: str
) -> None:
    model, data = build_vlm("llava"), scenes(generator, 2)
    run_pass(model, data, tmp_path)
    before = sorted(tmp_path.iterdir())
    arguments: dict[str, Any] = {
        "weights": {},
        "placeholder_id": {"placeholder_id": 2},
        "special_ids": {"special_ids": [5]},
        "tokenizer": {"tokenizer": words(VOCABULARY), "special_ids": [0, 1, 2]},
    }[change]
    if change == "weights":
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
    tokenizer = r"truncation.model_max_length, truncation.truncation_side, vocabulary\."
    named = {"weights": "teacher", "tokenizer": tokenizer}.get(change, change)
    with pytest.raises(StoreMismatch, match=f"computed with another {named}"):
        run_pass(model, data, tmp_path, **arguments)
    assert sorted(tmp_path.iterdir()) == before


def words(count: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{index}": index for index in range(count)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2")


def test_a_teacher_of_its_own(tmp_path: Path, generator: torch.Generator) -> None:
    student, teacher = build_vlm("llava"), build("llama", seed=3)
    data = scenes(generator, 2)
    tokenizers = {"tokenizer": words(VOCABULARY), "teacher_tokenizer": words(VOCABULARY)}
    losses = run_pass(student, data, tmp_path, teacher=teacher, **tokenizers)
    batch = pad(data)
    with torch.no_grad():
        ids = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, PAD)
        logits = teacher.eval()(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
    )
    # A label at the first position has no predictor and no loss.
    found = losses.losses[losses.losses > 0]
    torch.testing.assert_close(found, expected[expected > 0], rtol=1e-5, atol=1e-5)


def test_a_teacher_of_another_vocabulary(tmp_path: Path, generator: torch.Generator) -> None:
    student, data, store = build_vlm("llava"), scenes(generator, 2), tmp_path / "store"
    with pytest.raises(InvalidInput, match=r"teacher: knows 50 tokens, the student 97\."):
        run_pass(student, data, store, teacher=build("llama", vocab_size=50))
    other = build("llama")
    with pytest.raises(InvalidInput, match="teacher_tokenizer: cannot be compared"):
        run_pass(student, data, store, teacher=other)
    tokenizers = {"tokenizer": words(VOCABULARY), "teacher_tokenizer": words(VOCABULARY - 1)}
    with pytest.raises(InvalidInput, match="teacher_tokenizer: gives tokens other ids"):
        run_pass(student, data, store, teacher=other, **tokenizers)
    assert not store.exists()


def test_ids_are_needed_and_unique(tmp_path: Path, generator: torch.Generator) -> None:
    model, data = build("llama"), scenes(generator, 2)
    plain = [{name: value for name, value in example.items() if name != "sample_id"} for example in data]
    with pytest.raises(InvalidInput, match="sample_id: is missing from an example"):
        run_pass(model, plain, tmp_path / "a")
    model = build_vlm("llava")
    with pytest.raises(InvalidInput, match=r"sample_id: \[100\] come more than once"):
        run_pass(model, [data[0], data[0]], tmp_path / "b")
    with pytest.raises(StoreMismatch):
        ReferenceLosses.open(tmp_path / "b")


@pytest.mark.parametrize("name", tiers(["llava", "qwen2_vl"], "llava"))
def test_a_gate_keeps_pictures_and_the_model_learns(
    tmp_path: Path, name: str, generator: torch.Generator
) -> None:
    """From the teacher pass to a gated step with pictures in the batch."""
    model = build_vlm(name)
    batch = image_batch(name, generator, (1, 2), words=9)
    ids = torch.tensor([8, 3])
    call = {**batch.model_inputs(), "labels": batch.labels}
    example = [{"sample_id": 8}, {"sample_id": 3}]
    arguments = {"collator": lambda rows: call, "batch_size": 2, "placeholder_id": PAD, "progress": False}
    losses = teacher_losses(model, example, tmp_path, **arguments)
    sparse = regate_fx.runtime.DualCycle(keep=0.3, warmup=0, cycle=1, dense=0)
    gate = ReGate(losses, schedule=sparse)
    gated = regate_fx.compile(model, backend="eager", gate=gate)
    choice = gate.choose({**call, "sample_id": ids})
    out = gated(**call, sample_id=ids)
    assert choice.token_mask[batch.visual].all()
    assert int(choice.token_mask.sum()) < int(batch.real.sum())
    expected = choice.token_mask.roll(1, 1) & (batch.labels != -100)
    assert torch.equal(out.counted[:, 1:], expected[:, 1:])
    out.loss.backward()
    tower = [p for part, p in model.named_parameters() if "vis" in part and p.requires_grad]
    assert tower
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tower)
