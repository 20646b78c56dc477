"""Open gradient-checkpointed regions: inline their bodies and keep the recompute tags.

Dynamo captures `torch.utils.checkpoint` as one node whose body is a graph of its own. Everything after
this pass works on one flat graph; AOTAutograd's partitioner recomputes what carries the tags.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from regate_fx.passes.base import PassContext, PassResult, Refused

_region_ids = itertools.count(1)


@dataclass(frozen=True)
class InlineCheckpoints:
    """Replace every `tag_activation_checkpoint` node of a Dynamo graph by its body, tagged for recomputation.

    Refuses selective checkpointing (`context_fn`): its policy is code that sees operators this pipeline replaces.
    """

    name: str = "inline_checkpoints"
    after: tuple[str, ...] = ()

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        inlined = 0
        while nodes := gm.graph.find_nodes(
            op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint
        ):
            for node in nodes:
                _inline(gm, node)
                inlined += 1
        return PassResult(gm, inlined)


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    body = _body(gm, node)
    region = next(_region_ids)
    placeholders = body.graph.find_nodes(op="placeholder")
    values: dict[fx.Node, fx.Node] = dict(zip(placeholders, node.args[1:], strict=True))
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                _replace_outputs(node, inner.args[0], values)
                continue
            copy = gm.graph.node_copy(inner, values.__getitem__)
            if inner.op == "get_attr":
                copy.target = _adopt(gm, body, inner.target)
            copy.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            copy.meta["ac_graph_id"] = region
            values[inner] = copy
    gm.graph.erase_node(node)


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    attribute = node.args[0]
    assert isinstance(attribute, fx.Node) and isinstance(attribute.target, str)
    body = gm.get_submodule(attribute.target)
    assert isinstance(body, fx.GraphModule)
    if "_checkpoint_context_fn" in body.meta or node.kwargs.get("context_fn") is not None:
        raise Refused(
            "selective-checkpoint",
            "gradient checkpointing with a context_fn (selective checkpointing) decides by operators "
            "that this rewrite replaces; use plain gradient checkpointing",
            node,
        )
    return body


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, target: object) -> str:
    """Give an attribute of the body (a nested body, a constant) a name in the outer module."""
    value: object = body
    for part in str(target).split("."):
        value = getattr(value, part)
    name = next(n for i in itertools.count() if not hasattr(gm, n := f"{str(target).replace('.', '_')}_{i}"))
    setattr(gm, name, value)
    return name


def _replace_outputs(node: fx.Node, outputs: object, values: dict[fx.Node, fx.Node]) -> None:
    mapped = fx.map_arg(outputs, lambda n: values[n])
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise Refused("checkpoint-output", "the checkpointed body's outputs are used as one value", user)
        user.replace_all_uses_with(mapped[user.args[1]])
        user.graph.erase_node(user)
