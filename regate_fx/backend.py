"""The Dynamo backend: run the passes on a captured graph, then hand it to Inductor or another backend."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from regate_fx.dynamo_settings import compile_settings
from regate_fx.errors import LayerRefusal, NotGateable, PassFailed
from regate_fx.inductor import Inductor
from regate_fx.layerwise import LayerwiseGraph, compile_parts
from regate_fx.ops.attention_kernels import Preferred
from regate_fx.passes.axes import Axes
from regate_fx.passes.base import Pass, PassContext, Refused, fake, is_tensor
from regate_fx.passes.bounds import Bound
from regate_fx.passes.elide import ElideTokens
from regate_fx.passes.head_loss import FuseHeadLoss
from regate_fx.passes.pipeline import (
    ANALYSE,
    FINISH,
    LAYERWISE,
    MASK,
    NORMALISE,
    PIPELINE,
    PipelineRun,
    run_passes,
)
from regate_fx.passes.placement import Place
from regate_fx.passes.plan_nodes import ANCHOR
from regate_fx.passes.rules import Kind, Result
from regate_fx.passes.split_layers import split_layers
from regate_fx.passes.token_axes import TokenAxes, check_picked_sizes
from regate_fx.sharded import Sharding

Compiled = Callable[..., Any]


class Captured(BaseException):
    """Raised in place of running a captured graph that is refused, or that only was to be captured. No error."""


@dataclass
class Captures:
    """The graphs of one model as Dynamo handed them over: rewritten ones, and refusals of the others.

    ran: the rewritten graphs that ran since it was last emptied. losses: scalars that those with a loss gave out.
    """

    runs: list[PipelineRun] = field(default_factory=list)
    refusals: list[Refused] = field(default_factory=list)
    graphs: int = 0
    ran: list[PipelineRun] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)


@dataclass
class GatingBackend:
    """A Dynamo backend that gates what can be gated and records what it did.

    compiler: name of a registered Dynamo backend, or a backend itself. A graph that does not hold the token plan,
    or cannot be gated, is compiled as captured; whether that is acceptable is for the caller to decide.
    whole: one graph was asked for, that may have sizes read from data where several would have broken instead.
    referable: keep what it takes to compute the dense reference of graphs captured from now on.
    layerwise: split the graph at the ends of its layers and compile each by itself.
    sharding: of the model in the call that runs, whose parameters are then stand-ins.
    stops: raise `Captured` in place of running a graph; in `whole` mode then nothing of the model is computed.
    fused_loss: never build the logits of all rows for the loss; None where they would be large.
    bucketed: plans come with rows that fill a bucket.
    prefer: what computes attention, where it can.
    tell: takes what is being done, while somebody waits for it.
    """

    compiler: str | Compiled
    passes: Sequence[Pass] = PIPELINE
    captures: Captures = field(default_factory=Captures)
    whole: bool = False
    referable: bool = False
    is_referring: bool = False
    layerwise: bool = False
    sharding: Sharding | None = None
    stops: bool = False
    fused_loss: bool | None = None
    bucketed: bool = False
    prefer: Preferred = "auto"
    tell: Callable[[str], None] = field(kw_only=True)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        self.captures.graphs += 1
        self.tell("rewriting the captured graph")
        normalised: list[fx.GraphModule] = []
        run = self._rewrite(gm, normalised)
        if run is None and self.whole:
            return _refused  # and so is the model: to compile this graph would be in vain
        if run is None:
            return self._stopping(self._compiler()(gm, example_inputs))
        bounds: tuple[Bound, ...] = run.context.findings["bounds"]
        if bounds and self.sharding is not None:
            reason = "the model clamps a parameter as it runs, which here is a stand-in for a sharded one"
            raise NotGateable([LayerRefusal(None, "sharded-write", reason)])
        compiled: Compiled = _refused
        if not (self.whole and _gates_nothing(run)):
            with compile_settings():
                compiled = self._compile(run, example_inputs)
        reference = functools.cache(lambda: _dense_reference(normalised))
        ran, losses = self.captures.ran, self.captures.losses
        in_parts = not self.whole and run.context.findings["loss"]
        beside = _beside_loss(run) if in_parts else ()

        def noted(*args: Any) -> Any:
            ran.append(run)
            if self.stops:
                raise Captured
            if any(args[index].grad_fn is not None for index in beside):
                reason = "what another graph computed, of tokens not known, is added to the loss"
                raise NotGateable([LayerRefusal(None, "no-loss", reason)])
            for bound in bounds:
                bound.apply(args)
            if self.sharding is not None and isinstance(compiled, LayerwiseGraph):
                return self.sharding.run(compiled, args)
            found = (reference() if self.is_referring else compiled)(*args)
            if in_parts:
                losses.extend(
                    value for value in found if isinstance(value, torch.Tensor) and value.dim() == 0
                )
            return found

        return noted

    def _stopping(self, compiled: Compiled) -> Compiled:
        def run(*args: Any) -> Any:
            if self.stops:
                raise Captured
            return compiled(*args)

        return run

    def _compile(self, run: PipelineRun, example_inputs: Sequence[Any]) -> Compiled:
        by = f" by {self.compiler}" if isinstance(self.compiler, str | Inductor) else ""
        if not self.layerwise:
            depth = len(run.context.findings["layers"].layers)
            self.tell(f"compiling a graph of {depth} layers{by}")
            return self._compiler()(run.graph_module, example_inputs)
        try:
            split = split_layers(run.graph_module)
        except Refused as refused:
            raise NotGateable([refused.refusal()]) from refused
        return compile_parts(split, self._compiler(), lambda part: self.tell(f"compiling {part}{by}"))

    @contextlib.contextmanager
    def referring(self) -> Iterator[None]:
        """While active, captured graphs compute their dense reference, or raise `NotGateable` if there is none."""
        self.is_referring = True
        try:
            yield
        finally:
            self.is_referring = False

    def _rewrite(self, gm: fx.GraphModule, normalised: list[fx.GraphModule]) -> PipelineRun | None:
        if not _has_anchor(gm):
            return None

        def keep(step: str, graph_module: fx.GraphModule) -> None:
            if self.referable and step == NORMALISE[-1].name:
                normalised.append(_copy(graph_module))

        try:
            run = self._passed(gm, keep)
        except Refused as refused:
            self.captures.refusals.append(refused.kept())
            if self.whole and refused.code == "number":
                raise NotGateable([refused.refusal()]) from None  # to be captured otherwise, not to run
            return None
        except PassFailed as failed:
            self.captures.refusals.append(Refused("pass-failed", str(failed)))
            return None
        self.captures.runs.append(run)
        return run

    def _passed(self, gm: fx.GraphModule, keep: Callable[[str, fx.GraphModule], None]) -> PipelineRun:
        """The graph after all passes. In a whole graph, sizes read from data have to be numbers of picked rows."""
        unknown = _size_from_data(gm) if self.whole else None
        try:
            run = run_passes(_copy(gm), PassContext(), self._chosen_passes(), dump=keep)
        except (Refused, PassFailed) as error:
            if unknown is None:
                raise
            if isinstance(error, Refused) and error.code in ("number", "size-as-value", "layout"):
                raise Refused("number", error.reason, error.node) from error
            raise Refused("number", "a size is read from data", unknown) from error
        if unknown is not None:
            check_picked_sizes(run.context.findings["token_axes"])
        return run

    def _chosen_passes(self) -> Sequence[Pass]:
        passes = LAYERWISE if self.layerwise else self.passes
        return [chosen for step in passes if (chosen := self._as_asked(step)) is not None]

    def _as_asked(self, step: Pass) -> Pass | None:
        """A pass with the settings that were asked for; None where it is not to run."""
        if isinstance(step, Place):
            return Place(prefer=self.prefer)
        if isinstance(step, ElideTokens):
            return ElideTokens(bucketed=self.bucketed)
        if isinstance(step, FuseHeadLoss) and self.fused_loss is not None:
            return FuseHeadLoss(least_bytes=0) if self.fused_loss else None
        return step

    def _compiler(self) -> Compiled:
        return lookup_backend(self.compiler) if isinstance(self.compiler, str) else self.compiler


def _refused(*args: Any) -> Any:
    raise Captured


def _beside_loss(run: PipelineRun) -> tuple[int, ...]:
    """Which tensors given to a graph reach a number that it gives out by another way than through token losses.

    Those over positions are left out: what the graph itself sums of them, it sums over active rows.
    """
    analysis: TokenAxes = run.context.findings["token_axes"]
    graph = next(iter(analysis.kinds)).graph
    todo = [node for node in graph.output_node().all_input_nodes if is_tensor(node) and fake(node).dim() == 0]
    reached: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in reached and analysis.kinds.get(node) is not Kind.LOSS:
            reached.add(node)
            todo.extend(node.all_input_nodes)
    beside = (
        index
        for index, node in enumerate(graph.find_nodes(op="placeholder"))
        if node in reached and is_tensor(node) and not _is_over_positions(analysis.axes.get(node))
    )
    return tuple(beside)


def _is_over_positions(axes: Result | None) -> bool:
    return isinstance(axes, Axes) and axes.sequences > 0


def _gates_nothing(run: PipelineRun) -> bool:
    return all(layer.refused is not None for layer in run.context.findings["layers"].layers)


def _size_from_data(gm: fx.GraphModule) -> fx.Node | None:
    """The first node of a Dynamo graph whose shape is read from data."""
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and free_unbacked_symbols(value):
            return node
    return None


def _dense_reference(normalised: list[fx.GraphModule]) -> Compiled:
    """Not compiled any further: what it is compared with went through a backend."""
    if not normalised:
        raise NotGateable([Refused("no-reference", "no dense reference was asked for").refusal()])
    try:
        passes = ANALYSE + MASK + FINISH
        done = tuple(step.name for step in NORMALISE)
        return run_passes(normalised.pop(), PassContext(), passes, done=done).graph_module
    except Refused as refused:
        raise NotGateable([refused.refusal()]) from refused
    except PassFailed as failed:
        raise NotGateable([Refused("pass-failed", str(failed)).refusal()]) from failed


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same fake values, so that a refused rewrite leaves the captured one as it was."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    return copied


def _has_anchor(gm: fx.GraphModule) -> bool:
    return any(
        node.target in (ANCHOR, ANCHOR.overloadpacket) or "regate_fx.anchor" in str(node.target)
        for node in gm.graph.nodes
        if node.op == "call_function"
    )
