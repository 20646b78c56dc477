"""Trace a model together with its token plan, and run what came of it.

Shapes: B samples, S positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, UserError
from torch._dynamo.exc import Unsupported as DynamoUnsupported
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from regate_fx.backend import Captured, Captures, GatingBackend
from regate_fx.dynamo_settings import TRACE_LIMIT, capture_settings
from regate_fx.errors import LayerRefusal, NotGateable, Unsupported
from regate_fx.inputs import own_signature
from regate_fx.live import LivePlan
from regate_fx.modes import evaluating
from regate_fx.outputs import GatedOutput
from regate_fx.passes.base import Refused
from regate_fx.passes.pipeline import PIPELINE, REFERENCE, PipelineRun
from regate_fx.plan import TokenPlan
from regate_fx.report import Report
from regate_fx.sharded import Sharding, find_sharding
from regate_fx.single_position import lengthen, shorten
from regate_fx.summary import batch_tokens, fuller, summarise
from regate_fx.symbols import BY_POSITION, mark_sizes
from regate_fx.validation import NOT_RUN, NOT_VALIDATED, SHARDED, VALIDATED, is_random, undisturbed, validate
from regate_fx.wrapper import original_forward

logger = logging.getLogger("regate_fx")

# What Dynamo raises when the capture needs a size to be a constant that was declared to vary.
_STATIC_SIZES = (UserError, ConstraintViolationError)
# The same, and what it raises where one graph was asked for and the code does not allow it.
_NOT_WHOLE = (*_STATIC_SIZES, DynamoUnsupported, GuardOnDataDependentSymNode)


Scope = Literal["model", "layers"]


@dataclass(frozen=True)
class Options:
    """What `regate_fx.compile` was asked for."""

    backend: str | Callable[..., Any] = "inductor"
    keep_logits: bool = False
    validate: bool = True
    reference: bool = False
    scope: Scope = "model"


@dataclass
class GatedEngine:
    """Computes gated calls of one model: captured once, reused for every batch shape and every mask."""

    model: nn.Module
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        self.validation: str | None = None
        self._checked_runs: list[PipelineRun] = []
        self._told: set[str] = set()
        self._weakest = VALIDATED
        self._is_apart = self._is_checking = False
        self._last: tuple[TokenPlan, Tensor | None] | None = None
        self._live = LivePlan()
        self._sharding: Sharding | None = None
        self._has_run = self._may_run = False
        self._start(whole=True)

    def _start(self, whole: bool) -> None:
        """Forget all captures. whole: expect the model in one graph; else look for the plan in every part of it."""
        self._whole = whole
        passes = REFERENCE if self.options.reference else PIPELINE
        layerwise = self.options.scope == "layers" and not self.options.reference
        self._backend = GatingBackend(
            self.options.backend, passes, whole=whole, referable=self._is_checking, layerwise=layerwise
        )
        self._graphs: list[PipelineRun] = []
        self._runs: dict[frozenset[str], Callable[..., Any]] = {}

    def _run(self, inputs: dict[str, Any]) -> Callable[..., Any]:
        """The traced function for calls with these argument names.

        Each set of names is a trace of its own in any case; apart, no guard looks for an argument that is not there.
        """
        names = frozenset(inputs)
        if names not in self._runs:
            self._runs[names] = torch.compile(
                _own_code(cast(types.FunctionType, _traced)), backend=self._backend, fullgraph=self._whole
            )
        return self._runs[names]

    @functools.cached_property
    def _no_cache(self) -> dict[str, Any]:
        """A gated call has no cache: what it computed of a sequence is not what a later call would need."""
        parameters = own_signature(self.model).parameters.values()
        takes = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        return {"use_cache": False} if takes else {}

    def _with_padding_mask(self, plan: TokenPlan, inputs: dict[str, Any]) -> dict[str, Any]:
        """Say that there is no padding where the caller says nothing.

        Without mask and positions, models look for packed documents in positions they have just made themselves.
        """
        named = own_signature(self.model).parameters
        if "attention_mask" not in named or "position_ids" in inputs or "attention_mask" in inputs:
            return inputs
        return inputs | {"attention_mask": torch.ones_like(plan.row_of)}

    @property
    def report(self) -> Report | None:
        """Made when asked for, and for the last call: counting its tokens waits for the device."""
        if self._last is None:
            return None
        report = summarise(self._backend.captures, self._graphs, batch_tokens(*self._last))
        report.validation = self.validation or ""
        return report

    @property
    def captures(self) -> Captures:
        return self._backend.captures

    def fresh(self, model: nn.Module) -> GatedEngine:
        return replace(self, model=model)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput:
        """One gated call.

        Raises `NotGateable` where no layer can be gated, and at the calls that could train the model and run a trace
        for the first time `ValidationFailed` where the compiled graph disagrees with it.
        """
        if plan.row_of.shape[1] == 1:
            return shorten(self._once_long(*lengthen(plan, inputs, BY_POSITION)))
        return self._once_long(plan, inputs, is_long=True)

    def _once_long(self, plan: TokenPlan, inputs: dict[str, Any], is_long: bool = False) -> GatedOutput:
        self._find_sharding()
        if not self._may_check(inputs):
            self._capture_first(plan, inputs)
            return self._gated(plan, inputs)
        with self._checking():
            self._capture_first(plan, inputs)
            # A single position rarely has a label to compare; its trace is validated when a longer batch runs it.
            if self._is_validated and not is_long:
                return self._gated(plan, inputs)
            return self._checked(plan, inputs)

    def _capture_first(self, plan: TokenPlan, inputs: dict[str, Any]) -> None:
        """Refuse a model that is one graph, and cannot be gated, before anything of it is computed."""
        if self._may_run or not self._whole or self._sharding is not None:
            return
        self._backend.stops = True
        try:
            self._call(plan, inputs)
        except Captured:
            captures = self._backend.captures
            self.check_captures(inputs.get("labels") is not None, captures.refusals)
            self._graphs = fuller(captures.runs, self._graphs)
        except (NotGateable, *_NOT_WHOLE) as error:
            if not self._may_break(error):
                raise
        finally:
            self._backend.stops = False
        self._may_run = True

    def _may_check(self, inputs: dict[str, Any]) -> bool:
        asked = self.options.validate and not self.options.reference
        can = self._sharding is None or self.validation is None
        return asked and can and torch.is_grad_enabled() and inputs.get("labels") is not None

    @contextlib.contextmanager
    def _checking(self) -> Iterator[None]:
        """While active, what is captured keeps what its dense reference takes."""
        self._is_checking = self._backend.referable = True
        try:
            yield
        finally:
            self._is_checking = self._backend.referable = False

    def _checked(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput:
        """A gated call that hands out no result of a trace before it was validated, where that can be done."""
        tries = not self._is_validated
        if tries:
            self._validate(inputs)
        output = self._gated(plan, inputs)
        last, ran = self._last, list(self._backend.captures.ran)
        # The first batch may run another trace than its small part: one that is made for a size of one, say.
        if self._unchecked(ran) and not (tries and (self._is_apart or not self._is_validated)):
            self._validate(inputs, own=plan.row_of >= 0)
            self._last = last
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
        if self._sharding is not None:
            self._tell(SHARDED)
            return
        gated = self
        ran: list[PipelineRun] = []

        def noting(plan: TokenPlan, batch: dict[str, Any]) -> GatedOutput:
            output = gated._gated(plan, batch)
            ran.extend(gated._backend.captures.ran)
            return output

        with contextlib.ExitStack() as stack:
            self._is_apart = is_random(self.model, inputs, self._untouched)
            if self._is_apart:
                stack.enter_context(evaluating(self.model))
                gated = GatedEngine(self.model, replace(self.options, backend="eager", keep_logits=False))
                gated._has_run = self._has_run
                stack.enter_context(gated._checking())
            outcome = validate(self.model, inputs, noting, self._untouched, gated._dense_reference, own)
        if outcome.startswith(NOT_VALIDATED):
            self._tell(outcome)
            return
        self._checked_runs += self._unchecked(ran)
        if outcome != VALIDATED:
            self._weakest = outcome
        self._tell(self._weakest)

    def _find_sharding(self) -> None:
        self._sharding = find_sharding(self.model, self._sharding)
        if self._sharding is not None and (self.options.scope != "layers" or self.options.reference):
            raise Unsupported(
                "a model with sharded layers in one graph",
                "they hold their parameters only while they run.",
                "Compile it with scope='layers'.",
            )

    def _dense_reference(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput | None:
        """The dense reference of the captured graphs, None where one of them has none."""
        with self._backend.referring():
            try:
                return self._gated(plan, inputs)
            except NotGateable:
                return None

    def _untouched(self, plan: TokenPlan, inputs: dict[str, Any]) -> Any:
        output = original_forward(self.model)(**(inputs | self._no_cache))
        self._has_run = True
        return output

    def _gated(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput:
        try:
            return self._call(plan, inputs)
        except (NotGateable, *_NOT_WHOLE) as error:
            # A break in the graph makes a model several graphs: the plan has to enter each, and a size that
            # passes from one to the next is taken for a constant.
            # With sharded layers no code outside the graph may run: it would meet stand-ins of their parameters.
            if not self._whole or self._sharding is not None or not self._may_break(error):
                raise _as_refusal(error) from error
        started = self._whole, self._backend, self._graphs, self._runs
        if not self._has_run:
            # What a model does in its first run only, hooks it installs and tables it fills, breaks no later capture.
            with undisturbed(self.model), torch.no_grad():
                self._untouched(plan, inputs)
            self._start(whole=True)
        else:
            self._start(whole=False)
        try:
            return self._gated(plan, inputs)
        except Exception:
            # The call was wrong, not the capture: the next good one finds it as it was.
            self._whole, self._backend, self._graphs, self._runs = started
            raise

    def _may_break(self, error: Exception) -> bool:
        """Whether several graphs may succeed where one did not: there was none, or it reads numbers from tensors."""
        reads = any(refused.code == "number" for refused in self._backend.captures.refusals)
        return reads or not isinstance(error, NotGateable)

    def _call(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput:
        captures = self._backend.captures
        inputs = self._with_padding_mask(plan, inputs)
        seen = captures.graphs, len(captures.refusals), len(captures.runs)
        ties = mark_sizes(plan, inputs)
        labelled = inputs.get("labels") is not None
        wants_logits = self.options.keep_logits or not labelled
        self._live.enter(plan, inputs)
        captures.ran.clear()
        padding = self._live.attention_mask
        with (
            capture_settings(self._whole),
            self._live.anchored(self.model, not self._whole),
            self._stood_in(),
        ):
            try:
                loss, logits, aux_loss = self._run(inputs)(
                    original_forward(self.model), self._live, inputs | self._no_cache, ties, wants_logits
                )
            except BackendCompilerFailed as error:
                raise error.inner_exception from error
            except FailOnRecompileLimitHit as error:
                raise _too_many_traces() from error
            except RuntimeError as error:
                # What Dynamo says where one graph was asked for while it is switched off.
                if "found no compiled frames" not in str(error):
                    raise
                raise NotGateable(self._why_nothing_ran()) from error
            finally:
                token_loss, counted = self._live.leave()
        self.check_captures(labelled, captures.refusals[seen[1] :])
        if captures.graphs != seen[0]:
            self._graphs = fuller(captures.runs[seen[2] :], self._graphs)
        self._last = plan, padding
        if not labelled or self.options.reference or self._backend.is_referring:
            return GatedOutput(loss=loss, logits=logits)
        return GatedOutput(
            loss=loss, logits=logits, aux_loss=aux_loss, token_loss=token_loss, counted=counted
        )

    @contextlib.contextmanager
    def _stood_in(self) -> Iterator[None]:
        """While active, sharded parameters are replaced by stand-ins, until the captured graph runs."""
        self._backend.sharding = self._sharding
        try:
            with contextlib.nullcontext() if self._sharding is None else self._sharding.captured():
                yield
        finally:
            self._backend.sharding = None

    def check_captures(self, labelled: bool, refused: list[Refused]) -> None:
        """Whether what was captured in this call is gated; a part that was refused must not pass unnoticed."""
        captures = self._backend.captures
        refusals = [refusal.refusal() for refusal in refused if refusal.code != "no-attention"]
        if refusals:
            raise NotGateable(refusals)
        layers = [layer for run in captures.ran for layer in run.context.findings["layers"].layers]
        if all(layer.refused is not None for layer in layers):
            raise NotGateable(self._why_nothing_ran())
        if len(layers) < self._live.depth:
            reason = (
                f"a graph break among the decoder layers hides {self._live.depth - len(layers)} of "
                f"{self._live.depth} from the token plan"
            )
            raise NotGateable([LayerRefusal(None, "graph-break", reason)])
        if labelled and not any(run.context.findings["loss"] for run in captures.ran):
            reason = "the loss is not a cross entropy over the decoder's tokens in one of the captured graphs"
            unproven = summarise(captures, captures.runs).refusals
            raise NotGateable([LayerRefusal(None, "no-loss", reason), *unproven])

    def _why_nothing_ran(self) -> list[LayerRefusal]:
        captures = self._backend.captures
        known = list(summarise(captures, captures.runs).refusals)
        known += [refusal for run in captures.runs for refusal in run.refusals if refusal.layer is not None]
        if known:
            return known
        if captures.graphs == 0:
            reason = "nothing was captured: Dynamo is switched off, or set to run eagerly"
            return [LayerRefusal(None, "no-capture", reason)]
        reason = "the token plan reached no decoder layer that can be gated in a captured graph that ran"
        return [LayerRefusal(None, "no-graph", reason)]


def _too_many_traces() -> Unsupported:
    return Unsupported(
        f"a gated model with more than {TRACE_LIMIT} traces",
        "something beside batch size and sequence length changes from call to call.",
        "TORCH_LOGS=recompiles names it.",
    )


def _as_refusal(error: Exception) -> Exception:
    if isinstance(error, NotGateable):
        return error
    first = str(error).partition("\n")[0]
    reason = f"the model makes a constant of the batch size or the sequence length ({first})"
    return NotGateable([LayerRefusal(None, "static-size", reason)])


def _own_code(function: types.FunctionType) -> types.FunctionType:
    """The function with code and globals of its own.

    Dynamo caches graphs, and limits their number, per code object. It stores what it compiled among the globals: in
    the module's own, the graphs of a model would outlive it.
    """
    copy = types.FunctionType(
        function.__code__.replace(),
        dict(function.__globals__),
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _traced(
    forward: Callable[..., Any],
    live: LivePlan,
    inputs: dict[str, Any],
    ties: tuple[tuple[str, int, int], ...],
    wants_logits: bool,
) -> tuple[Tensor | None, ...]:
    """What Dynamo captures: the plan enters through the anchor, and only what the caller needs is returned."""
    row_of = live.plan[1]
    for name, dim, axis in ties:
        torch._check(inputs[name].shape[dim] == row_of.shape[axis])
    live.anchor()
    output = forward(**inputs)
    loss = output["loss"] if inputs.get("labels") is not None else None
    logits = output["logits"] if wants_logits else None
    return loss, logits, output.get("aux_loss")
