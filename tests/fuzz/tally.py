"""Write rows of `run.py` as RESULTS.md: totals, refusals by cause, and how often each choice occurred and was gated."""

from __future__ import annotations

import datetime
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from choices import DECODER, LAYER
from program import Program
from verdict import STATUSES

Rows = Sequence[dict[str, Any]]
RIGHT = ("equal", "equal, some dense", "unmatched")


def write(rows: Rows, command: str, seconds: float, jobs: int, path: Path) -> None:
    python = ".".join(map(str, sys.version_info[:2]))
    made = f"`{command} --jobs {jobs}`, torch {torch.__version__}, Python {python}, {datetime.date.today()}"
    each = sum(row["seconds"] for row in rows) / max(len(rows), 1)
    lines = [
        "# Random decoder programs",
        "",
        f"{made}; {seconds / 60:.0f} minutes, {each:.1f} s a program.",
        "",
        "`program.py` lists what decoders do in different ways; a program draws one way for each, and `decoder.py` is "
        "its model. Two batches of different sizes, the second padded on the left, go through a gated step in float64; "
        "loss, losses by label, counted labels, logits where kept, the set of gradients and their values are compared "
        "with the same model run in full with elided keys hidden (`elision_oracle.py`), at 1e-9 of their size, or 2e-4 "
        "where a program computes part in float32.",
        "",
        *_totals(rows),
        "",
        "## Refusals by cause",
        "",
        *_refusals(rows),
        "",
        "## How often each choice occurred",
        "",
        "Programs that have it in a layer or as a whole; of them gated (in any layer) and right; refused. Choices "
        "without a meaning beside others of their program are counted as the simplest.",
        "",
        *_choices(rows),
    ]
    path.write_text("\n".join(lines) + "\n")


def _totals(rows: Rows) -> list[str]:
    meanings = {
        "equal": "every layer gated, equal to the oracle",
        "equal, some dense": "some layers dense, equal to the oracle",
        "unmatched": "layers reported are not the program's; equal to the dense reference alone",
        "unchecked": "the same, and there is no dense reference",
        "refused": "refused by a typed error",
        "failed": "failed: different, or an untyped error",
        "broken": "not judged: the program itself cannot be run",
    }
    counts = Counter(row["status"] for row in rows)
    layers: Counter[str] = Counter()
    for row in rows:
        if row["status"] in RIGHT:
            layers.update(row["kinds"])
    return [
        "| | |",
        "|---|---|",
        f"| programs | {len(rows)} |",
        *(f"| {meanings[status]} | {counts[status]} |" for status in STATUSES),
        f"| layers of those that are right: varlen, compact, dense | {layers['varlen']}, {layers['compact']}, "
        f"{layers['dense']} |",
    ]


def cause(row: dict[str, Any]) -> str:
    """The first reason of a refusal, without numbers that differ from program to program."""
    first = row["reason"].partition(" | ")[0]
    first = re.sub(r"^(model|layer \d+): ", "", first)
    first = re.sub(r" \[[^\[\]]*\.py.*\] ", " ", first)
    return re.sub(r"\b[su]\d+\b|\d+", "#", first)[:160].replace("|", "·")


def _refusals(rows: Rows) -> list[str]:
    refused = [row for row in rows if row["status"] == "refused"]
    counts = Counter((row["code"], cause(row)) for row in refused)
    codes = Counter(row["code"] for row in refused)
    lines = ["| code | programs | reason |", "|---|---|---|"]
    for code, total in codes.most_common():
        lines.append(f"| **{code}** | **{total}** | |")
        lines += [f"| | {count} | {why} |" for (of, why), count in counts.most_common() if of == code]
    return lines


def _choices(rows: Rows) -> list[str]:
    seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        gated = row["status"] in RIGHT and any(row["kinds"].get(kind) for kind in ("varlen", "compact"))
        outcome = "gated" if gated else row["status"]
        for choice in _chosen(Program.from_json(row["program"])):
            seen[choice].update(["programs", outcome])
    lines = ["| choice | value | programs | gated | refused |", "|---|---|---|---|---|"]
    for name, weights in (LAYER | DECODER).items():
        for value in weights:
            counts = seen[name, str(value)]
            numbers = f"{counts['programs']} | {counts['gated']} | {counts['refused']}"
            lines.append(f"| {name} | {value} | {numbers} |")
    return lines


def _chosen(program: Program) -> set[tuple[str, str]]:
    of_layers = {(name, str(getattr(layer, name))) for layer in program.layers for name in LAYER}
    return of_layers | {(name, str(getattr(program, name))) for name in DECODER}
