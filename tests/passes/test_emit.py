"""Nodes that are written with their fake values, and which of them may share one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from regate_fx.passes.emit import Emitter
from regate_fx.passes.fake_results import CallKeys

aten = torch.ops.aten


class Written:
    """An empty graph to write into, and inputs for it."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.emit = Emitter(fx.Graph(), self.mode)

    def input(self, value: torch.Tensor) -> fx.Node:
        node = self.emit.graph.placeholder("value")
        node.meta["val"] = self.mode.from_tensor(value)
        return node


@pytest.fixture
def written() -> Written:
    return Written()


def value(node: fx.Node) -> Any:
    return node.meta["val"]


def test_calls_that_are_alike_share_a_value(written: Written) -> None:
    first, second = written.input(torch.randn(3, 4)), written.input(torch.randn(3, 4))
    assert value(written.emit.call(aten.exp.default, first)) is value(
        written.emit.call(aten.exp.default, second)
    )


@pytest.mark.parametrize(
    "other",
    [
        torch.randn(4, 4),
        torch.randn(4, 3).t(),
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(3, 4, requires_grad=True),
        torch.randn(4, 4)[1:],
    ],
    ids=["shape", "strides", "dtype", "requires_grad", "offset"],
)
def test_calls_that_differ_do_not(written: Written, other: torch.Tensor) -> None:
    one, two = written.input(torch.randn(3, 4)), written.input(other)
    first, second = (value(written.emit.call(aten.transpose.int, node, 0, 1)) for node in (one, two))
    assert first is not second
    assert shown(second) == shown(other.transpose(0, 1))


def shown(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.requires_grad


def test_the_number_one_is_not_true(written: Written) -> None:
    source = written.input(torch.ones(3, dtype=torch.int64))
    integer, boolean = (written.emit.call(aten.mul.Scalar, source, scalar) for scalar in (1, 1.0))
    assert (value(integer).dtype, value(boolean).dtype) == (torch.int64, torch.float32)


def test_autocast_is_part_of_a_call(written: Written) -> None:
    a, b = written.input(torch.randn(3, 4)), written.input(torch.randn(4, 5))
    plain = written.emit.call(aten.mm.default, a, b)
    like = written.emit.graph.placeholder("like")
    like.meta["autocast"] = (("cpu", torch.bfloat16, True, True),)
    with written.emit.like(like):
        cast = written.emit.call(aten.mm.default, a, b)
    assert (value(plain).dtype, value(cast).dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("read", [aten._local_scalar_dense.default, aten.nonzero.default])
def test_every_value_that_is_read_has_symbols_of_its_own(written: Written, read: Any) -> None:
    sources = [written.emit.call(aten.neg.default, written.input(torch.tensor(3))) for _ in range(2)]
    assert value(sources[0]) is value(sources[1])
    first, second = (written.emit.call(read, source) for source in sources)
    assert set(first.meta["unbacked_bindings"]).isdisjoint(second.meta["unbacked_bindings"])
    again = written.emit.call(read, sources[1])
    assert "unbacked_bindings" not in again.meta


def test_real_tensors_and_functions_are_not_compared(written: Written) -> None:
    assert CallKeys().of(aten.exp.default, (torch.ones(2),), {}) is None
    assert CallKeys().of(torch.exp, (written.mode.from_tensor(torch.ones(2)),), {}) is None
