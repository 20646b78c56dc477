"""`regate-fx teacher` on a text model, on one with pictures, and in two processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from small_models import VOCABULARY, build
from small_vlms import build_vlm, image_batch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from regate_fx.cli import app
from regate_fx.runtime import ReferenceLosses, teacher_losses

COLLATOR = """
import torch

def with_pictures(examples, processor):
    ids = torch.tensor([example["input_ids"] for example in examples])
    pictures = torch.tensor([example["pixel_values"] for example in examples])
    mask = (ids != processor.pad_token_id).long()
    labels = torch.tensor([example["labels"] for example in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pictures}

def alone(examples):
    return with_pictures(examples, FakeProcessor)

class FakeProcessor:
    pad_token_id = 1
"""


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    words = ["<s>", "<pad>", "</s>", *(f"w{index}" for index in range(3, VOCABULARY))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def save_text(folder: Path, count: int = 9) -> list[dict[str, Any]]:
    """A model with its tokenizer, and a file of texts; the texts."""
    build("llama").save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    chance = torch.Generator().manual_seed(2)
    rows = [torch.randint(4, VOCABULARY, (3 + number % 5,), generator=chance) for number in range(count)]
    texts = [{"text": " ".join(f"w{token}" for token in row.tolist())} for row in rows]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return texts


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["teacher", *map(str, arguments)])


@pytest.mark.parametrize("options", [[], ["--streaming", "--max-tokens-per-batch", 20]])
def test_plain_text(tmp_path: Path, options: list[Any]) -> None:
    texts = save_text(tmp_path)
    arguments = (tmp_path / "model", tmp_path / "texts.jsonl", tmp_path / "store", "--number", *options)
    done = call(*arguments, "--samples-per-shard", 4)
    assert done.exit_code == 0, done.output
    labels = sum(len(text["text"].split()) for text in texts)
    assert f"9 samples, {labels} labels" in done.output
    losses = ReferenceLosses.open(tmp_path / "store")
    assert losses.ids.tolist() == list(range(9))
    model = build("llama").eval()
    for number, text in enumerate(texts):
        ids = torch.tensor([[int(word[1:]) for word in text["text"].split()]])
        with torch.no_grad():
            expected = model(input_ids=ids, labels=ids).loss
        found = losses.losses[losses.starts[number] : losses.starts[number + 1]]
        torch.testing.assert_close(found[1:].mean(), expected, rtol=1e-5, atol=1e-5)


def test_truncated_tokens_in_a_saved_data_set(tmp_path: Path) -> None:
    save_text(tmp_path)
    rows = [{"sample_id": 5, "input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, 7]}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    done = call(tmp_path / "model", tmp_path / "rows", tmp_path / "store", "--max-length", 3)
    assert done.exit_code == 0, done.output
    losses = ReferenceLosses.open(tmp_path / "store")
    assert (losses.ids.tolist(), losses.labels) == ([5], 2)
    assert losses.about["settings"] == {"collator": None, "max_length": 3}


@pytest.mark.parametrize("function", ["with_pictures", "alone"])
def test_pictures(
    tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    model = build_vlm("llava")
    model.save_pretrained(tmp_path / "model")
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    batch = image_batch("llava", generator, (1, 1, 1))
    rows = [
        {"sample_id": number, "input_ids": ids, "labels": labels, "pixel_values": pixels}
        for number, (ids, labels, pixels) in enumerate(
            zip(
                batch.input_ids.tolist(),
                batch.labels.tolist(),
                batch.images["pixel_values"].tolist(),
                strict=True,
            )
        )
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "my_collator.py").write_text(COLLATOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_collator", raising=False)
    options = ["--processor", tmp_path / "tokenizer", "--collator", f"my_collator:{function}"]
    done = call(tmp_path / "model", "rows.parquet", "store", *options)
    assert done.exit_code == 0, done.output

    def collate(examples: list[Any]) -> dict[str, Any]:
        return {**batch.model_inputs(), "labels": batch.labels}

    expected = teacher_losses(
        model,
        [{"sample_id": n} for n in range(3)],
        tmp_path / "own",
        tokenizer=tokenizer,
        collator=collate,
        progress=False,
    )
    found = ReferenceLosses.open(tmp_path / "store")
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.hashes, expected.hashes)


def test_ids_of_ones_own(tmp_path: Path) -> None:
    """Token 9 stands for pictures, and the teacher reads token 7 there."""
    save_text(tmp_path)
    rows = [{"sample_id": 5, "input_ids": [4, 9, 9, 6, 8], "labels": [-100, -100, -100, 6, 8]}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    options = ["--visual-id", 9, "--placeholder-id", 7, "--special-id", 2, "--special-id", 8]
    done = call(tmp_path / "model", tmp_path / "rows", tmp_path / "store", *options)
    assert done.exit_code == 0, done.output
    losses = ReferenceLosses.open(tmp_path / "store")
    assert (losses.about["visual_ids"], losses.about["special_ids"]) == ([9], [2, 8])
    with torch.no_grad():
        logits = build("llama").eval()(input_ids=torch.tensor([[4, 7, 7, 6, 8]])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[2:4], torch.tensor([6, 8]), reduction="none")
    torch.testing.assert_close(losses.losses, expected, rtol=1e-5, atol=1e-5)


def test_what_is_refused(tmp_path: Path) -> None:
    save_text(tmp_path)
    model, data, store = tmp_path / "model", tmp_path / "texts.jsonl", tmp_path / "store"
    (tmp_path / "texts.txt").write_text("w4")
    (tmp_path / "pictures.jsonl").write_text('{"sample_id": 1, "picture": 3}\n')
    for arguments, problem in {
        (model, data): "InvalidInput sample_id: is no column of",
        (model, tmp_path / "texts.txt"): "data: .* is none of",
        (
            model,
            data,
            "--number",
            "--collator",
            "nowhere:to_be_found",
        ): "collator: 'nowhere:to_be_found' cannot",
        (model, data, "--number", "--collator", "a:b", "--max-length", 3): "max_length: is not passed on",
        (model, data, "--number", "--processor", tmp_path): "processor: cannot be loaded",
        (model, tmp_path / "pictures.jsonl"): r"collator: is needed for examples of \['picture'\]",
    }.items():
        done = call(*arguments[:2], store, *arguments[2:])
        assert done.exit_code == 1
        assert not done.exception or isinstance(done.exception, SystemExit)
        # Long lines are broken between words, and long paths within them.
        assert any(re.search(problem, done.output.replace("\n", gap)) for gap in ("", " ")), done.output


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs gloo")
def test_two_processes(tmp_path: Path) -> None:
    save_text(tmp_path, count=40)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    arguments = [tmp_path / "model", tmp_path / "texts.jsonl", tmp_path / "store", "--number"]
    shards = ["--samples-per-shard", "2", "--batch-size", "1"]
    done = subprocess.run(
        [*command, "-m", "regate_fx.cli", "teacher", *arguments, *shards], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 samples, ") == 1
    alone = call(tmp_path / "model", tmp_path / "texts.jsonl", tmp_path / "alone", "--number", *shards)
    assert alone.exit_code == 0, alone.output
    found, expected = (ReferenceLosses.open(tmp_path / name) for name in ("store", "alone"))
    assert torch.equal(found.losses, expected.losses)
    assert found.fingerprint == expected.fingerprint
