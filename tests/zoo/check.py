"""Gate one architecture and compare it with the oracle, on several batches; what came out is a `Row`.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from comparison import Comparison, Outcome, compare
from entries import Built, Entry, NotBuilt, build
from oracle import NO_LABEL, Unmasked, check_elided_is_unseen, is_shifted, run_masked
from oracles import _AllInFloat64, _forget_gradients, _gradients
from pictures import PictureBatch, picture_batch
from shrink import PAD, WORDS
from small_models import Batch, Side
from torch import nn

import regate_fx
from regate_fx.errors import RegateError

LOOSE = 3e-4  # of the size: what float32 may be off where the untouched model happens to be closer


@dataclass
class Row:
    """What is known of one architecture.

    pictures: "seen", or why a vision-language model got none.
    status: "right" (equal to an oracle), "wrong", "refused" (by a typed error), "crashed", "not built". kinds: how
    many layers are varlen, compact and dense. oracle: what it was compared with. reason: of a status that is not
    "right", or of layers that are not varlen.
    """

    mapping: str
    model_type: str
    status: str
    kinds: dict[str, int] = field(default_factory=dict)
    oracle: str = ""
    reason: str = ""
    graphs: int = 0
    traces: int = 0
    batches: int = 0
    worst: float = 0.0
    pictures: str = ""
    seconds: float = 0.0


def check(entry: Entry, batches: int | None = None) -> Row:
    """Gate the architecture and compare it. Raises nothing."""
    row = Row(entry.mapping, entry.model_type, "crashed")
    started = time.perf_counter()
    torch.manual_seed(0)
    try:
        _check(entry, row, batches)
    except NotBuilt as error:
        row.status, row.reason = "not built", str(error)
    except RegateError as error:
        row.status, row.reason = "refused", _first_lines(error)
    except AssertionError as error:
        row.status, row.reason = "wrong", _first_lines(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        row.reason = f"{type(error).__name__}: {_first_lines(error)} ({where})"
    row.seconds = round(time.perf_counter() - started, 1)
    return row


def _first_lines(error: Exception, count: int = 4) -> str:
    return " | ".join(line.strip() for line in str(error).splitlines()[:count])


def _check(entry: Entry, row: Row, batches: int | None) -> None:
    built = build(entry)
    model = built.model
    row.pictures = built.without_pictures if built.pictures is None else "seen"
    generator = torch.Generator().manual_seed(1)
    row.reason = "the untouched model cannot be run"
    gated = regate_fx.compile(model, backend="eager", validate=False)
    oracle: _Oracle | None = None
    for name, batch in itertools.islice(_batches(built, generator), batches):
        seen = _observe(gated, batch)
        _note_report(gated, row)
        if oracle is None:
            oracle = _Oracle(model, batch, gated)
            row.oracle = oracle.name
        oracle.compare(seen, batch, name, row)
        row.batches += 1
    row.status = "right"


def _note_report(gated: Any, row: Row) -> None:
    report = gated.report
    row.kinds = dict(Counter(layer.kind for layer in report.layers))
    reasons = dict.fromkeys(
        f"{layer.kind}: {layer.reason} [{layer.source}]" for layer in report.layers if layer.reason
    )
    row.reason = " | ".join(reasons)
    row.traces, row.graphs = report.traces, gated._regate.engine.captures.graphs


def _batches(built: Built, generator: torch.Generator) -> Iterator[tuple[str, Batch]]:
    model = built.model
    if built.pictures is not None:
        yield "pictures", picture_batch(model, built.pictures, generator, "right")
        yield "pictures, left padding", picture_batch(model, built.pictures, generator, "left")
    if not built.on_text:
        return
    yield "right padding", text_batch(generator, 3, 11, "right")
    yield "left padding", text_batch(generator, 2, 13, "left")
    yield "no mask", text_batch(generator, 4, 9, None)
    embedded = text_batch(generator, 3, 10, "right", share=0.3)
    embeddings = model.get_input_embeddings()(embedded.input_ids).detach()
    if _takes_embeddings(model, embedded, embeddings):
        yield "inputs_embeds", replace(embedded, inputs_embeds=embeddings.requires_grad_())


def _takes_embeddings(model: nn.Module, batch: Batch, embeddings: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            model(inputs_embeds=embeddings, attention_mask=batch.attention_mask, labels=batch.labels)
    except Exception:
        return False
    return True


def text_batch(generator: torch.Generator, B: int, S: int, padding: Side, share: float = 0.6) -> Batch:
    """Random words, lengths, mask and labels; most labels are there."""
    index = torch.arange(S).expand(B, S)
    lengths = torch.randint(S // 2 + 1, S + 1, (B, 1), generator=generator)
    lengths[0] = S
    real = torch.ones(B, S, dtype=torch.bool)
    if padding is not None:
        real = index < lengths if padding == "right" else index >= S - lengths
    ids = torch.randint(WORDS.start, WORDS.stop, (B, S), generator=generator)
    without = torch.rand(B, S, generator=generator) < 0.2
    mask = torch.rand(B, S, generator=generator) < share
    mask[0, S // 2] = True
    return Batch(
        input_ids=ids.masked_fill(~real, PAD),
        attention_mask=None if padding is None else real.long(),
        labels=ids.masked_fill(without | ~real, NO_LABEL),
        token_mask=mask,
    )


def _observe(gated: nn.Module, batch: Batch) -> Outcome:
    _forget_gradients(gated, batch)
    out = gated(**batch.model_inputs(), labels=batch.labels, token_mask=batch.token_mask)
    out.loss.backward()
    return Outcome(out.loss.detach(), out.token_loss.detach(), out.counted, _gradients(gated, batch))


class _Oracle:
    """The oracle that holds for a model, chosen by what the untouched model does."""

    name: str

    def __init__(self, model: nn.Module, batch: Batch, gated: Any) -> None:
        self.model = model
        self.gated_modules: Sequence[nn.Module] = ()
        self.shifted = True
        self._reference: nn.Module | None = None
        try:
            self.name = self._find(gated.report.layers, batch)
        except Unmasked as reason:
            self.gated_modules = ()
            # It shares the capture with what it is compared with: what it says is said apart.
            self._reference = regate_fx.compile(model, backend="eager", validate=False, reference=True)
            self.name = f"dense reference only: {reason}"

    def _find(self, layers: Sequence[Any], batch: Batch) -> str:
        self.shifted = is_shifted(self.model, batch)
        if not any(layer.kind == "dense" for layer in layers):
            check_elided_is_unseen(self.model, batch, WORDS)
            return "masks replaced"
        modules = _decoder_layers(self.model, len(layers))
        if modules is None:
            raise Unmasked("which modules its layers are is not known")
        self.gated_modules = [m for m, layer in zip(modules, layers, strict=True) if layer.kind != "dense"]
        run_masked(self.model, batch, self.shifted, self.gated_modules)
        return "masks replaced, elided states held"

    def compare(self, seen: Outcome, batch: Batch, name: str, row: Row) -> None:
        if self._reference is not None:
            self._compare_with_reference(seen, batch, name, row)
            return
        if batch.attention_mask is None:
            batch = replace(batch, attention_mask=torch.ones_like(batch.input_ids))
        baseline = run_masked(self.model, batch, self.shifted, self.gated_modules)
        _judge(compare(seen, baseline, self._golden(batch), batch.active), name, row)

    def _compare_with_reference(self, seen: Outcome, batch: Batch, name: str, row: Row) -> None:
        assert self._reference is not None
        _forget_gradients(self._reference, batch)
        out = self._reference(**batch.model_inputs(), labels=batch.labels, token_mask=batch.token_mask)
        out.loss.backward()
        found = replace(seen, loss=out.loss.detach(), gradients=_gradients(self._reference, batch))
        _judge(compare(seen, found, found, batch.active), name, row)

    def _golden(self, batch: Batch) -> Outcome:
        precise = copy.deepcopy(self.model).double()
        if hasattr(precise, "set_experts_implementation"):
            with contextlib.suppress(Exception):
                precise.set_experts_implementation("eager")
        if batch.inputs_embeds is not None:
            batch = replace(batch, inputs_embeds=batch.inputs_embeds.detach().double().requires_grad_())
        if isinstance(batch, PictureBatch):
            batch = batch.double()
        paths = {id(module): path for path, module in self.model.named_modules()}
        held = [precise.get_submodule(paths[id(module)]) for module in self.gated_modules]
        try:
            with _AllInFloat64():
                return run_masked(precise, batch, self.shifted, held)
        except RuntimeError:
            return run_masked(self.model, replace(batch), self.shifted, self.gated_modules)


def _judge(comparison: Comparison, name: str, row: Row) -> None:
    # Of a gradient that all but cancels, rounding is a large part: all gradients together are the measure.
    relative = [d.error / max(d.size, d.overall, 1e-30) for d in comparison.deviations]
    row.worst = max([row.worst, *relative])
    loose = [d for d in comparison.deviations if not d.ok and d.error > LOOSE * (d.size + d.overall)]
    if loose or comparison.mismatches:
        comparison.check(name)


def _decoder_layers(model: nn.Module, count: int) -> Sequence[nn.Module] | None:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [
        module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return list(lists[0]) if lists else None
