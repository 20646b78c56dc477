"""Fine-tune a small LLaVA on pictures of handwritten digits twice, dense and with ReGATE, and compare the two.

    python examples/digits_vlm.py                  # minutes on two CPU cores
    python examples/digits_vlm.py --quick          # a smaller model, fewer scenes, no compiler
    python examples/digits_vlm.py --seeds 0 1 2    # three times, from other weights, scenes and orders

The digits come with scikit-learn; nothing is downloaded. The model's language half has learned to write the answers
without seeing any picture, its vision half, from labelled ones, to tell single digits apart. What is left to learn is
to say what is where. The language half, frozen as it is now, is the teacher: words that it expects anyway teach
little, the four digit words of an answer are those it cannot know. Both runs start from the same weights and see the
same batches. Table, figures and numbers go to `digits_vlm/`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from digits_figures import draw_curves, draw_words
from digits_model import build, learn_to_see, learn_to_write
from digits_scenes import LONGEST, Digits, collate, make_examples, make_tokenizer, seen_labels
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

import regate_fx
from regate_fx.runtime import DualCycle, ReferenceLosses, ReGate, teacher_losses

BATCH = 16
PEAK_LR = 2e-3

# LLaVA compares the number of image positions with that of image features; without this the dense model is compiled in
# two parts, with a warning about it.
torch._dynamo.config.capture_scalar_outputs = True


@dataclass(frozen=True)
class Size:
    """How large a run is; all counts of steps are optimizer steps."""

    width: int = 192
    layers: int = 4
    scenes: int = 2048
    held_out: int = 256
    epochs: int = 4
    writing_steps: int = 80
    seeing_steps: int = 120
    warmup: int = 64
    cycle: int = 64
    dense: int = 8
    evaluations: int = 16
    backend: str = "inductor"


QUICK = Size(128, 2, 1024, 128, 5, 60, 100, 32, 48, 6, 10, "eager")


@dataclass
class Record:
    """What one run cost and what it reached.

    Seconds of training are counts of steps times the median step of their kind, dense or sparse, so that a machine
    that pauses in between does not blur them. Evaluation is not counted.
    curve: decoder tokens, dense steps, sparse steps so far, and the held-out accuracy there.
    """

    name: str
    seed: int
    accuracy: float = 0.0
    label_tokens: int = 0
    decoder_tokens: int = 0
    compile_seconds: float = 0.0
    teacher_seconds: float = 0.0
    dense_steps: list[float] = field(default_factory=list)
    sparse_steps: list[float] = field(default_factory=list)
    curve: list[tuple[int, int, int, float]] = field(default_factory=list)

    def seconds(self, dense: int, sparse: int) -> float:
        """How long so many steps take."""
        kinds = (dense, self.dense_steps), (sparse, self.sparse_steps)
        return sum(count * median(steps) for count, steps in kinds if count)

    @property
    def training_seconds(self) -> float:
        return self.seconds(len(self.dense_steps), len(self.sparse_steps))

    def costs(self) -> dict[str, list[float]]:
        """Accuracy along the run, against decoder tokens and against seconds, the teacher pass included."""
        tokens, dense, sparse, accuracy = zip(*self.curve, strict=True)
        seconds = [self.teacher_seconds + self.seconds(*steps) for steps in zip(dense, sparse, strict=True)]
        return {"tokens": list(tokens), "seconds": seconds, "accuracy": list(accuracy)}

    def summary(self) -> dict[str, Any]:
        """For `runs.json`."""
        kinds = {"dense": self.dense_steps, "sparse": self.sparse_steps}
        return {
            **{name: value for name, value in asdict(self).items() if not isinstance(value, list)},
            "training_seconds": self.training_seconds,
            "steps": {kind: len(steps) for kind, steps in kinds.items()},
            "step_seconds": {kind: median(steps) for kind, steps in kinds.items() if steps},
            "curve": self.costs(),
        }


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip


def watched(count: int, what: str) -> Iterable[int]:
    with progress() as bar:
        yield from bar.track(range(count), description=what, task_id=bar.add_task(what, total=count, note=""))


@torch.no_grad()
def accuracy(model: nn.Module, held_out: Sequence[dict[str, Any]]) -> float:
    """Share of the digit words that are the model's first choice, in scenes of digit images it never saw."""
    model.eval()
    right = total = 0
    for begin in range(0, len(held_out), 64):
        examples = held_out[begin : begin + 64]
        batch = collate(examples)
        chosen = model(**batch).logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
        seen = seen_labels(examples)[:, 1:]
        right += int(chosen[seen].sum())
        total += int(seen.sum())
    model.train()
    return right / total


class Training:
    """One run from a given start. gate: None trains densely."""

    def __init__(self, name: str, seed: int, size: Size, start: nn.Module, gate: ReGate | None) -> None:
        self.model = copy.deepcopy(start).train()
        self.gate = gate
        self.record = Record(name, seed)
        self.size = size
        if gate is not None:
            self.compiled = regate_fx.compile(self.model, backend=size.backend, gate=gate)
        else:
            self.compiled = self.model if size.backend == "eager" else torch.compile(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEAK_LR, weight_decay=0.01)

    def warm_up(self, loader: Iterable[dict[str, Any]]) -> None:
        """Compile on two batches, without a trace in weights or gate."""
        begin = time.perf_counter()
        state = None if self.gate is None else self.gate.state_dict()
        for _, batch in zip(range(2), loader, strict=False):
            self.compiled(**batch).loss.backward()
        self.optimizer.zero_grad()
        if self.gate is not None and state is not None:
            self.gate.load_state_dict(state)
        self.record.compile_seconds = time.perf_counter() - begin

    def run(self, examples: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> Record:
        collator = collate if self.gate is None else self.gate.collate
        # The loader draws its orders from this seed, and both runs the same ones.
        orders = torch.Generator().manual_seed(self.record.seed)
        loader: DataLoader[Any] = DataLoader(
            list(examples), BATCH, shuffle=True, drop_last=True, generator=orders, collate_fn=collator
        )
        self.warm_up(DataLoader(list(examples), BATCH, collate_fn=collator))
        steps = self.size.epochs * len(loader)
        self.note_accuracy(held_out)
        with progress() as bar:
            task = bar.add_task(self.record.name, total=steps, note="")
            for step, batch in enumerate(batch for _ in range(self.size.epochs) for batch in loader):
                self.step(batch, step, steps)
                if (step + 1) % (steps // self.size.evaluations) == 0 or step + 1 == steps:
                    self.note_accuracy(held_out)
                bar.update(task, advance=1, note=f"held-out digits right: {self.record.accuracy:.1%}")
        return self.record

    def step(self, batch: dict[str, Any], step: int, steps: int) -> None:
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = (
                PEAK_LR * min(1.0, (step + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            )
        out = self.compiled(**batch)
        out.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - begin
        labels = batch["labels"][:, 1:] != -100
        if self.gate is None:
            self.record.label_tokens += int(labels.sum())
            self.record.decoder_tokens += BATCH * LONGEST
            self.record.dense_steps.append(seconds)
            return
        ratio = self.gate.schedule.ratio(step)
        (self.record.sparse_steps if ratio < 1 else self.record.dense_steps).append(seconds)
        self.record.label_tokens += int(out.counted.sum())
        self.record.decoder_tokens += batch["sample_id"].counts.active(ratio)[0]

    def note_accuracy(self, held_out: Sequence[dict[str, Any]]) -> None:
        self.record.accuracy = accuracy(self.model, held_out)
        record = self.record
        steps = len(record.dense_steps), len(record.sparse_steps)
        record.curve.append((record.decoder_tokens, *steps, record.accuracy))


def prepare(
    seed: int, size: Size, console: Console
) -> tuple[Any, PreTrainedTokenizerFast, list[Any], list[Any]]:
    """A model whose halves know their trade, and the scenes for training and for the end."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    digits, tokenizer = Digits(), make_tokenizer()
    examples = make_examples(size.scenes, digits.training, digits, tokenizer, chance)
    held_out = make_examples(size.held_out, digits.held_out, digits, tokenizer, chance)
    model = build(tokenizer, size.width, size.layers)
    loss = learn_to_write(model, tokenizer, chance, watched(size.writing_steps, "learn to write"))
    right = learn_to_see(model, digits, chance, watched(size.seeing_steps, "learn to see"))
    console.print(f"Language half: loss {loss:.3f} a word. Vision half: {right:.1%} of single digits right.")
    return model, tokenizer, examples, held_out


def compare(seed: int, size: Size, folder: Path, console: Console) -> tuple[Record, Record]:
    """Both runs for one seed; draws the words of a few answers."""
    model, tokenizer, examples, held_out = prepare(seed, size, console)
    begin = time.perf_counter()
    store = folder / f"teacher-{seed}-{'quick' if size is QUICK else 'full'}"
    losses = teacher_losses(model, examples, store, tokenizer=tokenizer, collator=collate, batch_size=64)
    teacher_seconds = time.perf_counter() - begin
    draw_words(examples, losses, tokenizer, folder / "words.png")
    say_what_the_teacher_knows(examples, losses, console)
    dense = Training("dense", seed, size, model, None).run(examples, held_out)
    gate = ReGate(losses, schedule=DualCycle(0.5, size.warmup, size.cycle, size.dense), collator=collate)
    gated = Training("ReGATE", seed, size, model, gate).run(examples, held_out)
    gated.teacher_seconds = teacher_seconds
    return dense, gated


def say_what_the_teacher_knows(examples: Sequence[Any], losses: ReferenceLosses, console: Console) -> None:
    found: dict[bool, list[float]] = {True: [], False: []}
    for example in examples:
        row = int(losses.find(torch.tensor([example["sample_id"]])))
        own = losses.of_row(row).tolist()
        seen = [seen for seen, label in zip(example["seen"], example["labels"], strict=True) if label != -100]
        for is_seen, loss in zip(seen, own, strict=True):
            found[is_seen].append(loss)
    means = {kind: sum(values) / len(values) for kind, values in found.items()}
    console.print(
        f"Teacher's mean loss: {means[True]:.2f} on the digit words, {means[False]:.2f} on the others."
    )


def table(records: Sequence[Record]) -> Table:
    """Both runs side by side."""
    shown = Table(title="Held-out digits right, and what it cost")
    shown.add_column("")
    for record in records:
        shown.add_column(f"{record.name}, seed {record.seed}", justify="right")
    rows: list[tuple[str, Any]] = [
        ("held-out digits right", lambda r: f"{r.accuracy:.1%}"),
        ("label tokens", lambda r: f"{r.label_tokens:,}"),
        ("decoder tokens", lambda r: f"{r.decoder_tokens:,}"),
        ("ms per step", lambda r: f"{1000 * median([*r.dense_steps, *r.sparse_steps]):.0f}"),
        ("  of it dense ones", lambda r: f"{1000 * median(r.dense_steps):.0f}"),
        ("  of it sparse ones", lambda r: f"{1000 * median(r.sparse_steps):.0f}" if r.sparse_steps else ""),
        ("s of training", lambda r: f"{r.training_seconds:.1f}"),
        ("s of compilation", lambda r: f"{r.compile_seconds:.1f}"),
        ("s of teacher pass", lambda r: f"{r.teacher_seconds:.1f}" if r.teacher_seconds else ""),
        ("s in all", lambda r: f"{r.training_seconds + r.compile_seconds + r.teacher_seconds:.1f}"),
    ]
    for name, cell in rows:
        shown.add_row(name, *(cell(record) for record in records))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer scenes, no compiler")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("digits_vlm"), help="folder for figures and numbers")
    arguments = parser.parse_args()
    size, console = QUICK if arguments.quick else Size(), Console()
    arguments.out.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    for seed in arguments.seeds:
        records.extend(compare(seed, size, arguments.out, console))
        console.print(table(records[-2:]))
    if len(arguments.seeds) > 1:
        console.print(table(records))
    draw_curves([(record.name, record.costs()) for record in records], arguments.out / "curves.png")
    runs = [record.summary() for record in records]
    (arguments.out / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")
    console.print(f"Figures and numbers: {arguments.out}/curves.png, words.png, runs.json")


if __name__ == "__main__":
    main()
