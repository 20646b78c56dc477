"""Show statistics and samples in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from regate_fx.inspection.statistics import QUANTILES, Extreme, Spread
from regate_fx.inspection.tokens import SampleView, Standing, TokenView

# From indifferent to what the text does not tell; black on each of them is legible.
_HEAT = ("#f2f2f2", "#fde8c8", "#fdd49e", "#fdbb84", "#fc8d59", "#ef6548")
_ALWAYS = (Standing.PROMPT, Standing.VISUAL)
_AROUND_THE_CUT = 5


def spread_table(spreads: Mapping[str, Spread], note: str) -> Table:
    """How several values are spread, side by side."""
    shown = Table(title="All labels", title_justify="left", caption=note, caption_justify="left")
    shown.add_column("")
    for name in spreads:
        shown.add_column(name, justify="right")
    shown.add_row("labels", *(f"{spread.count:,}" for spread in spreads.values()))
    shown.add_row("known", *(_share(spread) for spread in spreads.values()))
    shown.add_row("mean", *(number(spread.mean if spread.known else None) for spread in spreads.values()))
    for index, quantile in enumerate(QUANTILES):
        name = {0.0: "lowest", 0.5: "median", 1.0: "highest"}.get(quantile, f"{quantile:.0%} lie below")
        shown.add_row(
            name, *(number(spread.quantiles[index] if spread.known else None) for spread in spreads.values())
        )
    return shown


def _share(spread: Spread) -> str:
    return f"{spread.known / spread.count:.1%}" if spread.count else ""


def histogram(name: str, spread: Spread, width: int = 40) -> Table:
    """One bar for each bin; the outer ones take in what lies beyond the 1st and 99th percentile."""
    shown = Table(title=name.capitalize(), title_justify="left", show_header=False, box=None, padding=(0, 1))
    shown.add_column(justify="right", style="dim")
    shown.add_column()
    shown.add_column(justify="right", style="dim")
    highest = max(spread.heights, default=0)
    for low, height in zip(spread.edges, spread.heights, strict=False):
        shown.add_row(number(low), "█" * max(round(width * height / highest), int(height > 0)), f"{height:,}")
    return shown


def extremes_table(extremes: Sequence[Extreme]) -> Table:
    """Single labels or tokens, in the order given."""
    shown = Table()
    shown.add_column("label")
    for name in ("times", "teacher", "student", "excess"):
        shown.add_column(name, justify="right")
    for extreme in extremes:
        values = extreme.reference, extreme.ema, extreme.ema - extreme.reference
        cells = (number(None if value != value else value) for value in values)
        shown.add_row(Text(visible(extreme.name)), str(extreme.count), *cells)
    return shown


def sample_panel(view: SampleView) -> RenderableType:
    """A sample as text, coloured by the teacher's loss, and the labels on both sides of the cut."""
    highest = scale([view])
    title = Text(f"Sample {view.sample_id}", style="bold")
    title.append(f"  {summary(view)}", style="not bold")
    text = Text()
    for standing, run in groupby(view.tokens, key=lambda token: token.standing):
        tokens = list(run)
        if standing in _ALWAYS:
            text.append(f" [{counted(tokens, standing)}] ", style="dim italic")
            continue
        for token in tokens:
            _append(text, token, highest)
    return Group(title, text, _legend(highest), *_cut_table(view))


def _append(text: Text, token: TokenView, highest: float) -> None:
    shown = visible(token.text)
    dropped = token.standing is Standing.DROPPED
    text.append(f"⟦{shown}⟧" if dropped else shown, style=_style(token.reference, highest, dropped))


def _style(reference: float | None, highest: float, dropped: bool) -> Style:
    level = min(int(heat(reference, highest) * len(_HEAT)), len(_HEAT) - 1)
    return Style(color="#000000", bgcolor=_HEAT[level], strike=dropped)


def _legend(highest: float) -> Text:
    text = Text("teacher's loss ", style="dim")
    for index, colour in enumerate(_HEAT):
        text.append(f" {index * highest / len(_HEAT):.1f} ", style=Style(color="#000000", bgcolor=colour))
    text.append(" and more; ⟦dropped⟧", style="dim")
    return text


def _cut_table(view: SampleView) -> Iterator[RenderableType]:
    ranked = sorted((token for token in view.tokens if token.rank), key=lambda token: token.rank or 0)
    near = ranked[max(view.kept - _AROUND_THE_CUT, 0) : view.kept + _AROUND_THE_CUT]
    if not near:
        return
    told = any(token.counted is not None for token in near)
    title = "Where the share ends" + ("" if told else ", if every label competed")
    shown = Table(title=title, title_justify="left")
    for name in ("rank", "position", "token", "teacher", "student", "score", ""):
        shown.add_column(name, justify="left" if name in ("token", "") else "right")
    for token in near:
        values = number(token.reference), number(token.ema), number(token.score)
        cells = (str(token.rank), str(token.position), Text(visible(token.text)), *values)
        shown.add_row(*cells, "" if token.standing is Standing.LABEL else str(token.standing))
        if token.rank == view.kept:
            shown.add_section()
    yield shown


def summary(view: SampleView) -> str:
    """What was kept of a sample, in a line."""
    if view.tokens and all(token.standing is Standing.LABEL for token in view.tokens):
        kept = "which labels compete and are kept can be told with the data set"
    else:
        kept = f"{view.kept} of the {view.competing} labels that compete are kept"
    return f"policy {view.policy}, share {view.keep:g}: {kept}"


def counted(tokens: Sequence[TokenView], standing: Standing) -> str:
    """A stretch of tokens without labels, in words."""
    return f"{len(tokens)} {standing} token{'s' if len(tokens) > 1 else ''}"


def scale(views: Sequence[SampleView]) -> float:
    """The loss that gets the strongest colour: nine tenths of the labels shown lie below it."""
    losses = sorted(token.reference for view in views for token in view.labels if token.reference is not None)
    return losses[int(0.9 * (len(losses) - 1))] or 1.0 if losses else 1.0


def heat(reference: float | None, highest: float) -> float:
    """Between 0 and 1."""
    return 0.0 if reference is None else min(reference / highest, 1.0)


def visible(text: str) -> str:
    """Text in which control characters are seen."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in shown)


def number(value: float | None) -> str:
    """A loss or score; nothing for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) >= 1000 else f"{value:.3f}"
