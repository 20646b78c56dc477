"""Check every architecture, or those named; print a line for each and write RESULTS.md beside this file.

    python tests/zoo/run.py [causal:llama image:llava ...] [--jobs 2] [--json rows.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
LIMIT = 240  # seconds for one architecture


def _work(name: str, batches: int | None = None) -> dict[str, Any]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    from check import Row, check
    from entries import Entry

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {LIMIT} s")

    mapping, _, model_type = name.partition(":")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        torch._dynamo.reset()
        row = check(Entry(mapping, model_type), batches)
    except TimeoutError as error:
        row = Row(mapping, model_type, "crashed", reason=str(error))
    finally:
        signal.alarm(0)
    return asdict(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", type=int, help="how many of the batches to check; all by default")
    arguments = parser.parse_args()
    from entries import ENTRIES

    names = arguments.names or [str(entry) for entry in ENTRIES]
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context, max_tasks_per_child=8) as pool:
        for row in pool.map(partial(_work, batches=arguments.batches), names):
            rows.append(row)
            print(
                f"{row['mapping']}:{row['model_type']:28} {row['status']:9} {row['kinds']} b{row['batches']} t{row['traces']}"
                f" g{row['graphs']} {row['worst']:.1e} {row['seconds']}s {row['reason'][:400]}",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
