"""How a step grows with length, samples, layers and active tokens, gated and dense, each with its exponent.

    python tests/benchmarks/bench_growth.py [--device cuda]

One of them is varied while the others stay; both models, the dense one causal without a mask, are compiled once for all
shapes of the same depth, and all points of a curve take turns. The exponent is the slope of a straight line through the
logarithms. Results go to `results/growth_<device>.json`, `.md` and `.png`.

Shapes: B samples, S positions, L layers, N active positions.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import torch
from clock import Device, Row, Timing, take_turns
from hand_packed import causal_only_model
from report import markdown_table, origin
from rich.console import Console
from step_models import Shape, keep, make_batch, make_model

import regate_fx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
BASE = {
    "cpu": Shape("llama", "small", 4, 2048, 4, 256),
    "cuda": Shape("llama", "1b", 4, 32_000, 4, 4096),
}
FACTORS = (0.25, 0.5, 1, 2, 4)
SHARES = (0.125, 0.25, 0.5, 1.0)
FIGURES = {
    "step_ms": "ms per step",
    "saved_mb": "MB saved for the backward",
    "first_s": "s of the first step",
}


@dataclass(frozen=True)
class Curve:
    """One row's timings over the values of `axis`."""

    axis: str
    row: str
    values: list[float]
    timings: list[Timing]

    def points(self, figure: str) -> list[float]:
        return [getattr(timing, figure) for timing in self.timings]

    def exponent(self, figure: str) -> float:
        xs = [math.log(value) for value in self.values]
        ys = [math.log(max(point, 1e-9)) for point in self.points(figure)]
        return statistics.linear_regression(xs, ys).slope


@dataclass(frozen=True)
class Point:
    shape: Shape
    share: float
    value: float


def points(axis: str, base: Shape) -> list[Point]:
    """The shapes of a curve; N is varied by the share of labels that is kept."""
    if axis == "N":
        return [Point(base, share, share * base.B * base.S) for share in SHARES]
    field = {"S": "S", "B": "B", "L": "layers"}[axis]
    values = sorted({max(round(factor * getattr(base, field)), 2) for factor in FACTORS})
    return [Point(replace(base, **{field: value}), 0.5, value) for value in values]


def curves(axis: str, base: Shape, device: Device, repetitions: int, console: Console) -> list[Curve]:
    found: dict[tuple[str, float], Timing] = {}
    todo = points(axis, base)
    # Depths are models of their own, one at a time; else one model serves all points, which then take turns.
    for group in [[point] for point in todo] if axis == "L" else [todo]:
        torch._dynamo.reset()
        longest = replace(group[0].shape, S=max(point.shape.S for point in group))
        model = make_model(longest, device.name, device.dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        gated = regate_fx.compile(model, fused_loss=False)
        dense = torch.compile(causal_only_model(model), dynamic=True)
        rows: dict[str, Row] = {}
        for point in group:
            batch = make_batch(point.shape, device.name, device.dtype)
            masked = {**batch, "token_mask": keep(batch, point.share)}
            rows[f"gated {point.value:g}"] = Row(lambda x=masked, f=gated: f(**x), model, optimizer)
            rows[f"dense {point.value:g}"] = Row(lambda x=batch, f=dense: f(**x), model, optimizer)
        with tempfile.TemporaryDirectory() as empty:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
            timings = take_turns(rows, device, repetitions, console)
        for name, timing in timings.items():
            row, _, value = name.partition(" ")
            found[row, float(value)] = timing
        del model, optimizer, gated, dense, rows
        gc.collect()
    values = [point.value for point in todo]
    return [Curve(axis, row, values, [found[row, value] for value in values]) for row in ("gated", "dense")]


def draw(curves: list[Curve], path: Path) -> None:
    axes_names = list(dict.fromkeys(curve.axis for curve in curves))
    figure, panels = plt.subplots(
        2, len(axes_names), figsize=(3.2 * len(axes_names), 5.4), squeeze=False, layout="constrained"
    )
    for curve in curves:
        for row, what in enumerate(("step_ms", "saved_mb")):
            axes = panels[row, axes_names.index(curve.axis)]
            label = f"{curve.row}, exponent {curve.exponent(what):.2f}"
            axes.loglog(curve.values, curve.points(what), marker="o", markersize=4, label=label)
            axes.set_xlabel(curve.axis)
            axes.set_xticks(curve.values, [f"{value:g}" for value in curve.values])
            axes.set_xticks([], minor=True)
            axes.legend(frameon=False, fontsize=7)
            axes.spines[["top", "right"]].set_visible(False)
            if curve.axis == axes_names[0]:
                axes.set_ylabel(FIGURES[what])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(found: list[Curve], base: Shape, command: str, device: Device, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"growth_{device.name}"
    record = {"command": command, "machine": device.describe(), "curves": [asdict(curve) for curve in found]}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    headings = ("grows with", "row", *(f"{what}, exponent" for what in FIGURES.values()))
    # The first step compiles for all points but where each is a model of its own.
    rows = [
        (
            f"{curve.axis} = {', '.join(f'{value:g}' for value in curve.values)}",
            curve.row,
            *(
                f"{curve.exponent(figure):.2f}" if figure != "first_s" or curve.axis == "L" else ""
                for figure in FIGURES
            ),
        )
        for curve in found
    ]
    lines = [
        "# Growth",
        "",
        origin(command, device.describe()),
        f"Around {base}, half of the labels kept where N is not varied.",
        "",
        f"![Growth](growth_{device.name}.png)",
        "",
        *markdown_table(headings, rows),
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    draw(found, stem.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=8)
    parser.add_argument("--axes", nargs="+", choices=("S", "B", "L", "N"), default=["S", "B", "L", "N"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    device, console = Device(args.device), Console()
    found: list[Curve] = []
    command = " ".join(["python tests/benchmarks/bench_growth.py", *sys.argv[1:]])
    for axis in args.axes:
        found += curves(axis, BASE[args.device], device, args.repetitions, console)
        write(found, BASE[args.device], command, device, args.results)
    for curve in found:
        console.print(
            f"{curve.axis} {curve.row}: ms per step grow with exponent {curve.exponent('step_ms'):.2f}"
        )


if __name__ == "__main__":
    main()
