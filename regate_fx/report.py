"""What happened to each decoder layer, what it saves, and how that prints.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from regate_fx.errors import LayerRefusal

# Forward, and in the backward one product for the gradient of each factor.
TRAINING_STEP = 3


@dataclass(frozen=True)
class Cost:
    """Estimated forward FLOPs: of the untouched model, and of the gated one."""

    dense: int
    gated: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.dense + other.dense, self.gated + other.gated)

    @property
    def saved(self) -> float:
        """The share of the untouched model's FLOPs that gating saves; the same in a training step."""
        return 1 - self.gated / self.dense if self.dense else 0.0

    @property
    def training_step(self) -> Cost:
        """Forward and backward, all parameters being trained: three times the forward."""
        return Cost(TRAINING_STEP * self.dense, TRAINING_STEP * self.gated)


NO_COST = Cost(0, 0)


@dataclass(frozen=True)
class BatchTokens:
    """How many positions each sample has: `length` = S with padding, `real` without it, and `active`."""

    length: int
    real: tuple[int, ...]
    active: tuple[int, ...]

    @property
    def active_share(self) -> float:
        """Active positions among those that are no padding."""
        return sum(self.active) / max(sum(self.real), 1)

    @property
    def padding(self) -> int:
        return self.length * len(self.real) - sum(self.real)


@dataclass(frozen=True)
class Bucket:
    """What rounding the number of rows up to multiples of `multiple` has cost in all calls so far.

    active: rows computed that are an active position's; filling: those that are none's.
    """

    multiple: int
    active: int
    filling: int

    @property
    def share(self) -> float:
        """Rows computed for nothing among all computed."""
        return self.filling / max(self.active + self.filling, 1)


@dataclass(frozen=True)
class Expectation:
    """What `explain` assumes of training.

    output_share: labelled tokens among all that are no padding; `origin` says in words where it comes from.
    keep: the share of the labelled tokens that is kept.
    """

    keep: float
    output_share: float
    origin: str

    @property
    def active_share(self) -> float:
        return 1 - self.output_share * (1 - self.keep)


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer.

    kind: "varlen" (attention as one variable-length operator), "compact" (attention over slots, exact
    and somewhat slower) or "dense" (not gated: every position is computed). `attention` says what its
    queries see and how that is known. `reason` says why a layer is not "varlen"; `source` is the model
    line it comes from. `cost` is for the batch of the report.
    """

    index: int
    kind: str
    attention: str
    reason: str = ""
    source: str = ""
    cost: Cost = NO_COST


@dataclass
class Report:
    """The compiled model, layer by layer; prints as a table.

    traces:    graphs with decoder layers that were compiled so far.
    seconds:   time spent per pass, all traces together.
    refusals:  why the model, or a whole part of it, stayed dense.
    batch:     the call that the FLOPs are for: the last one, or the one given to `explain`.
    before:    cost of what is computed before the layers or beside them; `head`: of what follows them.
    uncounted: products left out of the FLOPs because their size depends on data.
    fused_loss: the head and the losses are computed by chunks of rows, without logits of all active ones.
    expected:  in a report from `explain`, what it assumes of training.
    bucket:    what rounding the number of rows up has cost so far; None where it is not rounded.
    fallback:  calls with a token mask run the untouched model (`strict=False`).
    validation: what the first call that could train was compared with, or why it was not; empty before it.
    cost_of:   estimated forward FLOPs of any other batch, as `cost` is for `batch`; None without a captured graph.
    """

    layers: list[LayerReport] = field(default_factory=list)
    refusals: list[LayerRefusal] = field(default_factory=list)
    traces: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    batch: BatchTokens | None = None
    before: Cost = NO_COST
    head: Cost = NO_COST
    uncounted: int = 0
    fused_loss: bool = False
    expected: Expectation | None = None
    bucket: Bucket | None = None
    fallback: bool = False
    validation: str = ""
    cost_of: Callable[[BatchTokens], Cost] | None = field(default=None, repr=False, compare=False)

    @property
    def gated(self) -> int:
        """How many layers compute active tokens only."""
        return sum(layer.kind != "dense" for layer in self.layers)

    @property
    def active_share(self) -> float | None:
        """Active positions among those that are no padding; in a report from `explain`, what to expect."""
        if self.expected is not None:
            return self.expected.active_share
        return self.batch.active_share if self.batch is not None else None

    @property
    def cost(self) -> Cost:
        """Estimated forward FLOPs of the whole model."""
        return sum((layer.cost for layer in self.layers), start=self.before + self.head)

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers and strings, for JSON. FLOPs are of one forward."""

        return {
            "gated_layers": self.gated,
            "active_share": self.active_share,
            "expected": self.expected and asdict(self.expected),
            "batch": self.batch and asdict(self.batch),
            "flops": asdict(self.cost) | {"saved": self.cost.saved, "uncounted_products": self.uncounted},
            "before": asdict(self.before),
            "layers": [asdict(layer) for layer in self.layers],
            "head": asdict(self.head),
            "fused_loss": self.fused_loss,
            "bucket": self.bucket and asdict(self.bucket) | {"share": self.bucket.share},
            "refusals": [str(refusal) for refusal in self.refusals],
            "fallback": self.fallback,
            "validation": self.validation,
            "traces": self.traces,
            "seconds": self.seconds,
        }

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [Text(_headline(self), style="bold")]
        if self.layers:
            parts.append(_table(self))
        return Group(*parts, *(Text(line) for line in _lines(self)))

    def __str__(self) -> str:
        """The table as plain text, as wide as the terminal (or COLUMNS)."""
        console = Console(file=io.StringIO(), width=Console().width, color_system=None)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip("\n")


_STYLES = {"varlen": "green", "compact": "yellow", "dense": "red"}


def _headline(report: Report) -> str:
    if not report.gated:
        return "Nothing in this model can be gated."
    counts = ((kind, sum(layer.kind == kind for layer in report.layers)) for kind in _STYLES)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts if count)
    return f"{report.gated} of {len(report.layers)} layers gated: {kinds}"


def _table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("attention", overflow="fold", ratio=1)
    for name in ("dense", "gated", "saved", "note"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = _notes(report)
    if report.before.dense:
        table.add_row("before", "dense", "", *_figures(report.before), "")
    for layer in report.layers:
        note = notes.index(_note(layer)) + 1 if layer.reason else ""
        kind = Text(layer.kind, style=_STYLES[layer.kind])
        table.add_row(str(layer.index), kind, layer.attention, *_figures(layer.cost), str(note))
    if report.head.dense:
        where = "dense" if report.head.gated == report.head.dense else "rows"
        table.add_row("head", where, "", *_figures(report.head), "")
    if report.cost.dense:
        table.add_section()
        table.add_row("all", "", "forward FLOPs (estimated)", *_figures(report.cost), "", style="bold")
    return table


def _figures(cost: Cost) -> tuple[str, str, str]:
    return si(cost.dense), si(cost.gated), f"{cost.saved:.1%}"


def si(number: float) -> str:
    """A number of operations with three digits and a prefix: 1.23 G."""
    prefixes = iter(" kMGTPEZ")
    prefix = next(prefixes)
    while number >= 999.5:
        number, prefix = number / 1000, next(prefixes)
    return f"{number:.3g} {prefix}".rstrip()


def _note(layer: LayerReport) -> str:
    where = f" [{layer.source}]" if layer.source else ""
    return f"{layer.kind}: {layer.reason}{where}"


def _notes(report: Report) -> list[str]:
    return list(dict.fromkeys(_note(layer) for layer in report.layers if layer.reason))


def _lines(report: Report) -> Iterator[str]:
    for number, note in enumerate(_notes(report), 1):
        yield f"{number}) {note}"
    for refusal in report.refusals:
        yield str(refusal)
    if report.fallback:
        yield "Calls with a token mask run the untouched model (strict=False)."
    if report.fused_loss:
        yield "Head and losses are computed by chunks of rows: the logits of all active rows never exist."
    yield from _share_lines(report)
    if report.bucket is not None:
        bucket = report.bucket
        yield (
            f"Rows are filled up to multiples of {bucket.multiple}: {bucket.share:.1%} of the rows computed so far "
            f"are no token's, at most {bucket.multiple - 1} of a call."
        )
    if report.uncounted:
        yield f"{report.uncounted} products whose size depends on data are not counted."
    if report.validation:
        yield f"{report.validation}."
    if report.seconds:
        slowest = max(report.seconds, key=report.seconds.__getitem__)
        yield (
            f"{report.traces} graph{'s' * (report.traces != 1)} compiled; passes took "
            f"{sum(report.seconds.values()):.2f} s, of it {slowest} {report.seconds[slowest]:.2f} s."
        )


def _share_lines(report: Report) -> Iterator[str]:
    if report.batch is None or not report.gated:
        return
    if report.expected is None:
        active, real = sum(report.batch.active), sum(report.batch.real)
        yield f"Active share in the last call: {report.active_share:.1%} ({active} of {real} tokens)."
    else:
        expected = report.expected
        yield (
            f"Expected active share: {expected.active_share:.1%} = 1 - {expected.output_share:.3g} x "
            f"(1 - {expected.keep:.3g}); output share {expected.origin}."
        )
    if report.batch.padding:
        yield (
            f"{report.batch.padding} positions are padding, which the untouched model computes and a gated "
            "one never does; that is part of what is saved."
        )
    if report.cost.dense:
        step = report.cost.training_step
        yield (
            f"A training step of all parameters is about {TRAINING_STEP} x forward: {si(step.dense)} dense, "
            f"{si(step.gated)} gated, {report.cost.saved:.1%} saved. Counted are matrix products, "
            "convolutions and attention over all pairs."
        )
