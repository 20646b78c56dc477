"""Time one training step (forward and backward) on the CPU: gated, hand-packed and dense.

    python tests/benchmarks/bench_cpu_step.py

All variants are the same 4-layer Llama with the same weights, compiled by Inductor into an empty cache.
They take turns in one process, so that each ratio is between medians of the same minutes. The hand-packed
batch physically holds only the active tokens, at their original positions: the best a step could cost if
somebody had repacked the data. Before anything is timed, the gated loss must equal the hand-packed one.
Results go to `results/`.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hand_packed import causal_only_model, pack, random_mask
from machine import machine
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import regate_fx

B, S, VOCABULARY = 4, 256, 2048
GOALS = {("gated, half", "hand-packed, half"): 1.05, ("gated, half", "dense"): 0.60}
HEADINGS = ("variant", "positions", "ms", "quartiles, ms", "/ dense", "compile, s")
RESULTS = Path(__file__).parent / "results"

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant's steps."""

    name: str
    positions: int
    compile_s: float
    median_s: float
    low_s: float
    high_s: float


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=S,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_steps() -> dict[str, tuple[int, Step]]:
    """For every variant, how many positions it computes and its step, which returns the loss."""
    model = make_model()
    ids = torch.randint(VOCABULARY, (B, S))
    half = random_mask([S // 2] * B, S)
    ragged = random_mask([S // 4, 3 * S // 8, 5 * S // 8, 3 * S // 4], S)
    everything = torch.ones(B, S, dtype=torch.bool)
    gated = regate_fx.compile(copy.deepcopy(model), backend="inductor")
    packed_model = causal_only_model(model)
    steps: dict[str, tuple[int, Step]] = {}

    def add(name: str, positions: int, model: nn.Module, compiled: Any, arguments: dict[str, Tensor]) -> None:
        def step() -> Tensor:
            model.zero_grad()
            loss = compiled(**arguments).loss
            loss.backward()
            return loss.detach()

        steps[name] = (positions, step)

    add("dense", B * S, model, torch.compile(model, dynamic=False), {"input_ids": ids, "labels": ids})
    for name, mask in (("half", half), ("ragged", ragged)):
        arguments = pack(ids, mask)
        compiled = torch.compile(packed_model, dynamic=False)
        add(f"hand-packed, {name}", arguments["input_ids"].numel(), packed_model, compiled, arguments)
    for name, mask in (("half", half), ("ragged", ragged), ("all", everything)):
        arguments = {"input_ids": ids, "labels": ids, "token_mask": mask}
        add(f"gated, {name}", int(mask.sum()), gated, gated, arguments)
    return steps


def check_losses(losses: dict[str, float]) -> None:
    """The ratios mean something only where both sides computed the same loss."""
    for gated, other in (
        ("gated, half", "hand-packed, half"),
        ("gated, ragged", "hand-packed, ragged"),
        ("gated, all", "dense"),
    ):
        if abs(losses[gated] - losses[other]) > 1e-5 * losses[other]:
            raise SystemExit(f"{gated} has loss {losses[gated]}, {other} has {losses[other]}")


def measure(repetitions: int, console: Console) -> list[Timing]:
    steps = make_steps()
    compile_s: dict[str, float] = {}
    losses: dict[str, float] = {}
    for name, (_, step) in steps.items():
        # Variants of one model share its graph: the first of them compiles it for all.
        with console.status(f"compiling {name}"):
            start = time.perf_counter()
            losses[name] = step().item()
            compile_s[name] = time.perf_counter() - start
    check_losses(losses)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in track(range(repetitions + 3), description="measuring", console=console):
        for name, (_, step) in steps.items():
            start = time.perf_counter()
            step()
            if repetition >= 3:
                seconds[name].append(time.perf_counter() - start)
    return [
        Timing(name, positions, compile_s[name], statistics.median(seconds[name]), *quartiles(seconds[name]))
        for name, (positions, _) in steps.items()
    ]


def quartiles(values: list[float]) -> tuple[float, float]:
    first, _, third = statistics.quantiles(values, n=4)
    return first, third


def rows(timings: list[Timing]) -> list[tuple[str, ...]]:
    """The cells that the screen and the Markdown file both show."""
    dense = next(timing.median_s for timing in timings if timing.name == "dense")
    return [
        (
            timing.name,
            str(timing.positions),
            f"{1e3 * timing.median_s:.1f}",
            f"{1e3 * timing.low_s:.1f} to {1e3 * timing.high_s:.1f}",
            f"{timing.median_s / dense:.3f}",
            f"{timing.compile_s:.1f}",
        )
        for timing in timings
    ]


def ratios(timings: list[Timing]) -> dict[str, dict[str, float]]:
    median_s = {timing.name: timing.median_s for timing in timings}
    return {
        f"{a} / {b}": {"measured": median_s[a] / median_s[b], "goal": goal} for (a, b), goal in GOALS.items()
    }


def write(timings: list[Timing], command: str, repetitions: int) -> None:
    """`results/cpu_step.json` for programs and `results/cpu_step.md` for people."""
    RESULTS.mkdir(exist_ok=True)
    record = {
        "command": command,
        "machine": machine(),
        "shape": {"B": B, "S": S, "V": VOCABULARY, "layers": 4, "D": 256},
        "repetitions": repetitions,
        "ratios": ratios(timings),
        "timings": [asdict(timing) for timing in timings],
    }
    (RESULTS / "cpu_step.json").write_text(json.dumps(record, indent=2) + "\n")
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    cells = [HEADINGS, ("---",) * len(HEADINGS), *rows(timings)]
    lines = [
        "# One training step on the CPU",
        "",
        f"`{command}`: {where}. Medians of {repetitions} interleaved repetitions, forward and backward.",
        "",
        *("| " + " | ".join(row) + " |" for row in cells),
        "",
        *(
            f"- {name}: {r['measured']:.3f} (goal: at most {r['goal']:.2f})"
            for name, r in ratios(timings).items()
        ),
    ]
    (RESULTS / "cpu_step.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        timings = measure(args.repetitions, console)
    table = Table(*HEADINGS, title="One training step on the CPU", box=box.SIMPLE, padding=0)
    for row in rows(timings):
        table.add_row(*row)
    console.print(table)
    for name, ratio in ratios(timings).items():
        console.print(f"{name}: {ratio['measured']:.3f} (goal: at most {ratio['goal']:.2f})")
    options = f"--repetitions {args.repetitions} --threads {args.threads} --seed {args.seed}"
    write(timings, f"python tests/benchmarks/bench_cpu_step.py {options}", args.repetitions)


if __name__ == "__main__":
    main()
