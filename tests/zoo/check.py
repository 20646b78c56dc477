"""Gate one architecture and compare it with the oracle, on several batches; what came out is a `Row`.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import contextlib
import copy
import functools
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
from oracle import Unmasked, check_elided_is_unseen, is_shifted, run_masked
from oracles import _AllInFloat64, _forget_gradients, _gradients
from pictures import DecoderBatch, PictureBatch
from shrink import WORDS
from small_models import Batch
from text_batches import UserMaskBatch, text_batch
from torch import nn
from ways import NotApplicable, Prepared, applied, default_batches, plainly

import regate_fx
from regate_fx.errors import RegateError


@dataclass
class Row:
    """What is known of one architecture.

    pictures: "seen", or why a vision-language model got none. way: in which it was run, empty for plainly.
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
    way: str = ""
    seconds: float = 0.0


def check(entry: Entry, batches: int | None = None, way: int | None = None) -> Row:
    """Gate the architecture and compare it, run plainly or in the first way from number `way` that applies to it.

    Raises nothing.
    """
    row = Row(entry.mapping, entry.model_type, "crashed")
    started = time.perf_counter()
    torch.manual_seed(0)
    try:
        _check(entry, row, batches, way)
    except (NotBuilt, NotApplicable) as error:
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


def _check(entry: Entry, row: Row, batches: int | None, way: int | None) -> None:
    built = build(entry)
    row.pictures = built.without_pictures if built.pictures is None else "seen"
    if way is None:
        prepared = replace(plainly(built), batches=functools.partial(_with_embeddings, built))
    else:
        row.way, prepared = applied(built, way)
    generator = torch.Generator().manual_seed(1)
    row.reason = "the untouched model cannot be run"
    gated = regate_fx.compile(prepared.model, **{"backend": "eager", "validate": False, **prepared.options})
    oracle: _Oracle | None = None
    for name, batch in itertools.islice(prepared.batches(generator), batches):
        with prepared.around():
            seen = _observe(gated, batch)
        _note_report(gated, row)
        if oracle is None:
            oracle = _Oracle(prepared, batch, gated)
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


def _with_embeddings(built: Built, generator: torch.Generator) -> Iterator[tuple[str, Batch]]:
    """The batches that any model is given, and one of embeddings if it takes them."""
    yield from default_batches(built, generator)
    embedded = text_batch(generator, 3, 10, "right", share=0.3)
    embeddings = built.model.get_input_embeddings()(embedded.input_ids).detach()
    if built.on_text and _takes_embeddings(built.model, embedded, embeddings):
        yield "inputs_embeds", replace(embedded, inputs_embeds=embeddings.requires_grad_())


def _takes_embeddings(model: nn.Module, batch: Batch, embeddings: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            model(inputs_embeds=embeddings, attention_mask=batch.attention_mask, labels=batch.labels)
    except Exception:
        return False
    return True


def _observe(gated: nn.Module, batch: Batch) -> Outcome:
    _forget_gradients(gated, batch)
    out = gated(**batch.model_inputs(), labels=batch.labels, token_mask=batch.token_mask)
    out.loss.backward()
    return Outcome(out.loss.detach(), out.token_loss.detach(), out.counted, _gradients(gated, batch))


class _Oracle:
    """The oracle that holds for a model, chosen by what the untouched model does."""

    name: str

    def __init__(self, prepared: Prepared, batch: Batch, gated: Any) -> None:
        self.prepared = prepared
        self.model = prepared.plain
        self.gated_modules: Sequence[nn.Module] = ()
        self.shifted = True
        self._reference: nn.Module | None = None
        try:
            self.name = self._find(gated.report.layers, batch)
        except Unmasked as reason:
            self.gated_modules = ()
            # It shares the capture with what it is compared with: what it says is said apart.
            self._reference = regate_fx.compile(self.model, backend="eager", validate=False, reference=True)
            self.name = f"dense reference only: {reason}"

    def _find(self, layers: Sequence[Any], batch: Batch) -> str:
        self.shifted = is_shifted(self.model, batch)
        if not any(layer.kind == "dense" for layer in layers):
            check_elided_is_unseen(self.model, batch, WORDS)
            return "masks replaced"
        modules = _decoder_layers(self.model, len(layers))
        if modules is None or isinstance(batch, UserMaskBatch):
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
        with self.prepared.around():
            baseline = run_masked(self.model, batch, self.shifted, self.gated_modules)
        _judge(compare(seen, baseline, self._golden(batch), batch.active), name, row, self.prepared.loose)

    def _compare_with_reference(self, seen: Outcome, batch: Batch, name: str, row: Row) -> None:
        assert self._reference is not None
        _forget_gradients(self._reference, batch)
        with self.prepared.around():
            out = self._reference(**batch.model_inputs(), labels=batch.labels, token_mask=batch.token_mask)
        out.loss.backward()
        found = replace(seen, loss=out.loss.detach(), gradients=_gradients(self._reference, batch))
        _judge(compare(seen, found, found, batch.active), name, row, self.prepared.loose)

    def _golden(self, batch: Batch) -> Outcome:
        precise = copy.deepcopy(self.model).double()
        if hasattr(precise, "set_experts_implementation"):
            with contextlib.suppress(Exception):
                precise.set_experts_implementation("eager")
        doubled = replace(batch)
        if batch.inputs_embeds is not None:
            doubled = replace(batch, inputs_embeds=batch.inputs_embeds.detach().double().requires_grad_())
        if isinstance(doubled, (PictureBatch, DecoderBatch, UserMaskBatch)):
            doubled = doubled.double()
        paths = {id(module): path for path, module in self.model.named_modules()}
        held = [precise.get_submodule(paths[id(module)]) for module in self.gated_modules]
        try:
            with _AllInFloat64():
                return run_masked(precise, doubled, self.shifted, held)
        except RuntimeError:
            return run_masked(self.model, batch, self.shifted, self.gated_modules)


def _judge(comparison: Comparison, name: str, row: Row, loose: float) -> None:
    # Of a gradient that all but cancels, rounding is a large part: all gradients together are the measure.
    relative = [d.error / max(d.size, d.overall, 1e-30) for d in comparison.deviations]
    row.worst = max([row.worst, *relative])
    far = [d for d in comparison.deviations if not d.ok and d.error > loose * (d.size + d.overall)]
    if far or comparison.mismatches:
        comparison.check(name)


def _decoder_layers(model: nn.Module, count: int) -> Sequence[nn.Module] | None:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [
        module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return list(lists[0]) if lists else None
