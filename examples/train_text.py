"""Train a small Llama on the Python documentation twice, dense and gated, and compare the two runs.

    python examples/train_text.py            # a few minutes on two CPU cores
    python examples/train_text.py --quick    # a shorter run of a shallower model

The text is the language reference that comes with Python (`pydoc_data.topics`); nothing is downloaded. Both
runs start from the same weights and see the same batches in the same order. The gated run computes every
token in its first pass over the text. From the second pass on, each chunk keeps half of its labels, drawn
at random or (`--rule hardest`) those whose loss was highest when they were last computed, and the decoder
computes only the positions that predict them.

Shapes: C chunks of the training text, B chunks in a batch, S positions in a chunk.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import regate_fx

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
LENGTH = 256
BATCH = 4
PEAK_LR = 2e-3


def read_topics() -> list[str]:
    """The texts of all topics. They quote each other: a paragraph stays where it comes first."""
    seen: set[str] = set()
    texts = []
    for name in sorted(topics):
        paragraphs = [paragraph for paragraph in topics[name].split("\n\n") if paragraph not in seen]
        seen.update(paragraphs)
        texts.append("\n\n".join(paragraphs) + END_OF_TEXT)
    return texts


def tokenize(texts: list[str]) -> Tensor:
    """Train a byte-level BPE on the texts and cut them, as one stream, into full chunks: int64 [C, S]."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    stream = torch.tensor([token for text in texts for token in tokenizer.encode(text).ids])
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)


def small_llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


class LabelChoice:
    """Choose labels of a chunk: those whose loss was highest when last computed, or, to compare, any."""

    def __init__(self, chunks: Tensor, keep: float, rule: str, seed: int) -> None:
        self.last_loss = torch.zeros(chunks.shape)
        self.kept = math.ceil(keep * (chunks.shape[1] - 1))
        self.random = torch.Generator().manual_seed(seed) if rule == "random" else None

    def token_mask(self, chunk_ids: Tensor) -> Tensor:
        """bool [B, S]: True at the position before each chosen label, the one that predicts it."""
        scores = self.last_loss[chunk_ids]
        if self.random is not None:
            scores = torch.rand(scores.shape, generator=self.random)
        best = scores[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, : self.kept]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)

    def observe(self, chunk_ids: Tensor, token_loss: Tensor, counted: Tensor) -> None:
        """Labels that were not counted keep the loss they had."""
        self.last_loss[chunk_ids] = torch.where(counted, token_loss, self.last_loss[chunk_ids])


class Run:
    """A model in training as it is, and what that has cost so far."""

    name = "dense"

    def __init__(self, model: nn.Module, compiled: Callable[..., Any], steps: int) -> None:
        self.model = model
        self.compiled = compiled
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, PEAK_LR, steps, pct_start=0.1, cycle_momentum=False
        )
        self.seconds: dict[int, list[float]] = defaultdict(list)
        self.labels = self.decoder_tokens = 0
        self.compile_s = 0.0

    def loss(self, ids: Tensor, chunk_ids: Tensor, at_pass: int) -> Tensor:
        """The loss of one batch; counts its tokens."""
        self.labels += ids[:, 1:].numel()
        self.decoder_tokens += ids.numel()
        return self.compiled(input_ids=ids, labels=ids, use_cache=False).loss

    def compile(self, ids: Tensor, chunk_ids: Tensor) -> None:
        """Run a batch of the first and of the second pass without an update, to time compilation apart."""
        start = time.perf_counter()
        for at_pass in (0, 1):
            self.loss(ids, chunk_ids, at_pass).backward()
        self.compile_s = time.perf_counter() - start
        self.optimizer.zero_grad()
        self.labels = self.decoder_tokens = 0

    def step(self, ids: Tensor, chunk_ids: Tensor, at_pass: int) -> float:
        """One update; returns the loss of the batch."""
        start = time.perf_counter()
        loss = self.loss(ids, chunk_ids, at_pass)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.seconds[at_pass].append(time.perf_counter() - start)
        return loss.item()

    @torch.no_grad()
    def held_out_loss(self, chunks: Tensor) -> float:
        """Mean loss per label, all tokens computed: without a token mask the model is the untouched one."""
        self.model.eval()
        losses = [self.model(input_ids=ids, labels=ids).loss for ids in chunks.split(1)]
        self.model.train()
        return torch.stack(losses).mean().item()


class GatedRun(Run):
    """The same model computing the chosen tokens only, once it has seen them all."""

    name = "gated"

    def __init__(self, gated: nn.Module, choice: LabelChoice, steps: int) -> None:
        super().__init__(gated, gated, steps)
        self.choice = choice

    def loss(self, ids: Tensor, chunk_ids: Tensor, at_pass: int) -> Tensor:
        """As for the dense run; also remembers the loss of each label that was computed."""
        mask = torch.ones_like(ids, dtype=torch.bool) if at_pass == 0 else self.choice.token_mask(chunk_ids)
        out = self.compiled(input_ids=ids, labels=ids, token_mask=mask, use_cache=False)
        self.choice.observe(chunk_ids, out.token_loss.detach(), out.counted)
        self.labels += int(out.counted.sum())
        self.decoder_tokens += int(mask.sum())
        return out.loss


def train(runs: list[Run], chunks: Tensor, args: argparse.Namespace, console: Console) -> None:
    """Take each batch through both runs before the next one, so that both meet the same machine."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss of the batch {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    generator = torch.Generator().manual_seed(args.seed)
    with Progress(*columns, console=console) as progress:
        for at_pass in range(args.passes):
            batches = torch.randperm(len(chunks), generator=generator).split(BATCH)
            tasks = [
                progress.add_task(f"pass {at_pass + 1} {run.name}", total=len(batches), loss=math.nan)
                for run in runs
            ]
            for chunk_ids in batches:
                for run, task in zip(runs, tasks, strict=True):
                    progress.update(task, advance=1, loss=run.step(chunks[chunk_ids], chunk_ids, at_pass))


def comparison(runs: list[Run], before: list[float], after: list[float]) -> Table:
    table = Table("", *(run.name for run in runs), "gated / dense", title="Same text, weights and batches")
    for column in table.columns[1:]:
        column.justify = "right"

    def compare(what: str, form: str, dense: float, gated: float) -> None:
        table.add_row(what, form.format(dense), form.format(gated), f"{gated / dense:.3f}")

    def step_ms(run: Run, passes: Iterable[int]) -> float:
        return 1e3 * median(seconds for at_pass in passes for seconds in run.seconds[at_pass])

    compare("held-out loss before training", "{:.3f}", *before)
    compare("held-out loss after training", "{:.3f}", *after)
    compare("label tokens trained on", "{:,}", *(run.labels for run in runs))
    compare("decoder tokens computed", "{:,}", *(run.decoder_tokens for run in runs))
    compare("median step, first pass", "{:.0f} ms", *(step_ms(run, [0]) for run in runs))
    compare("median step, later passes", "{:.0f} ms", *(step_ms(run, list(run.seconds)[1:]) for run in runs))
    compare("time of all steps", "{:.1f} s", *(sum(map(sum, run.seconds.values())) for run in runs))
    compare("compile time, apart", "{:.1f} s", *(run.compile_s for run in runs))
    return table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="set 2 layers, 128 chunks and 3 passes")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=384, help="chunks of training text, at the most")
    parser.add_argument("--passes", type=int, default=4, help="passes over the training text, two or more")
    parser.add_argument(
        "--keep", type=float, default=0.5, help="share of the labels kept after the first pass"
    )
    parser.add_argument(
        "--rule", default="random", choices=("random", "hardest"), help="which labels are kept"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="inductor", help="inductor, aot_eager or eager")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.chunks, args.passes = 2, 128, 3
    if args.passes < 2 or not 0 < args.keep <= 1:
        parser.error("--passes must be at least 2, --keep above 0 and at most 1")
    return args


def main() -> None:
    args = parse_arguments()
    console = Console()
    stream = tokenize(read_topics())
    held_out = stream[9::10]
    chunks = stream[torch.arange(len(stream)) % 10 != 9][: args.chunks]
    console.print(
        f"{chunks.numel():,} tokens to train on, {held_out.numel():,} held out, {args.layers} layers"
    )

    torch.manual_seed(args.seed)
    dense = small_llama(args.layers)
    gated = regate_fx.compile(copy.deepcopy(dense), backend=args.backend)
    steps = args.passes * math.ceil(len(chunks) / BATCH)
    runs = [
        Run(dense, torch.compile(dense, backend=args.backend), steps),
        GatedRun(gated, LabelChoice(chunks, args.keep, args.rule, args.seed), steps),
    ]
    before = [run.held_out_loss(held_out) for run in runs]
    for run in runs:
        with console.status(f"compiling {run.name}"):
            run.compile(chunks[:BATCH], torch.arange(BATCH))
    train(runs, chunks, args, console)
    after = [run.held_out_loss(held_out) for run in runs]
    console.print(comparison(runs, before, after))


if __name__ == "__main__":
    main()
