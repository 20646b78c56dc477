"""Every invariant between two passes, broken on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captured import capture, run_until
from small_decoder import batch, decoder
from torch import fx

from regate_fx.passes.verify import verify

aten = torch.ops.aten


@pytest.fixture
def gm() -> fx.GraphModule:
    return run_until("open_brackets", decoder(layers=1), batch()).graph_module


def inputs(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="placeholder"))


def first(gm: fx.GraphModule, target: object) -> fx.Node:
    return gm.graph.find_nodes(op="call_function", target=target)[0]


def test_a_normalised_graph_is_sound(gm: fx.GraphModule) -> None:
    assert verify(gm, inputs(gm), functional=True) is None


def write_in_place(gm: fx.GraphModule) -> None:
    node = first(gm, aten.gelu.default)
    with gm.graph.inserting_after(node):
        gm.graph.call_function(aten.mul_.Scalar, (node, 2.0))


def copy_over_a_value(gm: fx.GraphModule) -> None:
    node = first(gm, aten.gelu.default)
    with gm.graph.inserting_after(node):
        gm.graph.call_function(aten.copy_.default, (node, node))


def call_a_method(gm: fx.GraphModule) -> None:
    node = first(gm, aten.gelu.default)
    with gm.graph.inserting_after(node):
        gm.graph.call_method("relu", (node,))


def forget_a_value(gm: fx.GraphModule) -> None:
    del first(gm, aten.gelu.default).meta["val"]


def add_an_input(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        gm.graph.placeholder("added")


BROKEN: list[tuple[Callable[[fx.GraphModule], None], str]] = [
    (write_in_place, "writes to a value in place"),
    (copy_over_a_value, "writes to a value in place"),
    (call_a_method, "is a call_method"),
    (forget_a_value, "gelu has no fake value"),
    (add_an_input, "number of graph inputs changed"),
]


@pytest.mark.parametrize(("breaks", "message"), BROKEN, ids=[b.__name__ for b, _ in BROKEN])
def test_a_broken_invariant_is_named(
    breaks: Callable[[fx.GraphModule], None], message: str, gm: fx.GraphModule
) -> None:
    count = inputs(gm)
    breaks(gm)
    problem = verify(gm, count, functional=True)
    assert problem is not None
    assert message in problem


def test_nodes_out_of_order_do_not_pass_the_lint(gm: fx.GraphModule) -> None:
    first(gm, aten.embedding.default).prepend(first(gm, aten.gelu.default))
    with pytest.raises(RuntimeError, match="before it has been defined"):
        verify(gm, inputs(gm), functional=True)


def test_writing_back_to_an_input_is_allowed(gm: fx.GraphModule) -> None:
    target = next(n for n in gm.graph.find_nodes(op="placeholder") if isinstance(n.meta["val"], torch.Tensor))
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(aten.copy_.default, (target, target))
    assert verify(gm, inputs(gm), functional=True) is None


def test_a_graph_as_captured_is_not_held_to_what_normalisation_brings() -> None:
    raw = capture(decoder(), batch()).graph_module
    assert verify(raw, inputs(raw), functional=False) is None
    assert verify(raw, inputs(raw), functional=True) is not None
