"""Capture a small module with Dynamo, its token plan included, and run single passes on the graph.

Shapes: B samples, S positions, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

import regate_fx.ops  # noqa: F401  (registers the operators)
from regate_fx.passes.base import Pass, PassContext, operator_name
from regate_fx.passes.pipeline import PIPELINE, PipelineRun, run_passes
from regate_fx.plan import make_plan


@dataclass
class Capture:
    """A captured graph, as Dynamo handed it over, and what calling the compiled function gave."""

    graph_module: fx.GraphModule
    outputs: tuple[Any, ...]


def capture(
    module: nn.Module,
    inputs: dict[str, Tensor],
    token_mask: Tensor | None = None,
    rewrite: Callable[[fx.GraphModule], fx.GraphModule] | None = None,
    *,
    dynamic: bool = True,
    compiler: Callable[..., Any] | None = None,
) -> Capture:
    """Trace `module(**inputs)` with the plan of `token_mask` (all positions without one).

    inputs holds tensors [B, S] or [B, S, ...]; the first one gives B and S. rewrite is applied to the graph, which
    then runs eagerly or by `compiler`; module returns a tensor or a tuple of tensors. dynamic=False leaves every
    size static.
    """
    first = next(iter(inputs.values()))
    mask = torch.ones(first.shape[:2], dtype=torch.bool) if token_mask is None else token_mask
    plan = make_plan(mask, inputs.get("attention_mask")).tensors()
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(gm)
        rewritten = gm if rewrite is None else rewrite(gm)
        return rewritten.forward if compiler is None else compiler(rewritten, example_inputs)

    def traced(plan: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> tuple[Any, ...]:
        for value in inputs.values():
            torch._check(value.shape[0] == plan[1].shape[0])
            torch._check(value.shape[1] == plan[1].shape[1])
        slots = torch.ops.regate_fx.anchor(*plan, inputs.get("attention_mask"), inputs.get("labels"))
        outputs = module(**inputs)
        return (*(outputs if isinstance(outputs, tuple) else (outputs,)), *slots)

    if dynamic:
        _mark_sizes(plan, inputs)
    torch._dynamo.reset()
    outputs = torch.compile(traced, backend=backend, dynamic=None if dynamic else False)(plan, inputs)
    assert len(seen) == 1, "the module breaks the graph"
    return Capture(seen[0], outputs[:-2])


def _mark_sizes(plan: Sequence[Tensor], inputs: dict[str, Tensor]) -> None:
    for tensor in plan:
        _mark(tensor, range(tensor.dim()))
    for tensor in inputs.values():
        _mark(tensor, (0, 1))


def _mark(tensor: Tensor, dims: Sequence[int] | range) -> None:
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)


def run_until(
    name: str, module: nn.Module, inputs: dict[str, Tensor], token_mask: Tensor | None = None
) -> PipelineRun:
    """Run the passes up to and including the one called `name` on the captured module."""
    names = [step.name for step in PIPELINE]
    return run_on(module, inputs, PIPELINE[: names.index(name) + 1], token_mask)


def run_on(
    module: nn.Module,
    inputs: dict[str, Tensor],
    passes: Sequence[Pass],
    token_mask: Tensor | None = None,
    **options: Any,
) -> PipelineRun:
    """Run `passes` on the captured module; what a pass raises is raised here."""
    runs: list[PipelineRun] = []
    errors: list[Exception] = []

    def rewrite(gm: fx.GraphModule) -> fx.GraphModule:
        copied = fx.GraphModule(gm, copy_graph(gm))
        try:
            runs.append(run_passes(copied, PassContext(), passes))
        except Exception as error:
            errors.append(error)
        return gm

    capture(module, inputs, token_mask, rewrite, **options)
    if errors:
        raise errors[0]
    return runs[0]


def copy_graph(gm: fx.GraphModule) -> fx.Graph:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    return graph


def operators(gm: fx.GraphModule) -> Counter[str]:
    """How often each operator is called."""
    return Counter(operator_name(node) for node in gm.graph.nodes if node.op.startswith("call_"))


def calls(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op.startswith("call_") and operator_name(node) == name]
