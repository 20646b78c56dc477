"""What a large store of reference losses costs: time and memory to open it, time to look up a batch.

    python tests/benchmarks/bench_store.py

The store is written by the teacher pass's own writer, and opened in a new process. Results go to `results/`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from machine import machine
from report import markdown_table, origin
from rich.progress import track

from regate_fx.runtime import ReferenceLosses, SampleLosses
from regate_fx.runtime.rules import TokenRules
from regate_fx.runtime.samples import _look_up, assign_roles, documents, label_hash
from regate_fx.runtime.store_writer import SAMPLES_PER_SHARD, Plan, StoreWriter

GOAL_SECONDS = 2.0
GOAL_SHARE = 0.01
STEP_SECONDS = 0.0635  # of the main job on this kind of machine, see runtime_share.md
RESULTS = Path(__file__).parent / "results"


def labels_of(ids: torch.Tensor, labels: int) -> torch.Tensor:
    """int64 [B, labels]: the label tokens that belong to sample ids."""
    return (ids[:, None] * 31 + torch.arange(labels) * 17) % 97


def samples(begin: int, count: int, labels: int) -> Iterator[SampleLosses]:
    ids = torch.arange(begin, begin + count)
    tokens = labels_of(ids, labels)
    hashes = label_hash(
        documents(ids, tuple(tokens.shape)), torch.ones_like(tokens, dtype=torch.bool), tokens
    )
    losses = np.random.default_rng(begin).exponential(size=(count, labels)).astype(np.float32)
    for number, hashed, row in zip(ids.tolist(), hashes.tolist(), losses, strict=True):
        yield SampleLosses(number, hashed, row)


def write(folder: Path, count: int, labels: int) -> None:
    writer = StoreWriter(folder, Plan({"teacher": "made up"}, count))
    windows = -(-count // SAMPLES_PER_SHARD)
    for window in track(range(windows), description="writing"):
        begin = window * SAMPLES_PER_SHARD
        writer.write(window, list(samples(begin, min(SAMPLES_PER_SHARD, count - begin), labels)))
    writer.publish(windows)


def anonymous_memory() -> int:
    """Kilobytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def read(folder: Path, labels: int, rows: int) -> dict[str, float]:
    before = anonymous_memory()
    begin = time.perf_counter()
    losses = ReferenceLosses.open(folder)
    opened = time.perf_counter() - begin
    after = anonymous_memory()
    rules, mask = TokenRules(), torch.ones(rows, labels, dtype=torch.bool)
    seconds = []
    for _ in range(1000):
        ids = torch.randint(len(losses), (rows,))
        docs, tokens = documents(ids, (rows, labels)), labels_of(ids, labels)
        roles = assign_roles(rules, docs, tokens, tokens, mask)
        begin = time.perf_counter()
        _look_up(docs, roles, tokens, losses)
        seconds.append(time.perf_counter() - begin)
    return {
        "samples": len(losses),
        "open_seconds": opened,
        "open_anonymous_kb": after - before,
        "used_anonymous_kb": anonymous_memory() - before,
        "first_look_up_seconds": seconds[0],
        "look_up_seconds": statistics.median(seconds[500:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--labels", type=int, default=40, help="of each sample")
    parser.add_argument("--rows", type=int, default=16, help="of a batch")
    parser.add_argument("--read", type=Path, help="only read this store, and print what it cost")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.read:
        print(json.dumps(read(args.read, args.labels, args.rows)))
        return
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), args.samples, args.labels)
        size = sum(path.stat().st_size for path in Path(name).glob("*.arrow"))
        options = ["--read", name, "--labels", str(args.labels), "--rows", str(args.rows)]
        printed = subprocess.run(
            [sys.executable, __file__, *options], check=True, capture_output=True, text=True
        ).stdout
    cost = json.loads(printed)
    command = f"python tests/benchmarks/bench_store.py --samples {args.samples} --labels {args.labels}"
    share = cost["look_up_seconds"] / STEP_SECONDS
    rows = [
        ("opening, index checked", f"{cost['open_seconds']:.2f} s (goal: under {GOAL_SECONDS:.0f} s)"),
        ("memory taken by opening (RssAnon)", f"{cost['open_anonymous_kb'] / 1024:.1f} MB"),
        (
            "memory after 1,000 batches, every shard checked and mapped",
            f"{cost['used_anonymous_kb'] / 1024:.1f} MB",
        ),
        (
            f"look-up of the first batch of {args.rows}, whose shards are checked",
            f"{cost['first_look_up_seconds']:.2f} s",
        ),
        (
            f"look-up of a batch of {args.rows}, median of the last 500",
            f"{1e3 * cost['look_up_seconds']:.3f} ms, {share:.2%} of a step of {1e3 * STEP_SECONDS:.1f} ms "
            f"(goal: under {GOAL_SHARE:.0%})",
        ),
    ]
    lines = [
        "# A large store of reference losses",
        "",
        origin(command, machine()),
        f"{args.samples:,} samples of {args.labels} labels, {size / 1e9:.1f} GB, just written (in the page cache).",
        "",
        *markdown_table(("", ""), rows),
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "store.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
