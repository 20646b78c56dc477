"""Judge random decoder programs; print every failure with its shrunk program; all together write RESULTS.md.

python tests/fuzz/run.py --programs 2000 --seed 0 --jobs 2 [--json out.json]
python tests/fuzz/run.py --program '{"layers": [{}, {"attend": "scores"}]}'
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
LIMIT = 90  # seconds of the processor for one program
SHRINKING = 240  # seconds for shrinking a failure
CHUNK = 25
Row = dict[str, Any]


def _prepare() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    # Captured graphs are freed when their process ends: looking for them all the while costs a sixth of the time.
    gc.set_threshold(100_000, 50, 100)
    # With sizes that are symbols, and no layer like another, keys of the cache cost more than what it saves.
    torch._dynamo.config.fake_tensor_cache_enabled = False
    signal.signal(signal.SIGPROF, _stop)


def _stop(*_: Any) -> None:
    raise TimeoutError(f"took more than {LIMIT} s of the processor")


def _judged(program: Any) -> Any:
    from verdict import judge

    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        return judge(program)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _work(seed: int) -> Row:
    """The verdict of a seed's program; of a failure also the simplest program that fails in the same way."""
    from program import draw

    verdict = _judged(draw(seed))
    row = {"seed": seed, **verdict.to_json()}
    if verdict.status == "failed":
        row["shrunk"], row["shrunk_reason"] = shrunk(draw(seed), verdict)
    return row


def shrunk(program: Any, verdict: Any) -> tuple[Row, str]:
    from program import shrink

    until = time.perf_counter() + SHRINKING
    best, reason = program, verdict.reason
    is_simplest = False
    while not is_simplest:
        is_simplest = True
        for simpler in shrink(best):
            if time.perf_counter() > until:
                return best.to_json(), reason + " (not shrunk to the end)"
            found = _judged(simpler)
            if (found.status, found.code) == (verdict.status, verdict.code):
                best, reason, is_simplest = simpler, found.reason, False
                break
    return best.to_json(), reason


def _chunk(seeds: Sequence[int]) -> Iterator[Row]:
    """Rows of some seeds from a process of their own, which compilers fill; one that dies is replaced."""
    left = list(seeds)
    while left:
        command = [sys.executable, __file__, "--worker", *map(str, left)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            for line in process.stdout or ():
                if line.startswith("{"):
                    left.pop(0)
                    yield json.loads(line)
        if left:
            yield _died(left.pop(0), process.returncode)


def _died(seed: int, code: int | None) -> Row:
    from program import draw

    program = draw(seed).to_json()
    reason = f"the process ended with {code}"
    return {
        "seed": seed, "program": program, "status": "failed", "code": "died", "reason": reason, "kinds": {},
        "seconds": 0.0, "shrunk": program, "shrunk_reason": reason,
    }  # fmt: skip


def _print(row: Row, done: int) -> None:
    if row["status"] == "broken":
        print(f"seed {row['seed']}: broken, {row['reason']}\n    {json.dumps(row['program'])}", flush=True)
    if row["status"] == "failed":
        print(f"seed {row['seed']}: FAILED, {row['reason'][:600]}", flush=True)
        print(f"    shrunk: {json.dumps(row['shrunk'])}\n    {row['shrunk_reason'][:600]}", flush=True)
    if done % 50 == 0:
        print(f"{done} programs", flush=True)


def run_all(seeds: Sequence[int], jobs: int, path: Path | None) -> list[Row]:
    rows: list[Row] = []
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]

    def run(chunk: Sequence[int]) -> None:
        for row in _chunk(chunk):
            rows.append(row)
            _print(row, len(rows))
            if path is not None:
                path.write_text(json.dumps(rows, indent=1))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, chunks))
    return sorted(rows, key=lambda row: row["seed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first; the others follow")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="where to write totals")
    parser.add_argument("--program", type=json.loads, help="judge this one, as JSON")
    parser.add_argument("--worker", type=int, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _prepare()
        for seed in arguments.worker:
            print(json.dumps(_work(seed)), flush=True)
        return
    if arguments.program is not None:
        from program import Program

        _prepare()
        print(json.dumps(_judged(Program.from_json(arguments.program)).to_json(), indent=1))
        return
    from tally import write

    seeds = range(arguments.seed, arguments.seed + arguments.programs)
    started = time.perf_counter()
    rows = run_all(seeds, arguments.jobs, arguments.json)
    for status, count in Counter(row["status"] for row in rows).most_common():
        print(f"{count:6} {status}")
    command = f"python tests/fuzz/run.py --programs {arguments.programs} --seed {arguments.seed}"
    write(rows, command, time.perf_counter() - started, arguments.jobs, arguments.results)


if __name__ == "__main__":
    main()
