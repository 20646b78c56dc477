"""Time one training step (forward, backward, optimizer) on a CUDA device: gated, hand-packed and dense.

    python tests/benchmarks/bench_cuda_step.py

A few layers of Llama in the widths of its 8B model, bfloat16, from random weights that all variants share. They take
turns in one process, so that each ratio is between medians of the same minutes. The hand-packed batch physically holds
only the active tokens at their original positions, with causal attention and no mask: the best a step could cost if
somebody had repacked the data. Losses must agree before anything is timed. Results go to `results/`.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hand_packed import causal_only_model, pack, random_mask
from machine import machine
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import regate_fx
from regate_fx.runtime import DualCycle, ReGate, label_table

WIDTHS = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
SHARES = (1.0, 0.75, 0.5, 0.25)
PARTS = ("forward", "backward", "optimizer")
GOALS = {
    ("gated 0.5", "hand-packed 0.5", "decoder_ms"): 1.03,
    ("gated 0.5 with a gate", "hand-packed 0.5", "step_ms"): 1.05,
    ("gated 1.0", "dense compiled", "step_ms"): 1.01,
    ("gated 0.5", "dense compiled", "peak_gb"): 0.55,
}
RESULTS = Path(__file__).parent / "results"

Forward = Callable[[], Any]


@dataclass(frozen=True)
class Measurement:
    """Medians of one variant. decoder_ms: forward and backward; host_ms: until the last kernel is queued."""

    variant: str
    B: int
    S: int
    positions: int
    first_s: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    decoder_ms: float
    step_ms: float
    low_ms: float
    high_ms: float
    host_ms: float
    peak_gb: float
    loss: float


class Device:
    """Clocks and memory of the device; on the CPU, where the program is tried out, those of the host."""

    def __init__(self, name: str) -> None:
        self.name = name

    def mark(self) -> Any:
        if self.name != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self.name == "cuda" else 1e3 * (end - begin)

    def wait(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def peak(self, found: list[float]) -> Iterator[None]:
        """Append the most GB that were allocated meanwhile."""
        if self.name == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield
        found.append(torch.cuda.max_memory_allocated() / 1e9 if self.name == "cuda" else 0.0)

    def describe(self) -> dict[str, str | int]:
        return {"gpu": torch.cuda.get_device_name(), **machine()} if self.name == "cuda" else machine()


def make_model(width: str, layers: int, longest: int, vocabulary: int, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        **WIDTHS[width],
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        max_position_embeddings=longest,
        use_cache=False,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def make_gate(ids: Tensor) -> tuple[ReGate, dict[str, Any]]:
    """A gate that keeps a random half of the labels in every step, and the batch as it collates it."""
    rows = [{"input_ids": row, "labels": row, "sample_id": n} for n, row in enumerate(ids.tolist())]

    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.tensor([row[key] for row in some]) for key in ("input_ids", "labels")}

    table = label_table(rows, collate, special_ids=())
    sparse = DualCycle(keep=0.5, warmup=0, cycle=1, dense=0)
    gate = ReGate(table, schedule=sparse, policy="random", collator=collate, special_ids=(), visual_ids=())
    batch = gate.collate(rows)
    return gate, {key: value.to(ids.device) for key, value in batch.items()}


def make_variants(
    model: LlamaForCausalLM, gated: Any, ids: Tensor, eager: bool
) -> dict[str, tuple[int, Forward]]:
    """For every variant, how many positions it computes and its forward. gated: `model` compiled, for all shapes."""
    B, S = ids.shape
    device = ids.device.type
    variants: dict[str, tuple[int, Forward]] = {}

    def add(name: str, positions: int, called: Any, **arguments: Any) -> None:
        variants[name] = positions, lambda: called(**arguments)

    if eager:
        add("dense eager", B * S, model, input_ids=ids, labels=ids)
    add("dense compiled", B * S, torch.compile(model, dynamic=False), input_ids=ids, labels=ids)
    masks = {share: random_mask([round(share * S)] * B, S, device) for share in SHARES}
    packed = pack(ids, masks[0.5])
    compiled = torch.compile(causal_only_model(model), dynamic=False)
    add("hand-packed 0.5", packed["input_ids"].numel(), compiled, **packed)
    for share, mask in masks.items():
        add(f"gated {share}", int(mask.sum()), gated, input_ids=ids, labels=ids, token_mask=mask)
    gated.gate, batch = make_gate(ids)
    add("gated 0.5 with a gate", int(gated.gate.select(batch).sum()), gated, **batch)
    return variants


def step(forward: Forward, optimizer: torch.optim.Optimizer, device: Device) -> tuple[list[Any], Tensor]:
    marks = [device.mark()]
    loss: Tensor = forward().loss
    marks.append(device.mark())
    loss.backward()
    marks.append(device.mark())
    optimizer.step()
    optimizer.zero_grad()
    marks.append(device.mark())
    return marks, loss.detach()


def measure(
    variants: dict[str, tuple[int, Forward]],
    shape: tuple[int, int],
    optimizer: torch.optim.Optimizer,
    device: Device,
    repetitions: int,
    console: Console,
) -> list[Measurement]:
    first_s: dict[str, float] = {}
    losses: dict[str, float] = {}
    for name, (_, forward) in variants.items():
        began = time.perf_counter()
        losses[name] = step(forward, optimizer, device)[1].item()
        device.wait()
        first_s[name] = time.perf_counter() - began
        console.print(f"{shape} {name}: first step {first_s[name]:.1f} s, loss {losses[name]:.5f}")
    check_losses(losses)
    ms: dict[str, list[list[float]]] = defaultdict(list)
    host_ms: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, list[float]] = defaultdict(list)
    for repetition in range(repetitions + 2):
        for name, (_, forward) in variants.items():
            device.wait()
            with device.peak(peaks[name]):
                began = time.perf_counter()
                marks, _ = step(forward, optimizer, device)
                queued = 1e3 * (time.perf_counter() - began)
                device.wait()
            if repetition >= 2:
                host_ms[name].append(queued)
                ms[name].append([device.ms(a, b) for a, b in pairwise(marks)])
    return [
        summary(
            name,
            shape,
            variants[name][0],
            first_s[name],
            ms[name],
            host_ms[name],
            max(peaks[name]),
            losses[name],
        )
        for name in variants
    ]


def summary(
    name: str,
    shape: tuple[int, int],
    positions: int,
    first_s: float,
    ms: list[list[float]],
    host_ms: list[float],
    peak: float,
    loss: float,
) -> Measurement:
    forward, backward, optimizer = (statistics.median(part) for part in zip(*ms, strict=True))
    whole = [sum(parts) for parts in ms]
    decoder = statistics.median(parts[0] + parts[1] for parts in ms)
    low, _, high = statistics.quantiles(whole, n=4)
    return Measurement(
        name, *shape, positions, first_s, forward, backward, optimizer, decoder, statistics.median(whole), low, high,
        statistics.median(host_ms), peak, loss,
    )  # fmt: skip


def check_losses(losses: dict[str, float]) -> None:
    """The ratios mean something only where both sides computed the same; bfloat16 agrees to three digits."""
    for one, other in (("gated 0.5", "hand-packed 0.5"), ("gated 1.0", "dense compiled")):
        if not abs(losses[one] - losses[other]) <= 5e-3 * losses[other]:
            raise SystemExit(f"{one} has loss {losses[one]}, {other} has {losses[other]}")


def ratios(found: list[Measurement]) -> list[dict[str, Any]]:
    by_name = {(m.variant, m.B, m.S): m for m in found}
    return [
        {
            "B": B, "S": S, "ratio": f"{one} / {other}, {figure}", "goal": goal,
            "measured": getattr(by_name[one, B, S], figure) / max(getattr(by_name[other, B, S], figure), 1e-9),
        }
        for B, S in dict.fromkeys((m.B, m.S) for m in found)
        for (one, other, figure), goal in GOALS.items()
    ]  # fmt: skip


HEADINGS = ("B x S", "variant", "positions", *(f"{part}, ms" for part in PARTS), "step, ms", "quartiles, ms", "/ dense",
            "host, ms", "peak, GB", "first step, s")  # fmt: skip


def cells(found: list[Measurement]) -> list[tuple[str, ...]]:
    dense = {(m.B, m.S): m.step_ms for m in found if m.variant == "dense compiled"}
    return [
        (
            f"{m.B} x {m.S}", m.variant, f"{m.positions}", f"{m.forward_ms:.1f}", f"{m.backward_ms:.1f}",
            f"{m.optimizer_ms:.1f}", f"{m.step_ms:.1f}", f"{m.low_ms:.1f} to {m.high_ms:.1f}",
            f"{m.step_ms / dense[m.B, m.S]:.3f}", f"{m.host_ms:.1f}", f"{m.peak_gb:.2f}", f"{m.first_s:.1f}",
        )
        for m in found
    ]  # fmt: skip


def write(found: list[Measurement], command: str, args: argparse.Namespace, device: Device) -> None:
    """`cuda_step.json` for programs and `cuda_step.md` for people."""
    args.results.mkdir(exist_ok=True, parents=True)
    record = {
        "command": command,
        "machine": device.describe(),
        "model": {**WIDTHS[args.width], "layers": args.layers, "V": args.vocabulary},
        "ratios": ratios(found),
        "measurements": [asdict(measurement) for measurement in found],
    }
    (args.results / "cuda_step.json").write_text(json.dumps(record, indent=2) + "\n")
    where = ", ".join(f"{key} {value}" for key, value in device.describe().items())
    table = [HEADINGS, ("---",) * len(HEADINGS), *cells(found)]
    lines = [
        "# One training step on a GPU",
        "",
        f"`{command}`: {where}.",
        "",
        f"Llama in {args.width} widths, {args.layers} layers, vocabulary {args.vocabulary}, bfloat16, AdamW. Medians "
        f"of {args.repetitions} interleaved repetitions.",
        "",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        *(
            f"- {r['B']} x {r['S']}: {r['ratio']}: {r['measured']:.3f} (goal: at most {r['goal']:.2f})"
            for r in record["ratios"]
        ),
    ]
    (args.results / "cuda_step.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", choices=WIDTHS, default="8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--shapes", nargs="+", default=["4x4096", "2x16384"], help="B x S")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    console, device = Console(), Device(args.device)
    torch.manual_seed(0)
    shapes = [(int(B), int(S)) for B, S in (shape.split("x") for shape in args.shapes)]
    model = make_model(args.width, args.layers, max(S for _, S in shapes), args.vocabulary, args.device)
    # The step does all its work and leaves the weights as they are, for losses to stay comparable.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    gated = regate_fx.compile(model)
    found: list[Measurement] = []
    command = (
        f"python tests/benchmarks/bench_cuda_step.py --width {args.width} --layers {args.layers} --vocabulary "
        f"{args.vocabulary} --shapes {' '.join(args.shapes)} --repetitions {args.repetitions}"
    )
    for shape in shapes:
        ids = torch.randint(args.vocabulary, shape, device=args.device)
        variants = make_variants(model, gated, ids, eager=shape == shapes[0])
        found += measure(variants, shape, optimizer, device, args.repetitions, console)
        write(found, command, args, device)
    table = Table(*HEADINGS, box=box.SIMPLE, padding=0)
    for row in cells(found):
        table.add_row(*row)
    console.print(table)
    for r in ratios(found):
        console.print(
            f"{r['B']} x {r['S']} {r['ratio']}: {r['measured']:.3f} (goal: at most {r['goal']:.2f})"
        )


if __name__ == "__main__":
    main()
