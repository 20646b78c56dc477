"""Time the first training step of a process: with an empty compile cache, and again with the one that it left.

    python tests/benchmarks/bench_start.py [--device cuda]

A small Llama by depth: dense by `torch.compile`, gated as one graph, and gated by layers (`scope="layers"`). Every
measurement is a process of its own, from the first call to the end of the backward. Results go to `results/`.

Shapes: B samples, S positions, L layers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from clock import Device
from report import markdown_table, origin
from rich.console import Console
from step_models import Shape, keep, make_batch, make_model
from torch._dynamo.utils import counters

import regate_fx

RESULTS = Path(__file__).parent / "results"
WAYS = ("dense", "gated", "gated, without validation", "gated, by layers")
HEADINGS = ("L", "row", "cold, s", "warm, s", "warm / cold", "warm / warm dense", "found in the cache")


def first_step(way: str, layers: int, device: str) -> dict[str, Any]:
    """Seconds of the first step of this process, and how many compiled graphs came from the cache."""
    torch.manual_seed(0)
    shape = Shape("llama", "small", layers, 2048, 2, 128)
    model = make_model(shape, device, Device(device).dtype)
    batch = make_batch(shape, device, Device(device).dtype)
    if way == "dense":
        called = torch.compile(model, dynamic=True)
    else:
        scope = "layers" if way.endswith("layers") else "model"
        called = regate_fx.compile(model, scope=scope, validate=not way.endswith("validation"))
        batch["token_mask"] = keep(batch, 0.5)
    began = time.perf_counter()
    called(**batch).loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    found = counters["inductor"]
    kinds = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
    return {"seconds": seconds, **{kind.rpartition("_")[2]: found[kind] for kind in kinds}}


def in_a_process(way: str, layers: int, device: str, cache: str) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, "--device", device, "--one", way, str(layers)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(depths: list[int], device: str, console: Console) -> list[tuple[str, ...]]:
    rows = []
    for layers in depths:
        warm_dense = float("nan")
        for way in WAYS:
            with tempfile.TemporaryDirectory() as cache:
                cold, warm = (in_a_process(way, layers, device, cache) for _ in range(2))
            if way == "dense":
                warm_dense = warm["seconds"]
            graphs = warm["hit"] + warm["miss"] + warm["bypass"]
            rows.append((
                str(layers), way, f"{cold['seconds']:.1f}", f"{warm['seconds']:.1f}",
                f"{warm['seconds'] / cold['seconds']:.2f}", f"{warm['seconds'] / warm_dense:.2f}",
                f"{warm['hit']} of {graphs}",
            ))  # fmt: skip
            console.print(*rows[-1], sep=" | ")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, metavar=("ROW", "L"), help="measure in this process, and print it")
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(first_step(args.one[0], int(args.one[1]), args.device)))
        return
    rows = measure(args.depths, args.device, Console())
    depths = " ".join(map(str, args.depths))
    command = f"python tests/benchmarks/bench_start.py --device {args.device} --depths {depths}"
    lines = [
        "# The first step of a process",
        "",
        origin(command, Device(args.device).describe()),
        "",
        *markdown_table(HEADINGS, rows),
    ]
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"start_{args.device}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
