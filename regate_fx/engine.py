"""The engine behind a gated model: capture, validation, report, and what to do where nothing can be gated.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from regate_fx.backend import Captures
from regate_fx.capture import CapturedModel
from regate_fx.errors import NotGateable, Unsupported
from regate_fx.inputs import padding_of
from regate_fx.modes import evaluating
from regate_fx.options import Options
from regate_fx.outputs import GatedOutput
from regate_fx.passes.pipeline import PipelineRun
from regate_fx.plan import TokenPlan
from regate_fx.refusals import of_a_backend
from regate_fx.report import Bucket, Report
from regate_fx.sharded import find_sharding
from regate_fx.single_position import lengthen, shorten
from regate_fx.summary import all_dense, batch_tokens, summarise
from regate_fx.symbols import by_position
from regate_fx.validation import NOT_RUN, NOT_VALIDATED, SHARDED, VALIDATED, is_random, validate
from regate_fx.waiting import Waiting

logger = logging.getLogger("regate_fx")


@dataclass
class GatedEngine:
    """Computes gated calls of one model: captured once, reused for every batch shape and every mask."""

    model: nn.Module
    options: Options = field(default_factory=Options)
    waiting: Waiting = field(default_factory=Waiting, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.validation: str | None = None
        self._checked_runs: list[PipelineRun] = []
        self._told: set[str] = set()
        self._weakest = VALIDATED
        self._is_apart = False
        self._refusal: NotGateable | None = None
        self._captured = CapturedModel(self.model, self.options, self.waiting.tell)

    @property
    def report(self) -> Report | None:
        """Made when asked for, and for the last call: counting its tokens waits for the device."""
        if self._captured.last is None:
            return None
        tokens = batch_tokens(*self._captured.last)
        if self._refusal is not None:
            report = all_dense(summarise(self.captures, self.captures.runs, tokens), self._refusal.refusals)
            report.fallback = True
            return report
        report = summarise(self.captures, self._captured.graphs, tokens)
        report.validation = self.validation or ""
        if self.options.bucket is not None:
            rows = self._captured.rows
            report.bucket = Bucket(self.options.bucket, rows.active, rows.filling)
        return report

    @property
    def captures(self) -> Captures:
        return self._captured.captures

    def check_captures(self, labelled: bool) -> None:
        """Raise `NotGateable` where what was captured so far is not a gated model."""
        self._captured.check_captures(labelled, self.captures.refusals)

    def fresh(self, model: nn.Module) -> GatedEngine:
        return GatedEngine(model, self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, plan: TokenPlan, inputs: dict[str, Any]) -> Any:
        """One gated call; the untouched model's output where it cannot be gated and `strict` is off.

        Raises `NotGateable` where no layer can be gated, and at the calls that could train the model and run a trace
        for the first time `ValidationFailed` where the compiled graph disagrees with it.
        """
        if self._refusal is None:
            try:
                if self.captures.graphs == 0:
                    self.waiting.tell(f"capturing {type(self.model).__name__}")
                return self._gated(plan, inputs)
            except NotGateable as error:
                # What was gated once stays so: a backend that fails later must not change what is trained.
                if self.options.strict or (of_a_backend(error) and self._captured.rows.active):
                    raise
                self._refusal = error
                logger.warning(
                    "Calls with token_mask run the untouched model from here on: every position is computed, every "
                    "label counts, and there is no token_loss (strict=False). %s",
                    error,
                )
            finally:
                self.waiting.over()
        self._captured.last = plan, padding_of(inputs)
        return self._captured.untouched(plan, inputs)

    def _gated(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput:
        if plan.row_of.shape[1] == 1:
            return shorten(self._once_long(*lengthen(plan, inputs, by_position(inputs))))
        return self._once_long(plan, inputs, is_long=True)

    def _once_long(self, plan: TokenPlan, inputs: dict[str, Any], is_long: bool = False) -> GatedOutput:
        self._find_sharding()
        if not self._may_check(inputs):
            self._captured.first(plan, inputs)
            return self._captured(plan, inputs)
        with self._captured.checking():
            self._captured.first(plan, inputs)
            # A single position rarely has a label to compare; its trace is validated when a longer batch runs it.
            if self._is_validated and not is_long:
                return self._captured(plan, inputs)
            return self._checked(plan, inputs)

    def _may_check(self, inputs: dict[str, Any]) -> bool:
        asked = self.options.validate and not self.options.reference
        can = self._captured.sharding is None or self.validation is None
        return asked and can and torch.is_grad_enabled() and inputs.get("labels") is not None

    def _checked(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput:
        """A gated call that hands out no result of a trace before it was validated, where that can be done."""
        tries = not self._is_validated
        if tries:
            self._validate(inputs)
        output = self._captured(plan, inputs)
        last, ran = self._captured.last, list(self.captures.ran)
        # The first batch may run another trace than its small part: one that is made for a size of one, say.
        if self._unchecked(ran) and not (tries and (self._is_apart or not self._is_validated)):
            self._validate(inputs, own=plan.row_of >= 0)
            self._captured.last = last
        if self._is_validated:
            unchecked = self._unchecked(ran)
            if unchecked and not self._is_apart:
                self._weakest = self._weakest.removesuffix(NOT_RUN) + NOT_RUN
                self._tell(self._weakest)
            self._checked_runs += unchecked
        return output

    @property
    def _is_validated(self) -> bool:
        return self.validation is not None and not self.validation.startswith(NOT_VALIDATED)

    def _unchecked(self, ran: list[PipelineRun]) -> list[PipelineRun]:
        return [run for run in ran if all(run is not checked for checked in self._checked_runs)]

    def _tell(self, outcome: str) -> None:
        self.validation = outcome
        if outcome != VALIDATED and outcome not in self._told:
            self._told.add(outcome)
            logger.warning("%s", outcome)

    def _validate(self, inputs: dict[str, Any], own: Tensor | None = None) -> None:
        """Compare with the untouched model; in eval mode, on a capture of its own, where training mode is random."""
        if self._captured.sharding is not None:
            self._tell(SHARDED)
            return
        self.waiting.tell("comparing with the untouched model")
        gated = self
        ran: list[PipelineRun] = []

        def noting(plan: TokenPlan, batch: dict[str, Any]) -> GatedOutput:
            output = gated._captured(plan, batch)
            ran.extend(gated.captures.ran)
            return output

        with contextlib.ExitStack() as stack:
            self._is_apart = is_random(self.model, inputs, self._captured.untouched)
            if self._is_apart:
                stack.enter_context(evaluating(self.model))
                options = replace(self.options, backend="eager", keep_logits=False)
                gated = GatedEngine(self.model, options, self.waiting)
                gated._captured.has_run = self._captured.has_run
                stack.enter_context(gated._captured.checking())
            outcome = validate(
                self.model, inputs, noting, self._captured.untouched, gated._dense_reference, own,
                sums=lambda: any(run.context.findings["token_sums"].begins for run in ran),
            )  # fmt: skip
        if outcome.startswith(NOT_VALIDATED):
            self._tell(outcome)
            return
        self._checked_runs += self._unchecked(ran)
        if outcome != VALIDATED:
            self._weakest = outcome
        self._tell(self._weakest)

    def _find_sharding(self) -> None:
        self._captured.sharding = find_sharding(self.model, self._captured.sharding)
        if self._captured.sharding is not None and (self.options.scope != "layers" or self.options.reference):
            raise Unsupported(
                "a model with sharded layers in one graph",
                "they hold their parameters only while they run.",
                "Compile it with scope='layers'.",
            )

    def _dense_reference(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput | None:
        """The dense reference of the captured graphs, None where one of them has none."""
        with self._captured.referring():
            try:
                return self._captured(plan, inputs)
            except NotGateable as error:
                if of_a_backend(error):
                    raise
                return None
