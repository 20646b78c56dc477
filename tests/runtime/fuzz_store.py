"""Read stores whose files were mutated: the right values or a typed error, never anything else.

    python tests/runtime/fuzz_store.py --mutations 10000

Stores are opened and read, or a pass goes on with what it finds, in forked processes, so that a crash of the
interpreter is seen as such.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from stores import ABOUT, assert_same, random_samples, write_store

from regate_fx.errors import RegateError
from regate_fx.runtime import ReferenceLosses
from regate_fx.runtime.store_files import INDEX, MANIFEST, PLAN
from regate_fx.runtime.store_writer import Plan, StoreWriter
from regate_fx.runtime.windows import Windows, fill

SAMPLES = random_samples(11)
OTHERS = random_samples(11, seed=1)
PER_PROCESS = 250

Mutation = Callable[[bytearray, random.Random], bytearray]


def _flip(content: bytearray, chance: random.Random) -> bytearray:
    for _ in range(chance.choice((1, 1, 1, 2, 10))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


def _truncate(content: bytearray, chance: random.Random) -> bytearray:
    return content[: chance.randrange(len(content))]


def _insert(content: bytearray, chance: random.Random) -> bytearray:
    at = chance.randrange(len(content) + 1)
    return content[:at] + chance.randbytes(chance.choice((1, 2, 8, 64, 1000))) + content[at:]


def _remove(content: bytearray, chance: random.Random) -> bytearray:
    at = chance.randrange(len(content))
    return content[:at] + content[at + chance.choice((1, 2, 8, 64)) :]


def _zero(content: bytearray, chance: random.Random) -> bytearray:
    at = chance.randrange(len(content))
    length = min(chance.choice((8, 64, 512)), len(content) - at)
    return content[:at] + bytes(length) + content[at + length :]


def _digit(content: bytearray, chance: random.Random) -> bytearray:
    """In text, such as a manifest: one digit for another."""
    digits = [at for at, byte in enumerate(content) if byte in b"0123456789"]
    content[chance.choice(digits or [0])] = chance.choice(b"0123456789")
    return content


MUTATIONS: dict[str, Mutation] = {
    "bits flipped": _flip,
    "truncated": _truncate,
    "bytes inserted": _insert,
    "bytes removed": _remove,
    "zeroed": _zero,
    "digit changed": _digit,
}
SWAPPED = "contents swapped"
REPLACED = "file of another store"
KINDS = (*MUTATIONS, SWAPPED, REPLACED)


def mutate(folder: Path, other: Path, kind: str, chance: random.Random) -> str:
    """The name of the file that changed, the first of two; empty where none did."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = chance.choice(files)
    before = path.read_bytes()
    if kind == SWAPPED:
        second = chance.choice([file for file in files if file != path])
        path.write_bytes(second.read_bytes())
        second.write_bytes(before)
    elif kind == REPLACED:
        role = path.name[:11]
        path.write_bytes(next(file for file in other.iterdir() if file.name.startswith(role)).read_bytes())
    else:
        path.write_bytes(MUTATIONS[kind](bytearray(before), chance))
    return path.name if path.read_bytes() != before else ""


def read(folder: Path) -> str:
    """What came of opening a store and reading it all: "right", or the name of the error."""
    try:
        assert_same(ReferenceLosses.open(folder), SAMPLES)
    except RegateError as error:
        return _named(error, folder)
    return "right"


def go_on(folder: Path) -> str:
    """Likewise, of a pass that goes on in the folder."""
    try:
        writer = StoreWriter(folder, Plan(ABOUT, len(SAMPLES), 3))
        writer.publish(fill(writer, Windows(SAMPLES, 3), list, lambda window, examples: writer.read(window)))
    except RegateError as error:
        return _named(error, folder)
    return read(folder)


def _named(error: RegateError, folder: Path) -> str:
    assert str(folder) in str(error), "the error names no file"
    return type(error).__name__


def fuzz(mutations: int, seed: int) -> collections.Counter[tuple[str, str, str, str]]:
    """How often (what was done, mutation, file, outcome) came; a wrong value or a crash raises `AssertionError`."""
    with tempfile.TemporaryDirectory() as name:
        finished, unfinished, other = (Path(name) / part for part in ("finished", "unfinished", "other"))
        write_store(finished, SAMPLES)
        write_store(other, OTHERS)
        shutil.copytree(finished, unfinished)
        for file in (MANIFEST, INDEX, f"{next(unfinished.glob('shard-00003-*')).name}"):
            (unfinished / file).unlink()
        assert (unfinished / PLAN).exists()
        found: collections.Counter[tuple[str, str, str, str]] = collections.Counter()
        for begin in range(0, mutations, PER_PROCESS):
            count = min(PER_PROCESS, mutations - begin)
            log = Path(name) / "log"
            child = os.fork()
            if not child:
                _in_child(log, finished, unfinished, other, count, random.Random(f"{seed} {begin}"))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            lines = log.read_text().splitlines()
            assert status == 0 and len(lines) == count, (status, lines[-1:])
            found.update(tuple(line.split("\t")) for line in lines)
    return found


def _in_child(
    log: Path, finished: Path, unfinished: Path, other: Path, count: int, chance: random.Random
) -> None:
    try:
        with open(log, "w") as outcomes, tempfile.TemporaryDirectory() as name:
            for number in range(count):
                kind = chance.choice(KINDS)
                what, base, act = chance.choice((("read", finished, read), ("go on", unfinished, go_on)))
                folder = Path(name) / str(number)
                shutil.copytree(base, folder)
                while not (changed := mutate(folder, other, kind, chance)):
                    kind = chance.choice(KINDS)
                outcomes.write(f"{what}\t{kind}\t{changed}\t{act(folder)}\n")
                shutil.rmtree(folder)
    except BaseException as error:
        print(f"{kind}: {type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from machine import machine

    found = fuzz(args.mutations, args.seed)
    outcomes = sorted({outcome for *_, outcome in found})
    unharmed = sorted({name for _, _, name, outcome in found if outcome == "right"})
    lines = [
        "# Stores with mutated files",
        "",
        f"`python tests/runtime/fuzz_store.py --mutations {args.mutations} --seed {args.seed}`: "
        + ", ".join(f"{key} {value}" for key, value in machine().items())
        + ". No wrong value, no crash, no error of another type. The values were right after mutations of "
        + f"{' and '.join(unharmed)}: a plan is not read again, and some changes leave the meaning of JSON text alone.",
        "",
        f"| a store is | mutation | {' | '.join(outcomes)} |",
        "| --- " * (2 + len(outcomes)) + "|",
    ]
    for what, kind in sorted({(what, kind) for what, kind, *_ in found}):
        came = collections.Counter[str]()
        for (*done, _, outcome), times in found.items():
            if done == [what, kind]:
                came[outcome] += times
        counts = " | ".join(str(came[outcome]) for outcome in outcomes)
        lines.append(f"| {'read' if what == 'read' else 'gone on with'} | {kind} | {counts} |")
    print("\n".join(lines))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "fuzz_store.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
