"""Time one training step (forward, backward, optimizer): gated, dense, hand-packed, and by other ways to save.

    python tests/benchmarks/bench_step.py                  # small models, on the CPU
    python tests/benchmarks/bench_step.py --device cuda    # layers in the widths of models of 1B to 8B, bfloat16

All rows of a table are the same model with the same weights, and take turns in one run, so that each ratio is between
medians of the same minutes. transformers gives a compiled dense model a mask over all pairs; *causal without a mask* is
what it would cost without, and what ratios are over. *hand-packed* is the limit: the same on a batch that physically
holds only the active tokens, at their original positions. *padding-free* is transformers' own form of a batch without
padding, under SDPA. *dense-masked* computes every position and hides the elided ones. *random-LTD* gathers and scatters
in each layer but the first and last. Losses and gradients that must agree are compared before anything is timed.
Results go to `results/step_<device>.json`, `.md` and `.png`.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from clock import Device, take_turns
from rich.console import Console
from step_models import Shape
from step_results import Measured, Table, write
from step_rows import EQUAL, SHARES, Rows, Tuning

RESULTS = Path(__file__).parent / "results"
CPU_SHAPES = (
    Shape("llama", "small", 4, 2048, 4, 256),
    Shape("llama", "medium", 4, 2048, 4, 512),
    Shape("llama", "small", 4, 2048, 8, 256, padded=True),
    Shape("internvl", "small", 4, 2048, 4, 256),
)
CUDA_SHAPES = (
    Shape("llama", "8b", 4, 32_000, 4, 4096),
    Shape("llama", "8b", 4, 32_000, 1, 16_384),
    Shape("qwen2", "1b", 8, 32_000, 8, 2048),
    Shape("llama", "8b", 4, 32_000, 8, 2048, padded=True),
    Shape("internvl", "1b", 8, 32_000, 4, 4096),
)
TUNINGS = (Tuning(), Tuning(checkpointing=True), Tuning(lora=True), Tuning(lora=True, checkpointing=True))


def plan(shapes: tuple[Shape, ...]) -> Iterator[tuple[Shape, Tuning]]:
    """Every shape with all weights trained, the first in the other ways to train too."""
    for shape in shapes:
        for tuning in TUNINGS if shape == shapes[0] else TUNINGS[:1]:
            yield shape, tuning


def make_rows(shape: Shape, tuning: Tuning, device: Device) -> Rows:
    rows = Rows(shape, tuning, device.name, device.dtype)
    every = tuning == Tuning()
    text = shape.family != "internvl"
    if every and not shape.padded:
        rows.add_eager()
    rows.add_dense()
    if shape.padded:
        rows.add_one_row()
    elif every:
        rows.add_flash()
        rows.add_masked()
        if text:
            rows.add_random_ltd()
    shares = SHARES if every and text else (1.0, 0.5)
    if not shape.padded:
        rows.add_hand_packed(share for share in shares if share < 1)
    rows.add_gated(shares)
    if every and text and not shape.padded:
        rows.add_with_gate()
    return rows


@dataclass(frozen=True)
class Agreement:
    """Ratios mean something only where both sides computed the same: loss, and norm of the gradients."""

    tolerance: tuple[float, float]

    def __call__(
        self, name: str, found: tuple[float, float], known: Mapping[str, tuple[float, float]]
    ) -> None:
        for one, other in EQUAL:
            if name == one and other in known:
                for a, b, tolerance in zip(found, known[other], self.tolerance, strict=True):
                    if not abs(a - b) <= tolerance * b:
                        raise SystemExit(f"{one} has loss and gradients {found}, {other} {known[other]}")


def measure(shape: Shape, tuning: Tuning, device: Device, repetitions: int, console: Console) -> Table:
    torch.manual_seed(0)
    torch._dynamo.reset()
    console.print(f"{shape}; {tuning}")
    rows = make_rows(shape, tuning, device)
    agreement = Agreement((1e-5, 1e-4) if device.dtype == torch.float32 else (2e-3, 2e-2))
    timings = take_turns(rows.rows, device, repetitions, console, agreement)
    saved = {}
    for share in SHARES:
        if f"gated {share}" in rows.rows:
            rows.rows[f"gated {share}"].forward()
            saved[f"gated {share}"] = rows.gated.report.cost.saved
    measured = [
        Measured(name, rows.positions[name], timing, saved.get(name)) for name, timing in timings.items()
    ]
    share = {name: rows.positions[name] / rows.batch["input_ids"].numel() for name in saved}
    table = Table(shape, str(tuning), rows.gated.report.traces, share, measured)
    del rows
    gc.collect()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--only", type=int, nargs="*", help="numbers of tables, counted from 0; all by default"
    )
    parser.add_argument("--results", type=Path, help=f"folder to write to; by default {RESULTS.name}/ here")
    args = parser.parse_args()
    if args.only is not None and args.results is None:
        parser.error("--only needs --results: it would write over tables that it does not measure")
    args.results = args.results or RESULTS
    torch.set_num_threads(args.threads)
    device, console = Device(args.device), Console()
    command = " ".join(["python tests/benchmarks/bench_step.py", *sys.argv[1:]])
    tables: list[Table] = []
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        todo = list(plan(CPU_SHAPES if args.device == "cpu" else CUDA_SHAPES))
        for number in args.only if args.only is not None else range(len(todo)):
            tables.append(measure(*todo[number], device, args.repetitions, console))
            write(tables, command, device, args.repetitions, args.results)
    for table in tables:
        console.print(table.on_screen())


if __name__ == "__main__":
    main()
