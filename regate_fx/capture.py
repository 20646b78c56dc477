"""Trace a model together with its token plan, and run what came of it.

Shapes: B samples, S positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

from regate_fx.added_arguments import AddedArguments
from regate_fx.backend import Captured, Captures, GatingBackend
from regate_fx.dynamo_settings import capture_settings
from regate_fx.errors import LayerRefusal, NotGateable
from regate_fx.input_gradients import InputGradients
from regate_fx.live import LivePlan
from regate_fx.options import Options
from regate_fx.outputs import GatedOutput
from regate_fx.passes.base import Refused
from regate_fx.passes.pipeline import PIPELINE, REFERENCE, PipelineRun
from regate_fx.plan import TokenPlan
from regate_fx.refusals import NOT_WHOLE, as_refusal, finds_nothing, of_backend, too_many_traces
from regate_fx.sharded import Sharding
from regate_fx.summary import fuller, summarise
from regate_fx.symbols import mark_sizes
from regate_fx.validation import undisturbed
from regate_fx.wrapper import original_forward


@dataclass
class ComputedRows:
    """active: packed rows of all calls that are a position's; filling: those that only fill a bucket."""

    active: int = 0
    filling: int = 0

    def add(self, plan: TokenPlan, sized: TokenPlan) -> None:
        self.active += plan.active
        self.filling += sized.active - plan.active


class CapturedModel:
    """One model as Dynamo captured it, in one graph or several: captured once, run with every shape and mask.

    tell: takes what is being done, while somebody waits for it.
    sharding: of the model's parameters; None where they are whole.
    graphs: the rewritten graphs of the fullest capture so far, in their order.
    last: plan and padding mask [B, S] of the last call.
    has_run: the untouched model ran once.
    rows: computed so far.
    """

    def __init__(self, model: nn.Module, options: Options, tell: Callable[[str], None]) -> None:
        self.model = model
        self.options = options
        self.tell = tell
        self.sharding: Sharding | None = None
        self.last: tuple[TokenPlan, Tensor | None] | None = None
        self.has_run = self._may_run = False
        self.rows = ComputedRows()
        self._is_checking = False
        self._by_sample = False
        self._live = LivePlan()
        self._added = AddedArguments(model)
        self._start(whole=True)

    def _start(self, whole: bool) -> None:
        """Forget all captures. whole: expect the model in one graph; else look for the plan in every part of it."""
        self._whole = whole
        passes = REFERENCE if self.options.reference else PIPELINE
        layerwise = self.options.scope == "layers" and not self.options.reference
        self._backend = GatingBackend(
            self.options.backend, passes, whole=whole, referable=self._is_checking, layerwise=layerwise,
            fused_loss=self.options.fused_loss, bucketed=self.options.bucket is not None,
            prefer=self.options.attention, tell=self.tell,
        )  # fmt: skip
        self.graphs: list[PipelineRun] = []
        self._input_gradients: InputGradients | None = None
        self._runs: dict[frozenset[str], Callable[..., Any]] = {}

    @property
    def captures(self) -> Captures:
        return self._backend.captures

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """While active, what is captured keeps what its dense reference takes."""
        self._is_checking = self._backend.referable = True
        try:
            yield
        finally:
            self._is_checking = self._backend.referable = False

    def referring(self) -> contextlib.AbstractContextManager[None]:
        """While active, calls compute the dense reference, or raise `NotGateable` where there is none."""
        return self._backend.referring()

    def __call__(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput:
        try:
            return self._varying(plan, inputs)
        except (NotGateable, *NOT_WHOLE) as error:
            # A break in the graph makes a model several graphs: the plan has to enter each, and a size that
            # passes from one to the next is taken for a constant.
            # With sharded layers no code outside the graph may run: it would meet stand-ins of their parameters.
            cause = as_refusal(error)
            if not self._whole or self.sharding is not None or not self._may_break(error):
                raise cause from error
        started = self._whole, self._backend, self.graphs, self._runs
        if not self.has_run:
            self.tell("running the untouched model once, for it is not one graph yet")
            # What a model does in its first run only, hooks it installs and tables it fills, breaks no later capture.
            with undisturbed(self.model), torch.no_grad():
                self.untouched(plan, inputs)
            self._start(whole=True)
        else:
            self.tell("capturing the model in parts, for it is not one graph")
            self._start(whole=False)
        try:
            return self(plan, inputs)
        except Exception as later:
            # The call was wrong, not the capture: the next good one finds it as it was.
            self._whole, self._backend, self.graphs, self._runs = started
            # In parts that hold no layer, why they are parts says more than that nothing was found in them.
            if finds_nothing(later) and not finds_nothing(cause):
                raise cause from later
            raise

    def _may_break(self, error: Exception) -> bool:
        """Whether several graphs may succeed where one did not: there was none, or it reads numbers from tensors."""
        reads = any(refused.code == "number" for refused in self._backend.captures.refusals)
        return reads or not isinstance(error, NotGateable)

    def first(self, plan: TokenPlan, inputs: dict[str, Any]) -> None:
        """Refuse a model that is one graph, and cannot be gated, before anything of it is computed."""
        if self._may_run or not self._whole or self.sharding is not None:
            return
        self._backend.stops = True
        try:
            self._varying(plan, inputs)
        except Captured:
            captures = self._backend.captures
            self.graphs = fuller(captures.runs, self.graphs)
        except (NotGateable, *NOT_WHOLE) as error:
            if not self._may_break(error):
                raise
        finally:
            self._backend.stops = False
        self._may_run = True

    def _varying(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput:
        """A call; where the batch size came out as that of a constant input, in a capture in which that varies too."""
        try:
            return self._checked(plan, inputs)
        except NotGateable as error:
            if self._by_sample or all(refusal.code != "static-batch" for refusal in error.refusals):
                raise
            self._by_sample, stops = True, self._backend.stops
            self._start(self._whole)
            self._backend.stops = stops
            return self._checked(plan, inputs)

    def _checked(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput:
        try:
            return self._call(plan, inputs)
        except Captured:
            self.check_captures(inputs.get("labels") is not None, self._backend.captures.refusals)
            raise

    def untouched(self, plan: TokenPlan, inputs: dict[str, Any]) -> Any:
        """The output of the user's own model in eager mode, which takes no notice of the plan."""
        output = original_forward(self.model)(**(inputs | self._added.no_cache))
        self.has_run = True
        return output

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

    def _call(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput:
        captures = self._backend.captures
        inputs = self._added.with_padding_mask(plan, inputs)
        sized = plan if self.options.bucket is None else plan.in_bucket(self.options.bucket)
        seen = captures.graphs, len(captures.refusals), len(captures.runs)
        ties = mark_sizes(sized, inputs, self._by_sample)
        labelled = inputs.get("labels") is not None
        wants_logits = self.options.keep_logits or not labelled
        self._live.enter(sized, inputs)
        captures.ran.clear()
        padding = self._live.attention_mask
        with (
            capture_settings(self._whole),
            self._live.anchored(self.model, not self._whole),
            self._without_input_gradients(),
            self._stood_in(),
        ):
            try:
                loss, logits, aux_loss = self._run(inputs)(
                    original_forward(self.model),
                    self._live,
                    inputs | self._added.no_cache,
                    ties,
                    wants_logits,
                )
            except BackendCompilerFailed as error:
                raise of_backend(self.options.backend, error.inner_exception) from error
            except FailOnRecompileLimitHit as error:
                raise too_many_traces() from error
            except RuntimeError as error:
                # What Dynamo says where one graph was asked for while it is switched off.
                if "found no compiled frames" not in str(error):
                    raise
                raise NotGateable(self._why_nothing_ran()) from error
            finally:
                token_loss, counted = self._live.leave()
                losses = tuple(captures.losses)
                captures.losses.clear()
        self.check_captures(labelled, captures.refusals[seen[1] :])
        if labelled and not self._whole and all(loss is not given for given in losses):
            # What a graph behind that of the loss adds to it would be of all tokens.
            reason = "another graph computes with the loss before the model returns it"
            raise NotGateable([LayerRefusal(None, "no-loss", reason)])
        if captures.graphs != seen[0]:
            self.graphs = fuller(captures.runs[seen[2] :], self.graphs)
        self.last = plan, padding
        self.rows.add(plan, sized)
        if not labelled or self.options.reference or self._backend.is_referring:
            return GatedOutput(loss=loss, logits=logits)
        return GatedOutput(
            loss=loss, logits=logits, aux_loss=aux_loss, token_loss=token_loss, counted=counted
        )

    def _without_input_gradients(self) -> contextlib.AbstractContextManager[None]:
        # Looked for at the first call of a capture: when this object is made, the model may be half built.
        if self._input_gradients is None:
            self._input_gradients = InputGradients(self.model)
        return self._input_gradients.left_out()

    @contextlib.contextmanager
    def _stood_in(self) -> Iterator[None]:
        """While active, sharded parameters are replaced by stand-ins, until the captured graph runs."""
        self._backend.sharding = self.sharding
        try:
            with contextlib.nullcontext() if self.sharding is None else self.sharding.captured():
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
