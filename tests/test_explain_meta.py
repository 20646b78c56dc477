"""`explain` without weights, and the `regate-fx explain` command.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_models import build
from transformers import AutoModelForCausalLM, MambaConfig
from typer.testing import CliRunner

import regate_fx
from regate_fx.cli import app

B, S = 3, 16


def test_without_weights_layers_and_costs_are_those_of_the_model() -> None:
    ids = torch.zeros(B, S, dtype=torch.int64)
    config = build("llama").config
    real = regate_fx.explain(AutoModelForCausalLM.from_config(config).bfloat16(), input_ids=ids, keep=0.5)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).bfloat16()
    told = regate_fx.explain(model, input_ids=ids.to("meta"), keep=0.5)
    assert told.layers == real.layers
    assert told.cost == real.cost
    assert told.batch == real.batch
    assert all(parameter.is_meta for parameter in model.parameters())


def test_values_that_are_not_there_are_not_read() -> None:
    config = build("llama").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        ids = torch.zeros(B, S, dtype=torch.int64)
        report = regate_fx.explain(model, input_ids=ids, attention_mask=ids, labels=ids)
    assert report.batch is not None
    assert report.batch.real == (S,) * B
    assert report.expected is not None
    assert report.expected.origin == "assumed, since no labels were given"


@pytest.fixture
def llama(tmp_path: Path) -> str:
    build("llama").config.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def test_the_command_prints_the_table(llama: str) -> None:
    result = CliRunner().invoke(
        app, ["explain", llama, "--seq", "64", "--keep", "0.5", "--output-share", "0.3"]
    )
    assert result.exit_code == 0
    assert "varlen" in result.stdout
    assert "Expected active share: 85.0%" in result.stdout


def test_the_command_prints_json(llama: str) -> None:
    result = CliRunner().invoke(app, ["explain", llama, "--seq", "64", "--batch", "4", "--json"])
    told = json.loads(result.stdout)
    assert told["model"] == llama
    assert told["gated_layers"] == len(told["layers"]) > 0
    assert {layer["kind"] for layer in told["layers"]} == {"varlen"}
    assert told["batch"] == {"length": 64, "real": [64] * 4, "active": [32] * 4}
    assert told["flops"]["gated"] < told["flops"]["dense"]


def test_a_model_that_cannot_be_gated_is_an_exit_code(tmp_path: Path) -> None:
    MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["explain", str(tmp_path), "--seq", "16"])
    assert result.exit_code == 1
    assert "Nothing in this model can be gated." in result.stdout
    assert "conv1d" in result.stdout


def test_a_configuration_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    result = CliRunner().invoke(app, ["explain", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "InvalidInput model:" in result.stderr
    assert "Give a hub name, a model's folder or its config.json." in " ".join(result.stderr.split())


@pytest.mark.parametrize("option", ["--seq", "--batch"])
def test_a_batch_needs_two_of_each(llama: str, option: str) -> None:
    result = CliRunner().invoke(app, ["explain", llama, option, "1"])
    assert result.exit_code == 2
    assert option in result.stderr
