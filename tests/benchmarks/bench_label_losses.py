"""Time and memory of the losses of labels, given the states before the vocabulary projection, on the CPU.

    python tests/benchmarks/bench_label_losses.py

The teacher pass makes plain logits for a few labels at a time: of all that keeps memory bounded it is the fastest here,
and the only one that runs the model's own code after the projection (caps, scales, biases). `linear_cross_entropy`
works out gradients where it is chunked, and makes all logits where it is not. Results go to `results/`.

Each variant runs in a forked process of its own, whose peak memory beyond the projection's weights is then its own.
Liger and cut-cross-entropy are kernels for CUDA and Triton; they were not measured.

Shapes: N labels, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import machine
from report import markdown_table, origin
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from regate_fx.runtime.label_losses import _LOGITS_AT_ONCE

VOCABULARIES = (2_048, 151_936)
RESULTS = Path(__file__).parent / "results"

Losses = Callable[[Tensor, Tensor, Tensor], Tensor]
"""float32 [N] of states [N, D], weights [V, D] and labels int64 [N]."""


def all_at_once(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(states, weight), labels, reduction="none")


def in_chunks(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As `LabelLosses` does."""
    size = max(1, _LOGITS_AT_ONCE // len(weight))
    chunks = zip(states.split(size), labels.split(size), strict=True)
    return torch.cat([all_at_once(some, weight, of_some) for some, of_some in chunks])


def reference_path(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(states, weight, labels, reduction="none")


def chunked_path(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(
        states, weight, labels, reduction="none", options=LinearCrossEntropyOptions()
    )


VARIANTS: dict[str, Losses] = {
    "logits of a few labels at a time (`LabelLosses`)": in_chunks,
    "logits of all labels at once": all_at_once,
    "`linear_cross_entropy`": reference_path,
    "`linear_cross_entropy`, chunked (`LinearCrossEntropyOptions()`)": chunked_path,
}


def peak_memory() -> int:
    """Kilobytes that this process has held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measured(
    losses: Losses, inputs: tuple[Tensor, Tensor, Tensor], expected: Tensor, repetitions: int
) -> dict[str, float]:
    """Seconds of CPU time and megabytes, as a forked process finds them, and the largest difference from `expected`."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with torch.no_grad():
            before, seconds = peak_memory(), []
            for _ in range(repetitions):
                begin = time.process_time()  # of one thread; others may use the machine
                found = losses(*inputs)
                seconds.append(time.process_time() - begin)
            memory = (peak_memory() - before) / 1024
            error = float((found - expected).abs().max())
        result = {"seconds": min(seconds), "megabytes": memory, "error": error}
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        result = json.loads(told.read())
    os.waitpid(child, 0)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--labels", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python tests/benchmarks/bench_label_losses.py --labels {args.labels} --hidden {args.hidden}"
    lines = [
        "# Losses of labels from the states before the vocabulary projection",
        "",
        origin(command, machine()),
        f"{args.labels} labels, hidden size {args.hidden}, float32, no gradients, best of {args.repetitions}; memory "
        "is the most that the process held beyond weights and states.",
        "",
    ]
    rows: list[tuple[str, ...]] = []
    for vocabulary in VOCABULARIES:
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(args.labels, args.hidden, generator=generator)
        weight = torch.randn(vocabulary, args.hidden, generator=generator) * args.hidden**-0.5
        labels = torch.randint(vocabulary, (args.labels,), generator=generator)
        expected = all_at_once(states, weight, labels)
        for name, losses in VARIANTS.items():
            cost = measured(losses, (states, weight, labels), expected, args.repetitions)
            figures = f"{cost['seconds']:.3f}", f"{cost['megabytes']:.0f}", f"{cost['error']:.0e}"
            rows.append((f"{vocabulary:,}", name, *figures))
            print(*rows[-1], sep=" | ", flush=True)
    headings = ("vocabulary", "losses by", "seconds of CPU time", "MB", "largest difference")
    lines += [
        *markdown_table(headings, rows),
        "",
        "Liger and cut-cross-entropy need CUDA and Triton and were not measured.",
    ]
    (RESULTS / "label_losses.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
