"""Count what should not happen in a steady run: traces, and on CUDA waits for the device.

    python tests/benchmarks/bench_steady.py [--device cuda]

A small Llama with a gate trains for 1,000 steps after a warm-up, every batch with another number of samples, length,
padding and number of kept labels. On CUDA a step that waits for the device is an error. Results go to `results/`.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from clock import Device
from report import markdown_table, origin
from rich.console import Console
from rich.progress import track
from step_models import Shape, make_model
from torch._dynamo.utils import counters
from transformers import set_seed

import regate_fx
from regate_fx.runtime import DualCycle, ReGate, label_table

RESULTS = Path(__file__).parent / "results"
SAMPLES, LONGEST, MOST = 256, 192, 8


def make_examples() -> list[dict[str, Any]]:
    """Samples of 8 to `LONGEST` words, the first third of each without labels."""
    examples = []
    for n in range(SAMPLES):
        length = int(torch.randint(8, LONGEST + 1, ()))
        words = torch.randint(1, 2047, (length,)).tolist()
        examples.append(
            {"sample_id": n, "input_ids": words, "labels": [-100] * (length // 3) + words[length // 3 :]}
        )
    return examples


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([example[key] + [fill] * (longest - len(example[key])) for example in examples])

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids != 0).long()}


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    set_seed(0)
    device = Device(args.device)
    model = make_model(Shape("llama", "small", 2, 2048, MOST, LONGEST), args.device, device.dtype)
    examples = make_examples()
    table = label_table(examples, collate, special_ids=())
    schedule = DualCycle(keep=0.5, warmup=4, cycle=8, dense=2)
    gate = ReGate(table, schedule=schedule, policy="random", collator=collate, special_ids=(), visual_ids=())
    gated = regate_fx.compile(model, gate=gate)
    optimizer = torch.optim.AdamW(gated.parameters(), lr=1e-4)
    shapes = set()
    traces = graphs = 0
    began = 0.0
    for step in track(range(args.warm_up + args.steps), description="training", console=Console()):
        chosen = torch.randperm(SAMPLES)[: int(torch.randint(1, MOST + 1, ()))].tolist()
        batch = device.put(gate.collate([examples[n] for n in chosen]))
        if step == args.warm_up:
            traces, graphs = gated.report.traces, counters["stats"]["unique_graphs"]
            device.wait()
            began = time.perf_counter()
            if args.device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
        gated(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= args.warm_up:
            shapes.add(tuple(batch["input_ids"].shape))
    if args.device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    device.wait()
    seconds = time.perf_counter() - began
    new = {
        "traces": gated.report.traces - traces,
        "graphs": counters["stats"]["unique_graphs"] - graphs,
    }
    waits = "none that torch's sync debug mode sees" if args.device == "cuda" else "not to be seen on a CPU"
    where = device.describe()
    command = f"python tests/benchmarks/bench_steady.py --device {args.device} --steps {args.steps}"
    rows = [
        ("different B x S", f"{len(shapes)}"),
        ("traces in the warm-up", f"{traces}"),
        ("traces after it (goal: 0)", f"{new['traces']}"),
        ("graphs compiled by Dynamo after it (goal: 0)", f"{new['graphs']}"),
        ("waits for the device after it (goal: 0)", waits),
        ("ms per step", f"{1e3 * seconds / args.steps:.1f}"),
    ]
    lines = [
        "# A steady run",
        "",
        origin(command, where),
        "",
        *markdown_table((f"{args.steps} steps after {args.warm_up} to warm up", ""), rows),
    ]
    print("\n".join(lines[4:]))
    args.results.mkdir(parents=True, exist_ok=True)
    record = {"command": command, "machine": where, "steps": args.steps, "shapes": len(shapes), **new}
    (args.results / f"steady_{args.device}.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.results / f"steady_{args.device}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
