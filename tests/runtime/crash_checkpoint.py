"""Kill training runs at random moments, resume them, and compare how they end with a run that nobody killed.

    python tests/runtime/crash_checkpoint.py --kills 120

Most runs train a gate alone, on losses made up beforehand, and save it after every step, which leaves nearly all of
their time to the writing of files. Some are a Trainer's, with two batches to an optimizer step and a checkpoint after
each: these have to end with the same weights, too, to the bit. A part of the kills comes in the middle of an epoch, of
an accumulation, or of a write.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from crash_store import forked
from test_ranks import SAMPLES, bits, make_gate, step

from regate_fx.errors import StoreDamaged, StoreMismatch
from regate_fx.runtime import ReGate
from regate_fx.runtime.checkpoint import read_state

STEPS = 18
STATE, END = "regate.safetensors", "end.json"

Run = Callable[[Path], None]
"""Trains in a folder, going on from what is there, and writes what the run ends with into `END`."""


@dataclass
class Tally:
    """kills: processes that died by SIGKILL; runs: trainings that were finished and compared; starts: for them."""

    kills: int = 0
    runs: int = 0
    starts: int = 0


def train_gate(folder: Path) -> None:
    gate, path = make_gate(), folder / STATE
    if path.exists():
        gate.load(path)
    while gate.global_step < STEPS:
        begin = gate.global_step * 2 % SAMPLES
        step(gate, [begin, begin + 1], epoch=gate.global_step * 2 // SAMPLES)
        gate.save(path)
    _end(folder, {"ema": bits(gate.difficulty.ema)})


def train_by_trainer(folder: Path) -> None:
    from small_models import build
    from test_gate import examples, make, pad_right
    from transformers import Trainer, TrainingArguments

    import regate_fx
    from regate_fx.integrations import attach

    docs, losses = _documents()
    torch.manual_seed(0)
    gate = make(losses, collator=None)
    trainer = Trainer(
        regate_fx.compile(build("llama"), backend="eager", validate=False, gate=gate),
        TrainingArguments(
            str(folder),
            num_train_epochs=3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        ),
        data_collator=pad_right,
        train_dataset=examples(docs),
    )
    attach(trainer)
    trainer.train(resume_from_checkpoint=_newest(folder))
    weights = hashlib.sha256()
    for parameter in trainer.model.parameters():
        weights.update(parameter.detach().numpy().tobytes())
    _end(folder, {"ema": bits(gate.difficulty.ema), "weights": weights.hexdigest()})


def _documents(samples: int = 6) -> tuple[Any, Any]:
    from collated import reference_of
    from restatement import Token
    from small_models import FIRST_WORD, VOCABULARY

    chance = random.Random(7)
    docs = {}
    for sample_id in range(samples):
        ids = [chance.randrange(FIRST_WORD, VOCABULARY) for _ in range(9 + sample_id)]
        docs[sample_id] = [
            Token(token, token if place > 2 else -100, chance.random()) for place, token in enumerate(ids)
        ]
    return docs, reference_of(docs)


def _newest(folder: Path) -> str | None:
    """The newest checkpoint whose `trainer_state.json`, which Trainer writes last, is whole."""
    for checkpoint in sorted(
        folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])
    ):
        try:
            json.loads((checkpoint / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


def _end(folder: Path, found: dict[str, Any]) -> None:
    (folder / f".{END}").write_text(json.dumps(found))
    os.replace(folder / f".{END}", folder / END)


def torment(run: Run, kills: int, chance: random.Random) -> Tally:
    """Kill one process after another, in one training after another, until there were `kills` of them."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as name:
        begin = time.perf_counter()
        assert _ended(forked(lambda: run(Path(name)))) == 0
        seconds = time.perf_counter() - begin
        expected = json.loads((Path(name) / END).read_text())
    while tally.kills < kills:
        with tempfile.TemporaryDirectory() as name:
            folder, known = Path(name), 0
            while not (folder / END).exists():
                child = forked(lambda folder=folder: run(folder))
                tally.starts += 1
                # Longer than a run takes: most of it is start-up, and a run that is killed there gets no further.
                time.sleep(chance.uniform(0, 1.5 * seconds))
                os.kill(child, signal.SIGKILL)
                status = _ended(child)
                assert status in (0, -signal.SIGKILL), status
                tally.kills += status != 0
                known = _check_state(folder, known)
            assert json.loads((folder / END).read_text()) == expected
            tally.runs += 1
    return tally


def _check_state(folder: Path, known: int) -> int:
    """The step of the newest state in the folder, which is whole, and not behind one seen before."""
    states = [read_state(path) for path in folder.rglob(STATE)]
    newest = max((state["global_step"] for state in states), default=0)
    assert newest >= known, "a saved step was lost"
    return newest


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def torment_gate(kills: int, seed: int) -> Tally:
    return torment(train_gate, kills, random.Random(seed))


def torment_trainer(kills: int, seed: int) -> Tally:
    return torment(train_by_trainer, kills, random.Random(seed))


def fuzz_state(gate: ReGate, path: Path, mutations: int, chance: random.Random) -> int:
    """Read mutated files of a gate's state; how many were refused. The others have to give what was written."""
    gate.save(path)
    content, expected, refused = path.read_bytes(), read_state(path), 0
    for _ in range(mutations):
        path.write_bytes(_mutated(content, chance))
        try:
            state = read_state(path)
        except (StoreDamaged, StoreMismatch):
            refused += 1
            continue
        assert bits(state.pop("ema")) == bits(expected["ema"])
        assert state == {name: value for name, value in expected.items() if name != "ema"}
    return refused


def _mutated(content: bytes, chance: random.Random) -> bytes:
    place, length = chance.randrange(len(content)), chance.randrange(1, 64)
    kind = chance.choice(["flip", "cut", "insert", "clear", "move"])
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    if kind == "insert":
        return content[:place] + chance.randbytes(length) + content[place:]
    if kind == "clear":
        return content[:place] + bytes(len(content[place : place + length])) + content[place + length :]
    return content[place:] + content[:place]


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from machine import machine

    by_trainer = max(1, args.kills // 6)
    kinds = {
        "a gate alone": lambda: torment_gate(args.kills - by_trainer, args.seed),
        "a small Llama, by Trainer": lambda: torment_trainer(by_trainer, args.seed),
    }
    options = f"--kills {args.kills} --mutations {args.mutations} --seed {args.seed}"
    lines = [
        "# Training runs killed at random moments",
        "",
        f"`python tests/runtime/crash_checkpoint.py {options}`: "
        + ", ".join(f"{key} {value}" for key, value in machine().items())
        + ".",
        "",
        "| run | killed | started | finished, equal to the bit to a run that nobody killed |",
        "| --- | --- | --- | --- |",
    ]
    for kind, torment_kind in kinds.items():
        tally = torment_kind()
        lines.append(f"| {kind} | {tally.kills} | {tally.starts} | {tally.runs} |")
        print(lines[-1], flush=True)
    with tempfile.TemporaryDirectory() as name:
        gate = make_gate()
        step(gate, [0, 1], 0)
        refused = fuzz_state(gate, Path(name) / STATE, args.mutations, random.Random(args.seed))
    rest = args.mutations - refused
    lines += [
        "",
        f"Of {args.mutations} mutated state files {refused} were refused, {rest} read as what was written.",
    ]
    print(lines[-1])
    results = Path(__file__).parent / "results"
    (results / "crash_checkpoint.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    torch.set_num_threads(1)
    main()
