"""Check every architecture, or those named; print a line for each; all together write a table beside this file.

python tests/zoo/run.py [causal:llama image:llava ...] [--jobs 2] [--json rows.json]    # RESULTS.md
python tests/zoo/run.py --ways 0    # WAYS.md: each in one of the ways to run a model, taken in turn from number 0
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
LIMIT = 240  # seconds for one architecture
CHUNK = 10


def _work(name: str, batches: int | None, first_way: int | None) -> dict[str, Any]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    from check import Row, check
    from entries import ENTRIES, Entry

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {LIMIT} s")

    mapping, _, model_type = name.partition(":")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        torch._dynamo.reset()
        entry = Entry(mapping, model_type)  # type: ignore[arg-type]
        way = None if first_way is None else first_way + ENTRIES.index(entry)
        row = check(entry, batches, way)
    except TimeoutError as error:
        row = Row(mapping, model_type, "crashed", reason=str(error))
    finally:
        signal.alarm(0)
    return asdict(row)


def _chunk(names: Sequence[str], options: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of some architectures from a process of their own, which compilers fill; one that dies is replaced."""
    left = list(names)
    while left:
        command = [sys.executable, __file__, "--worker", *left, *options]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            for line in process.stdout or ():
                if line.startswith("{"):
                    left.pop(0)
                    yield json.loads(line)
        if left:
            mapping, _, model_type = left.pop(0).partition(":")
            yield {
                "mapping": mapping,
                "model_type": model_type,
                "status": "crashed",
                "reason": f"the process ended with {process.returncode}",
            }


def _print(row: dict[str, Any]) -> None:
    name = f"{row['mapping']}:{row['model_type']} {row.get('way', '')}"
    kinds = ", ".join(f"{count} {kind}" for kind, count in row.get("kinds", {}).items())
    print(
        f"{name:42} {row['status']:9} {kinds:22} {row.get('seconds', 0):6} s  {row['reason'][:300]}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", type=int, help="how many of the batches to check; all by default")
    parser.add_argument("--ways", type=int, help="run each in one of the ways, counted from this number")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        for name in arguments.names:
            print(json.dumps(_work(name, arguments.batches, arguments.ways)), flush=True)
        return
    from entries import ENTRIES

    names = arguments.names or [str(entry) for entry in ENTRIES]
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    rows: list[dict[str, Any]] = []
    given = {"--batches": arguments.batches, "--ways": arguments.ways}
    options = [text for name, value in given.items() if value is not None for text in (name, str(value))]

    def run(chunk: Sequence[str]) -> None:
        for row in _chunk(chunk, options):
            rows.append(row)
            _print(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, chunks))
    if not arguments.names:
        _write(rows, arguments.batches, arguments.ways, " ".join(options))


def _write(rows: Sequence[dict[str, Any]], batches: int | None, ways: int | None, options: str) -> None:
    import results
    import torch
    import transformers

    python = ".".join(map(str, sys.version_info[:2]))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {python}"
    made_with = f"`python tests/zoo/run.py {options}`, {versions}, {datetime.date.today()}."
    if ways is None:
        results.write(rows, batches, made_with, HERE / "RESULTS.md")
    else:
        results.write_ways(rows, made_with, HERE / "WAYS.md")


if __name__ == "__main__":
    main()
