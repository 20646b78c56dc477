"""Run the whole suite on one device, one program after the other, and gather its goals in one table.

    python tests/benchmarks/run.py [--device cuda]

Each program writes its own results; `results/goals_<device>.md` says of every goal what was measured. It takes about an
hour on two CPU cores. `--gather` only writes the table again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import markdown_table, origin

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PROGRAMS = ("bench_step.py", "bench_growth.py", "bench_steady.py", "bench_start.py", "bench_head_loss.py")
ON_CPU_ONLY = ("bench_compile.py", "bench_runtime_share.py")
HEADINGS = ("goal", "where", "at most", "measured", "")
Line = tuple[str, str, float, float]
"""What, where, at most, measured."""


def step_goals(record: dict[str, Any]) -> Iterator[Line]:
    for table in record["tables"]:
        shape = table["shape"]
        padded = ", padded" if shape["padded"] else ""
        where = f"{shape['family']} {shape['width']}, {shape['B']} x {shape['S']}{padded}, {table['tuning']}"
        for goal in table["goals"]:
            what = f"{goal['row']} / {goal['other']}, {goal['figure'].replace('_', ' ')}"
            yield what, where, goal["bound"], goal["measured"]


def steady_goals(record: dict[str, Any]) -> Iterator[Line]:
    where = f"{record['steps']} steps, {record['shapes']} shapes"
    yield "traces after the warm-up", where, 0, record["traces"]
    yield "graphs compiled after the warm-up", where, 0, record["graphs"]


def compile_goals(record: dict[str, Any]) -> Iterator[Line]:
    for what, found in record["goals"].items():
        yield what, "", found["goal"], found["measured"]


def share_goals(record: dict[str, Any]) -> Iterator[Line]:
    yield "look-up, selection and observation / step", "the main job", record["goal"], record["share"]


def gather(device: str) -> list[str]:
    """The table's lines, from whatever results are there."""
    sources = {f"step_{device}": step_goals, f"steady_{device}": steady_goals}
    if device == "cpu":
        sources |= {"compile": compile_goals, "runtime_share": share_goals}
    rows: list[tuple[str, ...]] = []
    commands = []
    for stem, goals in sources.items():
        path = RESULTS / f"{stem}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        commands.append(f"- {origin(record['command'], record['machine'])}")
        for what, where, bound, measured in goals(record):
            met = "met" if measured <= bound else "**not met**"
            rows.append((what, where, f"{bound:.3g}", f"{measured:.3f}", met))
    return ["# Goals", "", *commands, "", *markdown_table(HEADINGS, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gather", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.gather:
        commands = [[HERE / program, "--device", args.device] for program in PROGRAMS]
        commands += [[HERE / program] for program in ON_CPU_ONLY if args.device == "cpu"]
        for command in commands:
            if subprocess.run([sys.executable, *command]).returncode:
                print(f"{command[0].name} failed", file=sys.stderr)
    (RESULTS / f"goals_{args.device}.md").write_text("\n".join(gather(args.device)) + "\n")


if __name__ == "__main__":
    main()
