"""Tables, goals and pictures of `bench_step.py`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from clock import PARTS, Device, Timing
from report import markdown_table, origin
from rich import box
from rich.table import Table as ScreenTable
from step_models import Shape
from step_rows import CAUSAL, DENSE, WITH_GATE

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEADINGS = (
    "row", "positions", *(f"{part}, ms" for part in PARTS), "step, ms", "quartiles, ms", "/ dense", "realised",
    "host, ms", "peak, MB", "saved, MB", "first step, s",
)  # fmt: skip
ON_SCREEN = ("row", "positions", "step, ms", "/ dense", "peak, MB", "first step, s")


@dataclass(frozen=True)
class Measured:
    """One row. saved: estimated share of the dense model's FLOPs that is not computed, of gated rows."""

    name: str
    positions: int
    timing: Timing
    saved: float | None


@dataclass(frozen=True)
class Goal:
    """`figure` of one row over that of another is at most `bound`."""

    row: str
    other: str
    figure: str
    bound: float
    measured: float

    @property
    def is_met(self) -> bool:
        return self.measured <= self.bound

    def __str__(self) -> str:
        met = "met" if self.is_met else "not met"
        return (
            f"{self.row} / {self.other}, {self.figure}: {self.measured:.3f} (at most {self.bound:.2f}: {met})"
        )


@dataclass(frozen=True)
class Table:
    """All rows of one shape and way to train. traces: of the gated model. active: shares of positions, by row."""

    shape: Shape
    tuning: str
    traces: int
    active: dict[str, float]
    measured: list[Measured]

    @property
    def title(self) -> str:
        return f"{self.shape}; {self.tuning}"

    def timing(self, name: str) -> Timing | None:
        return next((row.timing for row in self.measured if row.name == name), None)

    @property
    def dense(self) -> Timing:
        """The best dense row, which ratios are over."""
        found = self.timing(CAUSAL) or self.timing(DENSE)
        assert found is not None
        return found

    def realised(self, row: Measured) -> float | None:
        """The time of forward and backward that is saved over the FLOPs saved, where all weights are trained."""
        if not row.saved or row.saved < 0.05 or self.tuning.startswith("LoRA"):
            return None
        return (1 - row.timing.passes_ms / self.dense.passes_ms) / row.saved

    def goals(self) -> list[Goal]:
        half = self.active.get("gated 0.5", 0.5)
        dense = DENSE if self.shape.padded else CAUSAL
        wanted = [
            ("gated 0.75", "hand-packed 0.75", "passes_ms", 1.03),
            ("gated 0.5", "hand-packed 0.5", "passes_ms", 1.03),
            ("gated 0.25", "hand-packed 0.25", "passes_ms", 1.03),
            (WITH_GATE, "hand-packed 0.5", "step_ms", 1.05),
            ("gated 1.0", DENSE, "step_ms", 1.0 if self.shape.padded else 1.01),
            ("gated 1.0", CAUSAL, "step_ms", 1.01),
            ("gated 0.5", dense, "saved_mb", half + 0.05),
            ("gated 0.5", dense, "added_mb", half + 0.05),
            ("gated 0.5", dense, "peak_mb", half + 0.05),
            ("gated 0.5", "hand-packed 0.5", "peak_mb", 1.0),
        ]
        found = []
        for row, other, figure, bound in wanted:
            one, two = self.timing(row), self.timing(other)
            if one is not None and two is not None:
                ratio = getattr(one, figure) / max(getattr(two, figure), 1e-9)
                found.append(Goal(row, other, figure, bound, ratio))
        return found

    def cells(self) -> list[tuple[str, ...]]:
        rows = []
        for row in self.measured:
            t, realised = row.timing, self.realised(row)
            rows.append((
                row.name, f"{row.positions}", f"{t.forward_ms:.1f}", f"{t.backward_ms:.1f}", f"{t.optimizer_ms:.1f}",
                f"{t.step_ms:.1f}", f"{t.low_ms:.1f} to {t.high_ms:.1f}",
                f"{t.step_ms / self.dense.step_ms:.3f}", f"{realised:.2f}" if realised else "",
                f"{t.host_ms:.1f}", f"{t.peak_mb:.0f}", f"{t.saved_mb:.0f}", f"{t.first_s:.1f}",
            ))  # fmt: skip
        return rows

    def on_screen(self) -> ScreenTable:
        table = ScreenTable(*ON_SCREEN, title=self.title, box=box.SIMPLE)
        for row in self.cells():
            table.add_row(*(row[HEADINGS.index(heading)] for heading in ON_SCREEN))
        return table

    def lines(self) -> list[str]:
        traces = "one trace" if self.traces == 1 else f"{self.traces} traces"
        return [
            f"## {self.title}",
            "",
            *markdown_table(HEADINGS, self.cells()),
            "",
            f"All gated rows: {traces}.",
            "",
            *(f"- {goal}" for goal in self.goals()),
            "",
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "shape": asdict(self.shape),
            "tuning": self.tuning,
            "traces": self.traces,
            "rows": [asdict(row) for row in self.measured],
            "goals": [asdict(goal) for goal in self.goals()],
        }


def write(tables: list[Table], command: str, device: Device, repetitions: int, folder: Path) -> None:
    """`step_<device>.json` for programs, `.md` for people, and `.png`."""
    folder.mkdir(exist_ok=True, parents=True)
    stem = folder / f"step_{device.name}"
    record = {
        "command": command,
        "machine": device.describe(),
        "tables": [table.to_dict() for table in tables],
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    lines = [
        "# One training step",
        "",
        origin(command, device.describe()),
        "",
        f"Medians of {repetitions} interleaved repetitions, AdamW. */ dense*: over the dense row without a mask, where "
        "there is one. *realised*: the time of forward and backward that is saved over the FLOPs saved. *peak*: model, "
        "optimizer, gradients and all that a step holds at once; *added*: of it what is neither model nor optimizer; "
        "*saved*: what the forward leaves for the backward. "
        "*first step*: with compilation, and with validation for gated rows; rows of one model share its graph.",
        "",
        f"![Steps](step_{device.name}.png)",
        "",
    ]
    for table in tables:
        lines += table.lines()
    stem.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")
    draw(tables, stem.with_suffix(".png"))


COLOURS = ("#4c72b0", "#dd8452", "#937860")


def draw(tables: list[Table], path: Path) -> None:
    """Bars of step times by part, one panel a table; a row's share of the dense step is written beside it."""
    figure, panels = plt.subplots(
        len(tables), 1, figsize=(9, sum(0.9 + 0.3 * len(table.measured) for table in tables)), squeeze=False,
        height_ratios=[len(table.measured) + 1 for table in tables], layout="constrained",
    )  # fmt: skip
    for table, axes in zip(tables, panels[:, 0], strict=True):
        names = [row.name for row in table.measured]
        left = [0.0] * len(names)
        for part, colour in zip(PARTS, COLOURS, strict=True):
            widths = [getattr(row.timing, f"{part}_ms") for row in table.measured]
            axes.barh(names, widths, left=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for n, row in enumerate(table.measured):
            axes.text(left[n], n, f" {row.timing.step_ms / table.dense.step_ms:.2f}", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.set_title(table.title, fontsize=9)
        axes.set_xlabel("ms per step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
