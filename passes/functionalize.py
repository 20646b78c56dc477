"""Normalise a Dynamo graph to functional ATen: a closed set of operators, no in-place writes.

Dynamo's graph is not functional: `buf[..., :d] = x` carries data without an edge, which dependence analysis
would miss. The normalised graph keeps composite operators (linear, scaled_dot_product_attention,
cross_entropy_loss, dropout) whole and keeps shapes symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from regate_fx.passes.base import PassContext, PassResult, Refused, operator_name, reads_number
from regate_fx.passes.bounds import take_bounds
from regate_fx.passes.casts import pin_casts, release_casts
from regate_fx.passes.detached_writes import part_detached
from regate_fx.passes.dropouts import free_dropouts
from regate_fx.passes.functional_trace import functional_trace
from regate_fx.passes.functions import FUNCTION_APPLY, shield, unshield
from regate_fx.passes.grad_mode import refuse_writes_without_grad
from regate_fx.passes.numbers import pin_numbers
from regate_fx.passes.vmaps import expand_vmaps

aten = torch.ops.aten


@dataclass(frozen=True)
class Functionalize:
    """Dynamo graph in, functional ATen graph out: the same placeholders, the same outputs in the same order.

    Cures what normalisation itself would break: an `autograd.Function` keeps its own backward (the node is carried
    through whole), what dropout returns and what was detached may be written to, writes to inputs are appended again as
    `copy_`, the functional `aten.copy` (which has no derivative) becomes a cast and expand of its source, and dtype
    asserts, which contradict in-graph autocast, are dropped. Any other higher-order operator is refused, and so are
    inputs that are subclasses of Tensor. Writes that clamp a parameter become `Bound`s in the findings, to be applied
    before the graph.
    """

    name: str = "functionalize"
    after: tuple[str, ...] = ("inline_checkpoints",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        expand_vmaps(gm)
        _refuse_higher_order(gm)
        _refuse_subclasses(gm)
        ctx.findings["bounds"] = take_bounds(gm)
        refuse_writes_without_grad(gm)
        part_detached(gm)
        shielded = shield(gm)
        free_dropouts(gm)
        pin_casts(gm)
        pin_numbers(gm)
        placeholders = gm.graph.find_nodes(op="placeholder")
        inputs = [node.meta["example_value"] for node in placeholders]
        normal, mutated = functional_trace(gm, inputs)
        rewrites = unshield(normal, shielded)
        rewrites += _restore_mutations(normal, mutated)
        rewrites += _make_differentiable(normal)
        rewrites += _drop_asserts(normal)
        rewrites += release_casts(normal)
        for before, after in zip(placeholders, normal.graph.find_nodes(op="placeholder"), strict=True):
            after.meta = {**before.meta, **after.meta}
        return PassResult(normal, rewrites)


def _refuse_higher_order(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target is not FUNCTION_APPLY:
            raise Refused(
                "higher-order", f"the higher-order operator {operator_name(node)} is not analysed", node
            )
        if getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
            raise Refused("functorch", "a functorch transform (vmap, scan) is not analysed", node)


def _refuse_subclasses(gm: fx.GraphModule) -> None:
    """A tensor made of others, as torchao's quantised weights are, dispatches operators by rules of its own."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["example_value"]
        if is_traceable_wrapper_subclass(value):
            reason = f"{node.name} is a {type(value).__name__}, a subclass of Tensor, which is not analysed"
            raise Refused("tensor-subclass", reason, node)


def _restore_mutations(gm: fx.GraphModule, mutated: Sequence[int]) -> int:
    """The new values of inputs that are written to are leading outputs: write them back and drop those outputs."""
    output = gm.graph.output_node()
    values = list(output.args[0])
    inputs = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(output):
        for number, value in zip(mutated, values, strict=False):
            written = gm.graph.call_function(aten.copy_.default, (inputs[number], value))
            written.meta["val"] = inputs[number].meta["val"]
    output.args = (tuple(values[len(mutated) :]),)
    return len(mutated)


def _make_differentiable(gm: fx.GraphModule) -> int:
    """`aten.copy(self, src)` is `src` cast and expanded to `self`, which has a derivative."""
    nodes = gm.graph.find_nodes(op="call_function", target=aten.copy.default)
    for node in nodes:
        base, source = node.args[:2]
        with gm.graph.inserting_before(node):
            value = source
            if base.meta["val"].dtype != source.meta["val"].dtype:
                value = gm.graph.call_function(
                    aten._to_copy.default, (value,), {"dtype": base.meta["val"].dtype}
                )
                value.meta = dict(node.meta, val=source.meta["val"].to(base.meta["val"].dtype))
            if tuple(base.meta["val"].shape) != tuple(source.meta["val"].shape):
                value = gm.graph.call_function(aten.expand_as.default, (value, base))
                value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
    return len(nodes)


def _drop_asserts(gm: fx.GraphModule) -> int:
    """Dtype asserts were recorded without in-graph autocast; asserts on sizes repeat Dynamo's own guards.

    An assert on a number read from a tensor is the model's own check of its inputs, and stays.
    """
    dropped = 0
    for target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if not node.users and not any(reads_number(source) for source in node.all_input_nodes):
                gm.graph.erase_node(node)
                dropped += 1
    return dropped
