"""What choosing costs of a step of the main job: counting, look-up, selection and observation on the CPU.

    python tests/benchmarks/bench_runtime_share.py

The model, the scenes and the batches are those of `examples/digits_vlm.py`. Every step is a sparse one: forward,
backward and optimizer, with the gate inside the forward, its parts timed where they run. Results go to `results/`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import machine
from report import markdown_table, origin
from rich.console import Console
from rich.progress import track
from torch import nn

import regate_fx
from regate_fx.runtime import DualCycle, ReGate, teacher_losses
from regate_fx.runtime import samples as samples_of_batch
from regate_fx.runtime.gate import Choice

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from digits_model import build
from digits_scenes import Digits, collate, make_examples, make_tokenizer
from digits_vlm import BATCH, Size

GOAL = 0.02
LOOK_UP = samples_of_batch._look_up
RESULTS = Path(__file__).parent / "results"
# The first two run in the collator, where a loader's worker processes can do it; the rest runs within the step.
PARTS = {
    "count": "counting tokens, in the collator",
    "look up": "looking up the teacher's losses, in the collator",
    "choose": "difficulty look-up, scores and selection",
    "observe": "difficulty update",
    "follow": "noticing optimizer steps",
}
# What the goal is about; counting is not part of it.
SELECTING = ("look up", "choose", "observe", "follow")


class TimedGate(ReGate):
    """A gate that notes the seconds of its parts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part].append(time.perf_counter() - begin)

    def look_up(self, *args: Any) -> Any:
        with self.timed("look up"):
            return LOOK_UP(*args)

    def choose(self, batch: Mapping[str, Any]) -> Choice:
        with self.timed("choose"):
            return super().choose(batch)

    def take_in(self, choice: Choice, output: Any) -> None:
        with self.timed("observe"):
            super().take_in(choice, output)

    def follow(self, model: nn.Module) -> None:
        with self.timed("follow"):
            super().follow(model)


def measure(steps: int, folder: str, console: Console) -> dict[str, float]:
    """Median seconds of a step and of each part. folder: for the teacher's losses, which are read from there."""
    size, chance = Size(), random.Random(0)
    digits, tokenizer = Digits(), make_tokenizer()
    examples = make_examples(BATCH * 8, digits.training, digits, tokenizer, chance)
    model = build(tokenizer, size.width, size.layers).train()
    losses = teacher_losses(model, examples, folder, tokenizer=tokenizer, collator=collate, progress=False)
    gate = TimedGate(losses, schedule=DualCycle(keep=0.5, warmup=0, cycle=1, dense=0))
    gated = regate_fx.compile(model, gate=gate)
    optimizer = torch.optim.AdamW(gated.parameters(), lr=1e-4)
    batches = [examples[begin : begin + BATCH] for begin in range(0, len(examples), BATCH)]
    whole: list[float] = []
    for step in track(range(steps + 5), description="measuring", console=console):
        rows = batches[step % len(batches)]
        plain = {**collate(rows), "sample_id": torch.tensor([row["sample_id"] for row in rows])}
        if step == 5:
            gate.seconds.clear()
            whole.clear()
        with gate.timed("count"), mock.patch.object(samples_of_batch, "_look_up", gate.look_up):
            samples = samples_of_batch.describe(plain, gate.rules, losses)
        gate.seconds["count"][-1] -= gate.seconds["look up"][-1]
        begin = time.perf_counter()
        gated(**{**plain, "sample_id": samples}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole.append(time.perf_counter() - begin)
    medians = {part: statistics.median(gate.seconds[part]) for part in PARTS}
    return {"step": statistics.median(whole), **medians}


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(args.steps, folder, console)
    share = sum(seconds[part] for part in SELECTING) / seconds["step"]
    everything = sum(seconds[part] for part in PARTS) / seconds["step"]
    command = f"python tests/benchmarks/bench_runtime_share.py --steps {args.steps} --threads {args.threads}"
    rows = [("a step: forward, backward, optimizer", f"{1e3 * seconds['step']:.1f}", "1")]
    rows += [
        (what, f"{1e3 * seconds[part]:.2f}", f"{seconds[part] / seconds['step']:.2%}")
        for part, what in PARTS.items()
    ]
    lines = [
        "# The runtime's share of a step",
        "",
        origin(command, machine()),
        f"Medians of {args.steps} sparse steps of the main job, batches of {BATCH}.",
        "",
        *markdown_table(("part", "ms", "/ step"), rows),
        "",
        f"- look-up, selection and observation / step: {share:.2%} (goal: at most {GOAL:.0%})",
        f"- with counting, where no worker process does it: {everything:.2%}",
    ]
    console.print("\n".join(lines[5:]))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "runtime_share.md").write_text("\n".join(lines) + "\n")
    record = {
        "command": command,
        "machine": machine(),
        "seconds": seconds,
        "share": share,
        "with counting": everything,
        "goal": GOAL,
    }
    (RESULTS / "runtime_share.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
