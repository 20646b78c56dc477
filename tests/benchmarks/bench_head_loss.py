"""Time and memory of a head and its losses with their gradients: by all logits, and by chunks of rows.

    python tests/benchmarks/bench_head_loss.py [--device cuda]

*all logits* is what a training step does, in eager mode and compiled by Inductor, and what `fused_loss=False` keeps;
*head_loss* is the operator of `fused_loss=True`; *linear_cross_entropy* is PyTorch's, chunked. Every row's loss has a
weight of its own. The variants take turns; times are medians, and memory is the most that a step held beyond its
operands, gradients included. Results go to `results/`.

Shapes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import machine
from report import markdown_table, origin
from torch import Tensor

from regate_fx.ops.head_loss import head_loss

RESULTS = Path(__file__).parent / "results"
SHAPES = {"cpu": (1_024, 256, (8_192, 32_768)), "cuda": (16_384, 4_096, (32_000, 128_256))}
IGNORED = -100

Losses = Callable[[Tensor, Tensor, Tensor], Tensor]
"""float32 [N] of rows [N, D], weights [V, D] and labels int64 [N]."""


def all_logits(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, weight).float(), labels, reduction="none")


def by_head_loss(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return head_loss(rows, weight, None, labels, IGNORED)[0]


def chunked(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(rows, weight, labels, reduction="none", options=options).float()


VARIANTS: dict[str, Losses] = {
    "all logits, eager": all_logits,
    "all logits, Inductor": torch.compile(all_logits),
    "`head_loss`": by_head_loss,
    "`linear_cross_entropy`, chunked": chunked,
}


def step(losses: Losses, inputs: tuple[Tensor, Tensor, Tensor], per_row: Tensor) -> tuple[Tensor, ...]:
    """The gradients of rows and weight."""
    return torch.autograd.grad((losses(*inputs) * per_row).sum(), inputs[:2])


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def megabytes(run: Callable[[], object], device: str) -> float:
    """The most that was held beyond what is held before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before_kb = _status("VmRSS")
    run()
    return (_status("VmHWM") - before_kb) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(
    N: int, D: int, V: int, device: str, dtype: torch.dtype, repetitions: int
) -> list[tuple[str, ...]]:
    generator = torch.Generator(device).manual_seed(0)
    rows, weight = (torch.randn(n, D, generator=generator, device=device) for n in (N, V))
    inputs = (
        rows.to(dtype).requires_grad_(),
        (weight * D**-0.5).to(dtype).requires_grad_(),
        torch.randint(V, (N,), generator=generator, device=device),
    )
    per_row = torch.rand(N, generator=generator, device=device)
    expected = step(all_logits, inputs, per_row)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    runs = {name: (lambda losses=losses: step(losses, inputs, per_row)) for name, losses in VARIANTS.items()}
    differences = {}
    for name, run in runs.items():  # compiles, too
        found = run()
        differences[name] = max(
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(found, expected, strict=True)
        )
        del found
    memory = {name: megabytes(run, device) for name, run in runs.items()}
    for _ in range(repetitions):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    measured: list[tuple[str, ...]] = []
    for name in VARIANTS:
        middle = statistics.median(times[name])
        ratio = middle / statistics.median(times["all logits, Inductor"])
        figures = f"{middle:.3f}", f"{ratio:.2f}", f"{memory[name]:,.0f}", f"{differences[name]:.0e}"
        measured.append((f"{N:,} x {D:,} x {V:,}", name, *figures))
        print(*measured[-1], sep=" | ", flush=True)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    N, D, vocabularies = SHAPES[args.device]
    where = machine()
    if args.device == "cuda":
        where["gpu"] = torch.cuda.get_device_name()
    lines = [
        "# A head, its losses and their gradients",
        "",
        origin(" ".join(["python tests/benchmarks/bench_head_loss.py", *sys.argv[1:]]), where),
        f"{str(dtype).removeprefix('torch.')}, medians of {args.repetitions} interleaved repetitions.",
        "",
    ]
    rows: list[tuple[str, ...]] = []
    for V in vocabularies:
        rows += measure(N, D, V, args.device, dtype, args.repetitions)
    headings = ("N x D x V", "losses by", "seconds", "/ Inductor", "MB", "gradients differ by")
    lines += markdown_table(headings, rows)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"head_loss_{args.device}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
