"""Compile and run the decoder layers of a rewritten graph one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regate_fx.errors import PassFailed
from regate_fx.passes.split_layers import Part, SplitGraph, fill_outputs

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class LayerwiseGraph:
    """A split graph whose parts are compiled; called like the whole graph.

    compiled: for each part, shared by equal ones. compilations: how many differ.
    """

    split: SplitGraph
    compiled: tuple[Compiled, ...]
    compilations: int

    def __call__(self, *args: Any) -> Any:
        return self.run(args, lambda part, compiled, values: compiled(*values))

    def run(self, args: Sequence[Any], call: Callable[[Part, Compiled, list[Any]], Any]) -> Any:
        """Run the parts in order. call: runs one compiled part on its inputs."""
        values = dict(zip(self.split.placeholders, args, strict=True))
        for part, compiled in zip(self.split.parts, self.compiled, strict=True):
            results = call(part, compiled, [values[name] for name in part.inputs])
            values.update(zip(part.outputs, results, strict=True))
            for name in part.last:
                values.pop(name, None)
        return fill_outputs(self.split.outputs, values)


def compile_parts(
    split: SplitGraph,
    compiler: Callable[[fx.GraphModule, Sequence[Any]], Compiled],
    tell: Callable[[str], None],
) -> LayerwiseGraph:
    """Compile every part that is not like an earlier one. tell: takes which one comes next."""
    known: dict[Any, Compiled] = {}
    compiled = []
    for number, part in enumerate(split.parts, start=1):
        key = signature(part.graph_module)
        if key not in known:
            tell(f"part {number} of {len(split.parts)}")
            known[key] = _checked(part, compiler)
        compiled.append(known[key])
    return LayerwiseGraph(split, tuple(compiled), len(known))


def _checked(part: Part, compiler: Callable[[fx.GraphModule, Sequence[Any]], Compiled]) -> Compiled:
    """The compiled part; it refuses an input through which a gradient would flow unnoticed."""
    examples = [node.meta["val"] for node in part.graph_module.graph.find_nodes(op="placeholder")]
    constant = [
        index
        for index, value in enumerate(examples)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad
    ]
    compiled = compiler(part.graph_module, examples)

    def run(*args: Any) -> Any:
        for index in constant:
            if args[index].requires_grad and torch.is_grad_enabled():
                raise PassFailed(
                    "split_layers",
                    (),
                    f"a gradient would be lost at {part.inputs[index]}, taken for a constant",
                )
        return compiled(*args)

    return run


def signature(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What has to be equal for two graphs to be compiled as one: operators, their order and arguments, all values'
    shapes by symbol, dtypes and need of gradients."""
    number = {node: index for index, node in enumerate(gm.graph.nodes)}
    return tuple(
        (
            node.op,
            _target(gm, node),
            repr(fx.map_arg((node.args, node.kwargs), lambda source: f"%{number[source]}")),
            _described(node.meta.get("val")),
            repr(node.meta.get("recompute")),
        )
        for node in gm.graph.nodes
    )


def _target(gm: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "get_attr":
        return id(getattr(gm, str(node.target)))
    return node.target if node.op == "call_function" else None


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        sizes = tuple(map(str, (*value.shape, "|", *value.stride())))
        return sizes, value.dtype, value.device, value.requires_grad
    if isinstance(value, (tuple, list)):
        return tuple(_described(item) for item in value)
    return str(value)
