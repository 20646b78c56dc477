"""The examples train, learn, and compute fewer tokens than there are in the sparse steps of their schedule."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
from computed import Computed

QUIET = {"report_to": "none", "disable_tqdm": True}
WARMUP, CYCLE, DENSE = 4, 8, 2


def arguments(folder: Path, **changed: Any) -> argparse.Namespace:
    defaults = {
        "backend": "eager",
        "samples": 64,
        "epochs": 2,
        "gradient_checkpointing": False,
        "cpu": True,
        "padding_free": False,
    }
    return argparse.Namespace(folder=str(folder), **{**defaults, **changed})


def is_sparse(step: int) -> bool:
    return step >= WARMUP and (step - WARMUP) % CYCLE >= DENSE


def check(computed: Computed, accumulated: int = 1) -> None:
    """Of the 16 optimizer steps of two epochs."""
    assert len(computed.calls) == 16 * accumulated
    assert computed.sparse == [is_sparse(index // accumulated) for index in range(len(computed.calls))]


def check_logs(history: list[dict[str, Any]], computed: Computed) -> None:
    logs = [entry for entry in history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    per_log = len(computed.calls) // len(logs)
    for index, entry in enumerate(logs):
        calls = computed.calls[index * per_log : (index + 1) * per_log]
        assert entry["regate/active_tokens"] == sum(call.computed for call in calls)
        sparse = sum(call.computed < call.tokens for call in calls) / per_log
        assert entry["regate/keep_ratio"] == 1 - sparse / 2
        assert 0 <= entry["regate/flops_saved"] < 1


@pytest.mark.parametrize(
    ("name", "accumulated", "options"),
    [
        ("hf_trainer", 2, {}),
        ("trl_sft", 1, {"gradient_checkpointing": True, "padding_free": True}),
        ("trl_vision", 1, {}),
        ("peft_lora", 1, {"gradient_checkpointing": True}),
        ("frozen_backbone", 1, {}),
    ],
)
def test_trainers(
    name: str, accumulated: int, options: dict[str, bool], computed: Computed, tmp_path: Path
) -> None:
    example = importlib.import_module(name)
    trainer = example.main(arguments(tmp_path, **options), **QUIET)
    check(computed, accumulated)
    check_logs(trainer.state.log_history, computed)
    assert computed.recomputes == options.get("gradient_checkpointing", False)


def test_accelerate_loop(computed: Computed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = importlib.import_module("accelerate_loop")
    example.main(arguments(tmp_path, gradient_checkpointing=True))
    check(computed, accumulated=2)
    assert computed.recomputes
    assert "after 16 steps" in capsys.readouterr().out
