"""Write rows of `run.py` as RESULTS.md: totals, and one line for each architecture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]
COLUMNS = ("model type", "varlen", "compact", "dense", "traces", "error", "oracle", "reason")
_TITLES = {"causal": "Causal language models", "image": "Image-text-to-text models, given text"}


def write(rows: Rows, batches: int | None, machine: str, path: Path) -> None:
    """machine: what the run was made with, a line. batches: how many were checked of each, None for all."""
    checked = "every batch" if batches is None else f"the first {batches} of the batches"
    lines = [
        "# Architectures",
        "",
        f"`python tests/zoo/run.py{'' if batches is None else f' --batches {batches}'}`, {machine}.",
        "",
        f"Each architecture is built small from its own configuration, with random weights; {checked} that `check.py` "
        "describes went through a gated step. Its loss, losses by label, set of gradients and gradients are compared "
        "with those of the untouched model in which no query sees an elided key (`oracle.py`). *error*: the largest "
        "one of losses, and of a gradient beside all gradients together; in float32, against the same in float64.",
        "",
        *_totals(rows),
    ]
    for mapping, title in _TITLES.items():
        of_mapping = sorted(
            (row for row in rows if row["mapping"] == mapping), key=lambda row: row["model_type"]
        )
        lines += ["", f"## {title}", "", *_table(of_mapping)]
    path.write_text("\n".join(lines) + "\n")


def _totals(rows: Rows) -> list[str]:
    statuses = Counter(row["status"] for row in rows)
    right = [row for row in rows if row["status"] == "right"]
    whole = sum(not row["kinds"].get("dense") for row in right)
    varlen = sum(set(row["kinds"]) == {"varlen"} for row in right)
    layers = Counter(
        {kind: sum(row["kinds"].get(kind, 0) for row in right) for kind in ("varlen", "compact", "dense")}
    )
    ran = len(rows) - statuses["not built"]
    return [
        "| | |",
        "|---|---|",
        f"| (type, mapping) pairs | {len(rows)} |",
        f"| built and trained on text from a small configuration | {ran} |",
        f"| gated, equal to the oracle | {statuses['right']} |",
        f"| of them with every layer gated | {whole} |",
        f"| of them with every layer by variable-length attention | {varlen} |",
        f"| layers gated: varlen, compact; left dense | {layers['varlen']}, {layers['compact']}; {layers['dense']} |",
        f"| refused with a reason | {statuses['refused']} |",
        f"| wrong | {statuses['wrong']} |",
        f"| not compared: it crashed, or no oracle holds | {statuses['crashed']} |",
    ]


def _table(rows: Rows) -> list[str]:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        right = row["status"] == "right"
        counts = [str(row.get("kinds", {}).get(kind, "")) for kind in ("varlen", "compact", "dense")]
        measured = (
            [str(row["traces"]), f"{row['worst']:.0e}", row["oracle"]] if right else ["", "", row["status"]]
        )
        lines.append("| " + " | ".join([row["model_type"], *counts, *measured, _plain(row["reason"])]) + " |")
    return lines


def _plain(reason: str) -> str:
    short = reason if len(reason) <= 240 else reason[:237] + "..."
    return short.replace("|", "·").replace("\n", " ")
