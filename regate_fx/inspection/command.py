"""What `regate-fx inspect` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.columns import Columns
from rich.console import Console
from rich.progress import track

from regate_fx.errors import InvalidInput, RegateError
from regate_fx.inspection import terminal
from regate_fx.inspection.data import Examples, TokenTexts
from regate_fx.inspection.page import write_page
from regate_fx.inspection.run import GateState, Run, open_run
from regate_fx.inspection.statistics import (
    Labels,
    TokenMeans,
    hardest_and_easiest,
    labels_of,
    spread,
)
from regate_fx.inspection.tokens import SampleView, SampleViewer
from regate_fx.runtime import ReferenceLosses
from regate_fx.runtime.label_table import has_teacher
from regate_fx.runtime.loading import load_collator, load_data, load_processor, named_object

# Of a state that comes without its store, every so many labels are looked at where there are more than these.
_MOST_LABELS = 10_000_000
_TITLES = {
    "reference": "teacher's loss",
    "ema": "student's running mean",
    "excess": "excess, student minus teacher",
}


@dataclass(frozen=True)
class Inspection:
    """What to look at, as the command line names it; see `regate_fx.cli.inspect`."""

    paths: Sequence[Path]
    data: str | None = None
    processor: str | None = None
    collator: str | None = None
    max_length: int | None = None
    split: str = "train"
    number: bool = False
    samples: Sequence[int] = ()
    keep: float | None = None
    policy: str | None = None
    top: int = 10
    limit: int = 1000
    html: Path | None = None

    def show(self, console: Console) -> None:
        """Print everything, and write the page if one is asked for. Raises `InvalidInput` and `StoreMismatch`."""
        run = open_run(self.paths)
        if run.state is not None:
            console.print(f"Checkpoint after {run.state.step:,} optimizer steps.")
        if run.losses is not None:
            self._show_store(run, run.losses, console)
        elif run.state is not None:
            self._show_difficulties(run.state, console)

    def _show_difficulties(self, state: GateState, console: Console) -> None:
        if self.samples or self.html or self.data:
            raise InvalidInput(
                "paths",
                "name no store to look samples up in.",
                "Name its folder beside the checkpoint.",
            )
        student = spread(state.ema[:: max(1, len(state.ema) // _MOST_LABELS)])
        console.print(terminal.spread_table({_TITLES["ema"]: student}, ""))
        console.print(terminal.histogram(_TITLES["ema"], student))

    def _show_store(self, run: Run, losses: ReferenceLosses, console: Console) -> None:
        examples = None
        if self.data is not None:
            examples = Examples(load_data(self.data, self.split, number=self.number))
        processor = None if self.processor is None else load_processor(self.processor)
        texts = TokenTexts(getattr(processor, "tokenizer", processor))
        viewer = self._viewer(run, losses, processor)
        labels = labels_of(losses, None if run.state is None else run.state.ema)
        known = _known(run, losses)
        _show_spreads(labels, known, losses, console)
        means = None if examples is None else self._token_means(viewer, examples, console)
        for by in known:
            if means is None:
                what, ends = "labels", hardest_and_easiest(labels, by, self.top)
            else:
                what, ends = "repeated tokens", means.hardest_and_easiest(by, self.top, texts)
            console.print(f"\nHardest and easiest {what} by {_TITLES[by]}", style="bold")
            console.print(Columns([terminal.extremes_table(extremes) for extremes in ends]))
        chosen = dict.fromkeys(self.samples or losses.ids[:1].tolist())
        views = [_view(viewer, examples, texts, sample_id) for sample_id in chosen]
        for view in views:
            console.print(terminal.sample_panel(view))
        if self.html is not None:
            write_page(self.html, views, "Which tokens were kept, and why")
            console.print(f"Page: {self.html}")

    def _viewer(self, run: Run, losses: ReferenceLosses, processor: Any) -> SampleViewer:
        collator = None
        if self.collator is not None or processor is not None:
            collator = load_collator(self.collator, processor, self.max_length)
        policy = self.policy
        if policy is not None and ":" in policy:
            policy = named_object("policy", policy)
        return SampleViewer(run, losses, keep=self.keep, policy=policy, collator=collator)

    def _token_means(self, viewer: SampleViewer, examples: Examples, console: Console) -> TokenMeans:
        means = TokenMeans()
        chosen = examples.ids[: self.limit]
        for sample_id in track(chosen, "reading the data", console=console, transient=True):
            means.add(*viewer.label_signals(examples.of(sample_id)))
        return means


def run(inspection: Inspection) -> None:
    """Show it. Raises `typer.Exit` with code 1, its reason printed, for what is refused."""
    try:
        inspection.show(Console())
    except RegateError as error:
        console = Console(stderr=True)
        console.print(f"[bold red]{type(error).__name__}[/] ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _known(run: Run, losses: ReferenceLosses) -> list[str]:
    """Which columns of `Labels` tell anything."""
    by_run = {"reference": has_teacher(losses), "ema": run.state is not None}
    return [*(name for name, known in by_run.items() if known), *(["excess"] if all(by_run.values()) else [])]


def _show_spreads(labels: Labels, known: Sequence[str], losses: ReferenceLosses, console: Console) -> None:
    spreads = {_TITLES[name]: spread(labels.of(name)) for name in known}
    looked_at = len(labels.sample_id.unique())
    note = f"{len(losses):,} samples; numbers from {looked_at:,} of them"
    console.print(terminal.spread_table(spreads, note))
    for title, found in spreads.items():
        console.print(terminal.histogram(title, found))


def _view(viewer: SampleViewer, examples: Examples | None, texts: TokenTexts, sample_id: int) -> SampleView:
    return viewer.bare(sample_id) if examples is None else viewer.whole(examples.of(sample_id), texts)
