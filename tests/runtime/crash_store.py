"""Kill teacher passes at random moments, start them again, and look at what they leave.

    python tests/runtime/crash_store.py --kills 200

A pass is a forked process, so that starting one costs nothing. Most score with losses made up beforehand, which leaves
nearly all of their time to the writing of files; some run a small model, some share their work with a second process
that is not killed. After each kill and at each end it is checked that

- every shard that was published stays, byte for byte, and is not computed again;
- the folder is either no store yet or the whole one;
- the finished store holds the losses of the pass that nobody disturbed, value for value.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stores import ABOUT, random_samples

from regate_fx.runtime import ReferenceLosses, SampleLosses, teacher_losses
from regate_fx.runtime.store_files import MANIFEST, window_of
from regate_fx.runtime.store_writer import Plan, StoreWriter
from regate_fx.runtime.windows import Windows, fill

PER_SHARD = 3
WINDOWS = 20
LABELS = 200_000  # of a sample at most: a megabyte a shard, so that a kill can come in the middle of a write

Pass = Callable[[Path, Path], None]
"""Runs a pass over a folder, and writes the windows that it computes into a log."""


@dataclass
class Tally:
    """What was seen.

    kills:    processes that died by SIGKILL; early: of these, before all shards were published
    stores:   stores that were finished and compared; computed: windows that were computed for them
    """

    kills: int = 0
    early: int = 0
    stores: int = 0
    computed: int = 0


def made_up_pass(samples: Sequence[SampleLosses]) -> Pass:
    first = {sample.sample_id: number // PER_SHARD for number, sample in enumerate(samples)}

    def run(folder: Path, log: Path) -> None:
        def score(examples: Iterator[SampleLosses]) -> list[SampleLosses]:
            found = list(examples)
            _note(log, first[found[0].sample_id])
            return found

        writer = StoreWriter(folder, Plan(ABOUT, len(samples), PER_SHARD))
        writer.publish(fill(writer, Windows(samples, PER_SHARD), score))

    return run


def model_pass(model: Any, data: Sequence[dict[str, Any]]) -> Pass:
    """A real teacher, in batches of two."""

    def run(folder: Path, log: Path) -> None:
        class Noted(list[Any]):
            def __getitem__(self, row: Any) -> Any:
                # The first of a finished window is looked at again, no other.
                if row % PER_SHARD == 1:
                    _note(log, row // PER_SHARD)
                return super().__getitem__(row)

        teacher_losses(model, Noted(data), folder, batch_size=2, samples_per_shard=PER_SHARD, progress=False)

    return run


def _note(log: Path, window: int) -> None:
    with open(log, "a") as file:
        file.write(f"{window}\n")


def texts(count: int) -> list[dict[str, Any]]:
    chance = torch.Generator().manual_seed(5)
    rows = torch.randint(3, 97, (count, 8), generator=chance)
    return [
        {"sample_id": 7 * number, "input_ids": row.tolist(), "labels": row.tolist()}
        for number, row in enumerate(rows)
    ]


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def torment(
    run: Pass, expected: ReferenceLosses, kills: int, chance: random.Random, processes: int = 1
) -> Tally:
    """Kill one process after another, in one store after another, until there were `kills` of them."""
    tally = Tally()
    seconds = _undisturbed(run, expected)
    while tally.kills < kills:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "store"
            while not _attempt(run, folder, seconds, chance, tally, processes):
                _check_unfinished(folder, expected)
            _check_finished(folder, expected)
            tally.stores += 1
    return tally


def _undisturbed(run: Pass, expected: ReferenceLosses) -> float:
    """Seconds of a pass that nobody kills."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        begin = time.perf_counter()
        assert _ended(forked(functools.partial(run, folder, Path(name) / "log"))) == 0
        seconds = time.perf_counter() - begin
        _check_finished(folder, expected)
        return seconds


def _attempt(
    run: Pass, folder: Path, seconds: float, chance: random.Random, tally: Tally, processes: int
) -> bool:
    """Start passes, kill the first of them at a random moment; whether one ended well."""
    published = _published(folder)
    logs = [folder.parent / f"log-{tally.kills}-{number}" for number in range(processes)]
    children = [forked(functools.partial(run, folder, log)) for log in logs]
    time.sleep(chance.uniform(0, seconds / 2))
    os.kill(children[0], signal.SIGKILL)
    status = [_ended(children[0])]
    assert status[0] in (0, -signal.SIGKILL), status
    if status[0]:
        tally.kills += 1
        tally.early += len(_published(folder)) < WINDOWS
    status += [_ended(child) for child in children[1:]]
    assert not any(status[1:]), status
    computed = [{int(line) for line in log.read_text().split()} for log in logs if log.exists()]
    tally.computed += sum(len(windows) for windows in computed)
    _check_computed(computed, published, _published(folder), killed=bool(status[0]))
    return 0 in status


def _published(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of each shard."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("shard-*.arrow")}


def _check_computed(
    computed: Sequence[set[int]], before: dict[str, Any], after: dict[str, Any], killed: bool
) -> None:
    assert before.items() <= after.items(), "a published shard changed or vanished"
    windows_before = {window_of(name) for name in before}
    for windows in computed:
        assert not windows & windows_before, "a published window was computed again"
    twice = sum(map(len, computed)) - len(set().union(*computed))
    assert twice <= int(killed), "two processes computed the same window"


def _check_unfinished(folder: Path, expected: ReferenceLosses) -> None:
    if (folder / MANIFEST).exists():
        _compare(ReferenceLosses.open(folder), expected)


def _check_finished(folder: Path, expected: ReferenceLosses) -> None:
    _compare(ReferenceLosses.open(folder), expected)
    assert not list(folder.glob(".*unfinished"))


def _compare(found: ReferenceLosses, expected: ReferenceLosses) -> None:
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.starts, expected.starts)
    assert torch.equal(found.hashes, expected.hashes)
    assert torch.equal(found.losses, expected.losses)
    assert found.fingerprint == expected.fingerprint


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def torment_made_up(kills: int, seed: int, processes: int = 1) -> Tally:
    samples = random_samples(PER_SHARD * WINDOWS - 1, labels=LABELS)
    expected = ReferenceLosses.of(samples, ABOUT)
    return torment(made_up_pass(samples), expected, kills, random.Random(seed), processes)


def torment_model(kills: int, seed: int) -> Tally:
    from small_models import build

    model, data = build("llama"), texts(PER_SHARD * WINDOWS - 1)
    with tempfile.TemporaryDirectory() as name:
        undisturbed = teacher_losses(
            model, data, name, batch_size=2, samples_per_shard=PER_SHARD, progress=False
        )
        return torment(model_pass(model, data), undisturbed, kills, random.Random(seed))


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from machine import machine

    tenth = max(1, args.kills // 10)
    kinds = {
        "losses made up, one process": lambda: torment_made_up(args.kills - 3 * tenth, args.seed),
        "losses made up, a second process goes on": lambda: torment_made_up(
            2 * tenth, args.seed, processes=2
        ),
        "a small Llama": lambda: torment_model(tenth, args.seed),
    }
    lines = [
        "# Teacher passes killed at random moments",
        "",
        f"`python tests/runtime/crash_store.py --kills {args.kills} --seed {args.seed}`: "
        + ", ".join(f"{key} {value}" for key, value in machine().items())
        + f". Stores of {WINDOWS} shards.",
        "",
        "| pass | killed | of these, before all shards were there | finished stores, all values right | "
        "windows computed, least possible |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, torment_kind in kinds.items():
        tally = torment_kind()
        least = f"{tally.computed}, {tally.stores * WINDOWS}"
        lines.append(f"| {kind} | {tally.kills} | {tally.early} | {tally.stores} | {least} |")
        print(lines[-1], flush=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "crash_store.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
