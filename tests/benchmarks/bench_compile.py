"""Time the compiler by depth: each pass on its own, and the first step beside that of plain `torch.compile`.

    python tests/benchmarks/bench_compile.py

*Passes*: a Llama of 70B shapes and L layers on the meta device, in bfloat16, by `regate_fx.explain`; no weights.
*First step*: a small Llama of L layers, forward and backward by Inductor into an empty cache, dense and gated. Every
measurement is a process of its own, one after the other; passes are measured several times, the depths in turn, and the
medians kept. Results go to `results/`.

Shapes: B samples, S positions, L layers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import machine
from report import markdown_table, origin
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import regate_fx
from regate_fx.passes.pipeline import NORMALISE

B, S = 2, 128
DEPTHS, STEP_DEPTHS = (5, 10, 20, 40, 80), (4, 8)
GOALS = {"passes for 80 layers, s": 1.5, "normalisation and passes / dense compile": 0.10}
RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


def passes(layers: int) -> Record:
    """Seconds of each pass, those that only normalise apart, and of the whole explanation."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers,
        num_attention_heads=64, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        input_ids = torch.zeros(B, S, dtype=torch.int64)
    started = time.perf_counter()
    report = regate_fx.explain(model, input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    if {layer.kind for layer in report.layers} != {"varlen"} or len(report.layers) != layers:
        raise SystemExit(f"not every layer is gated: {report}")
    seconds = time.perf_counter() - started
    normalising = {step.name for step in NORMALISE}
    return {
        "layers": layers,
        "normalisation": sum(s for name, s in report.seconds.items() if name in normalising),
        "passes": sum(s for name, s in report.seconds.items() if name not in normalising),
        "explain": seconds,
        "peak_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "by_pass": report.seconds,
    }


def first_step(layers: int, gated: bool) -> Record:
    """Seconds of the first forward and backward; of a gated one also those of normalisation and passes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    input_ids = torch.randint(2048, (B, S))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}
    if gated:
        # Validation would run the untouched model and the dense reference beside it: no part of compilation.
        model = regate_fx.compile(model, validate=False)
        inputs["token_mask"] = torch.rand(B, S) < 0.5
    else:
        model = torch.compile(model, dynamic=True)
    started = time.perf_counter()
    model(**inputs).loss.backward()
    seconds = time.perf_counter() - started
    return {"first_step": seconds, "own": sum(model.report.seconds.values()) if gated else 0.0}


def apart(*arguments: str) -> Record:
    """A measurement in a process of its own, with an empty compile cache."""
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty}
        command = [sys.executable, __file__, "--measure", *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def exponent(rows: Sequence[Record], name: str) -> float:
    """Of the growth with depth, between the two deepest models: 1 is linear."""
    a, b = rows[-2], rows[-1]
    return math.log(b[name] / a[name]) / math.log(b["layers"] / a["layers"])


def median(found: Sequence[Record]) -> Record:
    """Number by number."""
    return {
        name: median([one[name] for one in found])
        if isinstance(value, dict)
        else statistics.median([one[name] for one in found])
        for name, value in found[0].items()
    }


def measure(repetitions: int, console: Console) -> Record:
    found: dict[int, list[Record]] = {layers: [] for layers in DEPTHS}
    for _ in range(repetitions):
        for layers in DEPTHS:
            with console.status(f"passes, {layers} layers"):
                found[layers].append(apart("passes", str(layers)))
    by_depth = [median(found[layers]) for layers in DEPTHS]
    steps: list[Record] = []
    for layers in STEP_DEPTHS:
        with console.status(f"first steps, {layers} layers"):
            dense, gated = (apart(kind, str(layers)) for kind in ("dense", "gated"))
        steps.append(
            {
                "layers": layers,
                "dense": dense["first_step"],
                "gated": gated["first_step"],
                "own": gated["own"],
                "share": gated["own"] / dense["first_step"],
            }
        )
    goals = {
        "passes for 80 layers, s": by_depth[-1]["passes"],
        "normalisation and passes / dense compile": max(row["share"] for row in steps),
    }
    return {
        "machine": machine(),
        "repetitions": repetitions,
        "goals": {name: {"measured": value, "goal": GOALS[name]} for name, value in goals.items()},
        "exponents": {name: exponent(by_depth, name) for name in ("normalisation", "passes", "explain")},
        "passes": by_depth,
        "first_steps": steps,
    }


def tables(record: Record) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Titles and cells, headings first, that the screen and the Markdown file both show."""
    totals = [("layers", "explain, s", "peak, GB", "normalisation, s", "passes, s")]
    for row in record["passes"]:
        numbers = [row["explain"], row["peak_GB"], row["normalisation"], row["passes"]]
        totals.append((str(row["layers"]), *(f"{n:.2f}" for n in numbers)))
    single = [("seconds, by layers", *(str(row["layers"]) for row in record["passes"]))]
    for name, seconds in record["passes"][-1]["by_pass"].items():
        if seconds >= 0.01:
            single.append((name, *(f"{row['by_pass'][name]:.2f}" for row in record["passes"])))
    steps = [("layers", "dense, s", "gated, s", "normalisation and passes, s", "/ dense")]
    for row in record["first_steps"]:
        seconds = [f"{row[name]:.1f}" for name in ("dense", "gated", "own")]
        steps.append((str(row["layers"]), *seconds, f"{row['share']:.3f}"))
    return [("Passes", totals), ("Each pass", single), ("First step", steps)]


def summary(record: Record) -> list[str]:
    goals = [
        f"{name}: {found['measured']:.3f} (goal: below {found['goal']})"
        for name, found in record["goals"].items()
    ]
    return [*goals, *(f"{name} grow as L^{power:.2f}" for name, power in record["exponents"].items())]


def write(record: Record) -> None:
    """`results/compile.json` for programs and `results/compile.md` for people."""
    command = f"python tests/benchmarks/bench_compile.py --repetitions {record['repetitions']}"
    (RESULTS / "compile.json").write_text(json.dumps({"command": command, **record}, indent=2) + "\n")
    lines = ["# Compile time by depth", "", origin(command, record["machine"]), ""]
    for title, (headings, *cells) in tables(record):
        lines += [f"## {title}", "", *markdown_table(headings, cells), ""]
    (RESULTS / "compile.md").write_text(
        "\n".join([*lines, *(f"- {line}" for line in summary(record))]) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3, help="of the passes")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, layers = arguments.measure
        found = passes(int(layers)) if kind == "passes" else first_step(int(layers), kind == "gated")
        print(json.dumps(found))
        return
    console = Console()
    record = measure(arguments.repetitions, console)
    for title, (headings, *cells) in tables(record):
        table = Table(*headings, title=title, box=box.SIMPLE, padding=0)
        for row in cells:
            table.add_row(*row)
        console.print(table)
    for line in summary(record):
        console.print(line)
    write(record)


if __name__ == "__main__":
    main()
