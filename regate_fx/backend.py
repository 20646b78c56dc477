"""The Dynamo backend: run the passes on a captured graph, then hand it to Inductor or another backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from regate_fx.errors import PassFailed
from regate_fx.passes.base import Pass, PassContext, Refused
from regate_fx.passes.pipeline import PIPELINE, PipelineRun, run_passes
from regate_fx.passes.plan_nodes import ANCHOR

Compiled = Callable[..., Any]


@dataclass
class Captures:
    """The graphs of one model as Dynamo handed them over: rewritten ones, and refusals of the others.

    ran: the rewritten graphs that ran since it was last emptied.
    """

    runs: list[PipelineRun] = field(default_factory=list)
    refusals: list[Refused] = field(default_factory=list)
    graphs: int = 0
    ran: list[PipelineRun] = field(default_factory=list)


@dataclass
class GatingBackend:
    """A Dynamo backend that gates what can be gated and records what it did.

    compiler: name of a registered Dynamo backend, or a backend itself. A graph that does not hold the token plan,
    or cannot be gated, is compiled as captured; whether that is acceptable is for the caller to decide.
    """

    compiler: str | Compiled
    passes: Sequence[Pass] = PIPELINE
    captures: Captures = field(default_factory=Captures)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        self.captures.graphs += 1
        run = self._rewrite(gm)
        if run is None:
            return self._compiler()(gm, example_inputs)
        compiled = self._compiler()(run.graph_module, example_inputs)
        ran = self.captures.ran

        def noted(*args: Any) -> Any:
            ran.append(run)
            return compiled(*args)

        return noted

    def _rewrite(self, gm: fx.GraphModule) -> PipelineRun | None:
        if not _has_anchor(gm):
            return None
        try:
            run = run_passes(_copy(gm), PassContext(), self.passes)
        except Refused as refused:
            self.captures.refusals.append(refused)
            return None
        except PassFailed as failed:
            self.captures.refusals.append(Refused("pass-failed", str(failed)))
            return None
        self.captures.runs.append(run)
        return run

    def _compiler(self) -> Compiled:
        return lookup_backend(self.compiler) if isinstance(self.compiler, str) else self.compiler


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
