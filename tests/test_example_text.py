"""The example as a user starts it, small and without a compiler backend."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import tiers

ROOT = Path(__file__).parent.parent
CHUNKS, LENGTH, PASSES = 8, 256, 3


def _run(rule: str) -> str:
    options = ["--backend", "eager", "--layers", "1", "--chunks", str(CHUNKS), "--passes", str(PASSES)]
    command = [sys.executable, str(ROOT / "examples" / "train_text.py"), *options, "--rule", rule]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _row(output: str, what: str) -> tuple[float, float]:
    line = next(line for line in output.splitlines() if what in line)
    dense, gated, _ = (float(cell.replace(",", "")) for cell in re.findall(r"[\d,]+(?:\.\d+)?", line))
    return dense, gated


@pytest.mark.parametrize("rule", tiers(["hardest", "random"], "random"))
def test_both_runs_start_alike_learn_and_differ_in_what_they_compute(rule: str) -> None:
    output = _run(rule)
    before, after = _row(output, "held-out loss before"), _row(output, "held-out loss after")
    assert before[0] == before[1]
    assert after[0] < before[0]
    assert after[1] < before[1]
    every = CHUNKS * LENGTH
    assert _row(output, "decoder tokens") == (PASSES * every, every + (PASSES - 1) * every // 2)
    labels = CHUNKS * (LENGTH - 1)
    assert _row(output, "label tokens") == (PASSES * labels, labels + (PASSES - 1) * every // 2)
