"""The teacher pass as a long job: stopped, gone on with, repaired, and refused where the data have changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from small_models import PAD, VOCABULARY, build
from torch import Tensor, nn

from regate_fx.errors import InvalidInput, StoreDamaged, StoreMismatch
from regate_fx.runtime import ReferenceLosses, ReGate, teacher_losses


def texts(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Plain text of 3 to 12 tokens."""
    chance = torch.Generator().manual_seed(8)
    lengths = torch.randint(3, 13, (start + count,), generator=chance).tolist()
    rows = [torch.randint(3, VOCABULARY, (length,), generator=chance).tolist() for length in lengths]
    return [
        {"sample_id": 11 * number, "input_ids": row, "labels": row}
        for number, row in enumerate(rows)
        if number >= start
    ]


def pad_text(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    S = max(len(example["input_ids"]) for example in examples)

    def filled(name: str, fill: int) -> Tensor:
        return torch.tensor([list(example[name]) + [fill] * (S - len(example[name])) for example in examples])

    ids = filled("input_ids", PAD)
    return {"input_ids": ids, "labels": filled("labels", -100), "attention_mask": (ids != PAD).long()}


def run_text(model: nn.Module, data: Any, folder: Path, **arguments: Any) -> ReferenceLosses:
    settings = {"collator": pad_text, "samples_per_shard": 4, "placeholder_id": PAD, "progress": False}
    return teacher_losses(model, data, folder, **{**settings, **arguments})


class Stopping:
    """A collator that stops the pass after some batches, and notes the samples that it saw."""

    def __init__(self, batches: int) -> None:
        self.left = batches
        self.rows: list[list[int]] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.rows += [list(example["input_ids"]) for example in examples]
        return pad_text(examples)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stopped_pass_goes_on_and_ends_with_the_same_bits(tmp_path: Path, streaming: bool) -> None:
    model, rows = build("llama"), texts(15)
    data = datasets.Dataset.from_list(rows)
    data = data.to_iterable_dataset() if streaming else data
    undisturbed = run_text(model, data, tmp_path / "a", batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        run_text(model, data, tmp_path / "b", batch_size=2, collator=Stopping(5))
    rest = Stopping(100)
    found = run_text(model, data, tmp_path / "b", batch_size=2, collator=rest)
    assert torch.equal(found.losses, undisturbed.losses)
    assert found.fingerprint == undisturbed.fingerprint
    # Of the two windows that were there, the first sample is compared.
    again = [row["input_ids"] for row in (rows[0], rows[4], *rows[8:])]
    assert sorted(rest.rows) == sorted(again)
    assert {path.name for path in (tmp_path / "a").glob("*.arrow")} == {
        path.name for path in (tmp_path / "b").glob("*.arrow")
    }


@pytest.mark.parametrize("arguments", [{"max_tokens_per_batch": 30}, {"batch_size": 5}, {"batch_size": 1}])
def test_batches_make_no_difference_but_in_the_last_bits(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model, data = build("qwen2"), texts(9)
    found = run_text(model, data, tmp_path, **arguments)
    for row, example in enumerate(data):
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        expected = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        stored = found.losses[found.starts[row] : found.starts[row + 1]]
        torch.testing.assert_close(stored, F.pad(expected, (1, 0)), rtol=2e-5, atol=2e-5)


def test_a_pass_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    model, data = build("llama"), texts(10)
    with pytest.raises(KeyboardInterrupt):
        run_text(model, data, tmp_path, batch_size=4, collator=Stopping(2))
    for changed, problem in (
        (
            [{**data[0], "labels": [-100] * len(data[0]["labels"])}, *data[1:]],
            "and label_hash differs",
        ),
        ([{**data[0], "input_ids": data[0]["input_ids"][::-1]}, *data[1:]], "text_hash differs"),
        (
            [data[1], data[0], *data[2:]],
            r"sample 0 came first in window 0, now sample 11 does, and sample_id",
        ),
        ([*data, *texts(1, start=10)], "it has grown by 1 since"),
    ):
        with pytest.raises(StoreMismatch, match=problem):
            run_text(model, changed, tmp_path, batch_size=4)
    with pytest.raises(StoreMismatch, match=r"another batches: batches .*'batch_size': 4.*, now .*3"):
        run_text(model, data, tmp_path, batch_size=3)
    assert len(run_text(model, data, tmp_path, batch_size=4)) == 10


def test_a_stream_that_grew_in_mid_pass(tmp_path: Path) -> None:
    model, rows = build("llama"), texts(7)
    data = datasets.Dataset.from_list(rows[:6]).to_iterable_dataset()
    run_text(model, data, tmp_path)
    (tmp_path / "manifest.json").unlink()
    grown = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(StoreMismatch, match=r"window 1 of the data set had 2 samples .* it now has 3"):
        run_text(model, grown, tmp_path)


def test_a_data_set_that_grew(tmp_path: Path) -> None:
    model, data = build("llama"), texts(9)
    losses = run_text(model, data[:7], tmp_path)
    with pytest.raises(
        StoreMismatch, match=r"over 7 samples, the data set now has 9: it has grown by 2 .* in another folder"
    ):
        run_text(model, data, tmp_path)
    assert run_text(model, data[:5], tmp_path).fingerprint == losses.fingerprint
    gate = ReGate(losses)
    with pytest.raises(
        InvalidInput, match=r"sample_id: \[77\] are not among the 7 samples .* if it has grown"
    ):
        gate.select({**pad_text(data[7:8]), "sample_id": torch.tensor([77])})


def prompted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first two tokens of each are its prompt."""
    return [{**row, "labels": [-100, -100, *row["labels"][2:]]} for row in rows]


def other_prompt(row: dict[str, Any]) -> dict[str, Any]:
    first, *rest = row["input_ids"]
    return {**row, "input_ids": [3 if first != 3 else 4, *rest]}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_finished_store_of_other_prompts_or_labels(tmp_path: Path, streaming: bool) -> None:
    model, data = build("llama"), prompted(texts(40))
    losses = run_text(model, data, tmp_path)
    for changed, problem in (
        ([other_prompt(row) for row in data], "sample 0 has other tokens before its labels now"),
        ([{**row, "labels": row["input_ids"]} for row in data], "sample 0 has other label tokens now"),
    ):
        rows = datasets.Dataset.from_list(changed)
        with pytest.raises(StoreMismatch, match=f"its teacher pass was over other data: {problem}"):
            run_text(model, rows.to_iterable_dataset() if streaming else rows, tmp_path)
    one = [*data[:38], other_prompt(data[38]), data[39]]  # which is not among the few that are looked at
    losses = run_text(model, one, tmp_path)
    gate = ReGate(losses, collator=pad_text)
    gate.collate(one[:38])
    with pytest.raises(
        InvalidInput, match=r"input_ids: those of sample 418 are not the ones that the teacher read.*\(1 such"
    ):
        gate.collate(one[-3:])


@pytest.mark.parametrize("packed", [False, True])
def test_only_what_decides_a_loss_is_compared(tmp_path: Path, packed: bool) -> None:
    """Padding on the right, marked or not, and tokens after the last label are no other prompt."""
    data = prompted(texts(3))

    def unmarked(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: value for name, value in pad_text(examples).items() if name != "attention_mask"}

    gate = ReGate(run_text(build("llama"), data, tmp_path, batch_size=3, collator=unmarked))
    longer = [{**row, "input_ids": [*row["input_ids"], 5], "labels": [*row["labels"], -100]} for row in data]
    ids = torch.tensor([0, 11, 22])
    for collate in (pad_text, unmarked):
        batch = collate(longer)
        if packed:
            ids = ids if ids.dim() == 2 else ids.repeat_interleave(batch["labels"].shape[1])[None]
            batch = {name: value.view(1, -1) for name, value in batch.items()}
        assert gate.select({**batch, "sample_id": ids}).any()
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, 1] += 1
        with pytest.raises(InvalidInput, match="input_ids: those of sample 0"):
            gate.select({**changed, "sample_id": ids})


def test_a_damaged_shard_is_repaired_by_another_pass(tmp_path: Path) -> None:
    model, data = build("llama"), texts(9)
    undisturbed = run_text(model, data, tmp_path).losses
    damaged = next(tmp_path.glob("shard-00001-*"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    gate = ReGate(ReferenceLosses.open(tmp_path))
    with pytest.raises(StoreDamaged, match=f"{damaged.name}: its bytes are not"):
        gate.select({**pad_text(data[4:5]), "sample_id": torch.tensor([44])})
    damaged.unlink()
    computed = Stopping(100)
    assert torch.equal(run_text(model, data, tmp_path, collator=computed).losses, undisturbed)
    looked_at = [data[0]["input_ids"], data[8]["input_ids"]]
    assert sorted(computed.rows) == sorted([*looked_at, *(row["input_ids"] for row in data[4:8])])


def test_repeated_ids_of_a_data_set_are_found_before_anything_is_computed(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([*texts(5), *texts(2)])
    with pytest.raises(InvalidInput, match=r"sample_id: \[0, 11\] come more than once"):
        run_text(build("llama"), data, tmp_path / "store", collator=Stopping(0))
    assert not (tmp_path / "store").exists()
    with pytest.raises(InvalidInput, match=r"sample_id: \[0, 11\] come more than once"):
        run_text(build("llama"), data.to_iterable_dataset(), tmp_path / "stream")
    assert not (tmp_path / "stream" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dtype": torch.bfloat16}, "autocast"),
        ({"losses_dtype": "float16"}, "losses"),
        ({"settings": {"max_length": 100}}, "settings"),
    ],
)
def test_other_precision_and_settings_are_another_store(
    tmp_path: Path, arguments: dict[str, Any], named: str
) -> None:
    model, data = build("llama"), texts(5)
    exact = run_text(model, data, tmp_path / "a").losses
    with pytest.raises(StoreMismatch, match=f"computed with another {named}"):
        run_text(model, data, tmp_path / "a", **arguments)
    rounded = run_text(model, data, tmp_path / "b", **arguments).losses
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
    assert torch.equal(rounded, exact) == (named == "settings")


@pytest.mark.parametrize(
    ("name", "changed", "named"),
    [
        ("llama", {"rms_norm_eps": 1e-3}, "config.rms_norm_eps"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
            "config.rope_parameters.rope_theta, teacher",
        ),
        ("mistral", {"sliding_window": 3}, "config.sliding_window"),
        ("gemma2", {"final_logit_softcapping": 9.0}, "config.final_logit_softcapping"),
        ("llama", {"attn_implementation": "eager"}, "attention"),
    ],
)
def test_the_same_weights_in_another_computation_are_another_teacher(
    tmp_path: Path, name: str, changed: dict[str, Any], named: str
) -> None:
    run_text(build(name), texts(2), tmp_path)
    with pytest.raises(StoreMismatch, match=rf"computed with another {re.escape(named)}\."):
        run_text(build(name, **changed), texts(2), tmp_path)


def test_a_model_that_was_saved_and_loaded_is_the_same_teacher(tmp_path: Path) -> None:
    model = build("llama", dropout=0.5)
    losses = run_text(model, texts(2), tmp_path / "store", special_ids=[2])
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    again.config.use_cache = False
    again.config.pad_token_id, again.config.eos_token_id = 5, 6  # as trainers do, whose tokenizer has others
    again.gradient_checkpointing_enable()
    found = run_text(again, texts(2), tmp_path / "store", special_ids=[2])
    assert found.fingerprint == losses.fingerprint


def test_settings_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"settings: cannot be written as JSON .*device"):
        run_text(build("llama"), texts(2), tmp_path, settings={"where": torch.device("cpu")})


def test_progress_in_samples_and_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_text(build("llama"), texts(7), tmp_path, progress=True)
    shown = capsys.readouterr().out
    assert "7/7 samples" in shown
    assert re.search(r"[\d,]+ tokens/s .* left: 0:00:00", shown)
    (tmp_path / "manifest.json").unlink()
    next(tmp_path.glob("shard-00001-*")).unlink()
    run_text(build("llama"), texts(7), tmp_path, progress=True)
    assert "7/7 samples" in capsys.readouterr().out
