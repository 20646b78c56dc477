"""Write rows of `run.py` as RESULTS.md or WAYS.md: totals, and a line for each architecture or way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]
COLUMNS = ("model type", "varlen", "compact", "dense", "traces", "error", "oracle", "reason")
_TITLES = {"causal": "Causal language models", "image": "Image-text-to-text models, given text"}


def write(rows: Rows, batches: int | None, made_with: str, path: Path) -> None:
    """made_with: command, versions and date. batches: how many were checked of each, None for all."""
    checked = "every batch" if batches is None else f"the first {batches} of the batches"
    lines = [
        "# Architectures",
        "",
        made_with,
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


def write_ways(rows: Rows, made_with: str, path: Path) -> None:
    """made_with: command, versions and date."""
    ran = [row for row in rows if row["status"] != "not built"]
    ways = Counter(row.get("way") or "died" for row in ran)
    lines = [
        "# Ways to run a model",
        "",
        made_with,
        "",
        "Each architecture is built and compared as for RESULTS.md, run in one of the ways that `ways.py` describes: "
        "they are taken in turn, and one that an architecture does not know is passed over.",
        "",
        "| way | architectures | equal to the oracle | refused | wrong | crashed |",
        "|---|---|---|---|---|---|",
    ]
    for way, count in sorted(ways.items()):
        statuses = Counter(row["status"] for row in ran if (row.get("way") or "died") == way)
        numbers = (statuses[status] for status in ("right", "refused", "wrong", "crashed"))
        lines.append("| " + " | ".join([way, str(count), *map(str, numbers)]) + " |")
    lines += ["", "Not equal:", "", "| architecture | way | status | reason |", "|---|---|---|---|"]
    for row in sorted(ran, key=lambda row: (row["mapping"], row["model_type"])):
        if row["status"] != "right":
            name = f"{row['mapping']}:{row['model_type']}"
            cells = [name, row.get("way", ""), row["status"], _plain(row["reason"])]
            lines.append("| " + " | ".join(cells) + " |")
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
