"""Write out `vmap` brackets as ordinary operators.

Dynamo captures `torch.vmap` as operators between `_vmap_increment_nesting` and `_vmap_decrement_nesting`, each on one
entry of a batch that no shape shows. Models build masks over (query, key) pairs with it.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._functorch import predispatch
from torch.fx.experimental.proxy_tensor import make_fx

from regate_fx.passes.base import Refused, operator_name

_OPENS, _CLOSES = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting


def expand_vmaps(gm: fx.GraphModule) -> int:
    """Replace each outermost bracket of a Dynamo graph by the operators that vmap makes of it; returns how many.

    Raises `Refused` where gradients would have to pass through anything but elementwise operators and views.
    """
    spans = _spans(gm)
    for span in spans:
        _expand(gm, span)
    for node in gm.graph.find_nodes(op="call_function", target=predispatch.lazy_load_decompositions):
        gm.graph.erase_node(node)
    return len(spans)


def _spans(gm: fx.GraphModule) -> list[list[fx.Node]]:
    spans: list[list[fx.Node]] = []
    depth = 0
    for node in gm.graph.nodes:
        if node.target is _OPENS:
            if depth == 0:
                spans.append([])
            depth += 1
        if depth:
            spans[-1].append(node)
        if node.target is _CLOSES:
            depth -= 1
    return spans


def _expand(gm: fx.GraphModule, span: list[fx.Node]) -> None:
    members = set(span)
    inputs = list(dict.fromkeys(n for node in span for n in node.all_input_nodes if n not in members))
    results = [node for node in span if any(user not in members for user in node.users)]
    values = [node.meta["example_value"] for node in inputs]
    body = fx.Interpreter(_cut_out(gm, span, inputs, results))
    traced = make_fx(body.run)(*values)
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in values):
        _refuse_gradients(traced, span[0])
    _splice(gm, span, traced, inputs, results)


def _refuse_gradients(body: fx.GraphModule, where: fx.Node) -> None:
    """Operators recorded beneath autograd have the gradients of what they came from if each is its own derivative."""
    for node in body.graph.nodes:
        if node.op != "call_function":
            continue
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not (
            torch.Tag.pointwise in target.tags or target.is_view
        ):
            raise Refused(
                "functorch",
                f"gradients pass through a functorch transform (vmap) of {operator_name(node)}",
                where,
            )


def _cut_out(
    gm: fx.GraphModule, span: list[fx.Node], inputs: list[fx.Node], results: list[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in span:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(gm, graph)


def _splice(
    gm: fx.GraphModule,
    span: list[fx.Node],
    body: fx.GraphModule,
    inputs: list[fx.Node],
    results: list[fx.Node],
) -> None:
    """Write the nodes of `body` where the bracket was."""
    env = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    kept = {key: span[0].meta[key] for key in ("stack_trace", "nn_module_stack") if key in span[0].meta}
    with gm.graph.inserting_before(span[0]):
        for node in body.graph.nodes:
            if node.op == "call_function":
                env[node] = gm.graph.node_copy(node, env.__getitem__)
                env[node].meta = dict(kept, example_value=node.meta.get("val"))
            elif node.op not in ("placeholder", "output"):
                raise Refused(
                    "functorch", f"a functorch transform (vmap) captures the constant {node.name}", span[0]
                )
    for result, value in zip(results, body.graph.output_node().args[0], strict=True):
        result.replace_all_uses_with(env[value])
    for node in reversed(span):
        gm.graph.erase_node(node)
