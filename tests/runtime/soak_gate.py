"""Select and observe for a long time, and watch the memory.

    python tests/runtime/soak_gate.py --steps 20000

Batches of a data set larger than they are, in an order of chance, with losses made up; half of the steps are sparse.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from regate_fx.runtime import DualCycle, ReferenceLosses, ReGate
from regate_fx.runtime.rules import NO_LABEL, documents
from regate_fx.runtime.samples import label_hash
from regate_fx.runtime.store import SampleLosses


def anonymous_memory() -> float:
    """Megabytes of memory that this process has of its own."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def make(samples: int, length: int) -> tuple[ReGate, torch.Tensor]:
    """A gate, and the labels [samples, length] of its data set."""
    chance = torch.Generator().manual_seed(3)
    labels = torch.randint(3, 100, (samples, length), generator=chance)
    labels[:, : length // 4] = NO_LABEL
    hashes = label_hash(documents(torch.arange(samples), (samples, length)), labels != NO_LABEL, labels)
    losses = torch.rand(samples, length - length // 4, generator=chance)
    rows = [SampleLosses(i, int(hashes[i]), losses[i].numpy()) for i in range(samples)]
    return ReGate(ReferenceLosses.of(rows), schedule=DualCycle(keep=0.5, warmup=0, cycle=2, dense=1)), labels


def soak(steps: int, samples: int = 2000, length: int = 64, batch: int = 8) -> list[float]:
    """Megabytes after each tenth of the steps."""
    gate, labels = make(samples, length)
    chance, memory = random.Random(0), []
    for number in range(steps):
        rows = torch.tensor(chance.sample(range(samples), batch))
        inputs = {"input_ids": labels[rows].clamp(min=0), "labels": labels[rows], "sample_id": rows}
        mask = gate.select(inputs)
        counted = gate.rules.predicted(mask) & (inputs["labels"] != NO_LABEL)
        token_loss = torch.where(counted, (labels[rows] % 17).float(), 0.0)
        gate.observe(inputs, SimpleNamespace(token_loss=token_loss, counted=counted))
        gate.step()
        if (number + 1) % max(1, steps // 10) == 0:
            gc.collect()
            memory.append(anonymous_memory())
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from machine import machine

    memory = soak(args.steps)
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    lines = [
        "# Selecting and observing for a long time",
        "",
        f"`python tests/runtime/soak_gate.py --steps {args.steps}`: {where}.",
        "",
        f"Memory of the process (RssAnon) after each tenth of {args.steps} steps, MB: "
        + ", ".join(f"{value:.1f}" for value in memory)
        + ".",
    ]
    print(lines[-1])
    (Path(__file__).parent / "results" / "soak_gate.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
