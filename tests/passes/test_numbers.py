"""A number that the capture took for a constant is asserted again, on the tensor it was read from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from captured import copy_graph, operators
from torch import Tensor, fx

from regate_fx.passes.base import PassContext, Refused
from regate_fx.passes.numbers import pin_numbers
from regate_fx.passes.pipeline import NORMALISE, run_passes

Rewrite = Callable[[fx.GraphModule], fx.GraphModule]
FOUR = torch.arange(10).view(2, 5) < 4


@pytest.fixture(autouse=True)
def numbers_in_the_graph() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield


def asserts_as_many(x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """What a model does that compares the number of image positions with that of image features."""
    torch._check(mask.sum().item() == features.shape[0])
    return x * 2


def asserts_nothing(x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    return x * mask.sum().item()


def compiled(function: Callable[..., Tensor], rewrite: Rewrite) -> Callable[..., Tensor]:
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return rewrite(fx.GraphModule(gm, copy_graph(gm))).forward

    return torch.compile(function, backend=backend)


def test_another_number_stops_the_normalised_graph() -> None:
    graphs: list[fx.GraphModule] = []

    def normalise(gm: fx.GraphModule) -> fx.GraphModule:
        graphs.append(run_passes(gm, PassContext(), NORMALISE).graph_module)
        return graphs[0]

    x, features = torch.randn(2, 5), torch.randn(4, 3)
    step = compiled(asserts_as_many, normalise)
    assert torch.equal(step(x, FOUR, features), x * 2)
    with pytest.raises(RuntimeError, match=r"assertion failed: .* == 4"):
        step(x, FOUR.roll(1, 0) | FOUR, features)
    assert len(graphs) == 1


def test_each_number_is_pinned_once_and_on_its_tensor() -> None:
    def pin(gm: fx.GraphModule) -> fx.GraphModule:
        before = operators(gm)
        assert pin_numbers(gm) == 1
        assert operators(gm)["aten._assert_async"] == before["aten._assert_async"] + 1
        (check,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_async.msg)
        number, known = check.args[0].args
        assert (number.target, known) == ("sum", 4)
        return gm

    compiled(asserts_as_many, pin)(torch.randn(2, 5), FOUR, torch.randn(4, 3))


def test_a_number_that_is_known_to_nobody_is_left_alone() -> None:
    def pin(gm: fx.GraphModule) -> fx.GraphModule:
        before = operators(gm)
        assert before["item"] == 1
        assert pin_numbers(gm) == 0
        assert operators(gm) == before
        return gm

    x = torch.randn(2, 5)
    assert torch.equal(compiled(asserts_nothing, pin)(x, FOUR, torch.randn(4, 3)), x * 4)


def test_a_number_asserted_to_be_a_size_is_refused_by_name() -> None:
    def pin(gm: fx.GraphModule) -> fx.GraphModule:
        with pytest.raises(Refused, match="asserted to be the size") as caught:
            pin_numbers(gm)
        assert caught.value.code == "number"
        return gm

    features = torch.randn(4, 3)
    torch._dynamo.mark_dynamic(features, 0)
    compiled(asserts_as_many, pin)(torch.randn(2, 5), FOUR, features)
