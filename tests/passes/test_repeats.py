"""Copied records of repeated calls: the graph is the one that recording every call gives, whatever is written to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import capture
from hypothesis import example, given
from hypothesis import strategies as st
from normalising import D, Small, assert_as_eager, normalise
from torch import Tensor, fx

from regate_fx.passes import functional_trace
from regate_fx.passes.repeats import AliasWritten, RepeatingInterpreter

Step = tuple[str, int, int]
FULL, HALF = D, D // 2
WRITES = ("add_", "mul_", "write_half", "write_slice")
STEPS = ("add", "linear", "same", "low", "high", "join", "read", *WRITES)


def take(pool: list[Tensor], number: int, width: int) -> Tensor:
    """The last of that width for number 0, the one before it for 1."""
    fitting = [value for value in pool if value.shape[-1] == width]
    return fitting[-1 - number % len(fitting)]


def perform(w: Small, pool: list[Tensor], step: Step) -> None:
    """One step on a pool of values of the widths D and D/2; autograd needs no value that a later step writes to."""
    name, i, j = step
    full, other, half = take(pool, i, FULL), take(pool, j, FULL), take(pool, i, HALF)
    if name in WRITES:
        if name == "add_":
            full.add_(other)
        elif name == "mul_":
            full.mul_(0.5)
        elif name == "write_half":
            half.add_(1.0)
        else:
            full[..., :HALF] = half
        return
    made = {
        "add": lambda: full + other,
        "linear": lambda: w.up(full.clone()),
        "same": lambda: full.view(full.shape),
        "low": lambda: full[..., :HALF],
        "high": lambda: full[..., HALF:],
        "join": lambda: torch.cat((half, take(pool, j, HALF)), -1),
        "read": lambda: F.pad(half, (0, HALF)),
    }[name]()
    pool.append(made)


def module_of(steps: list[Step], times: int) -> Small:
    def body(w: Small, x: Tensor) -> Any:
        pool = [x * 1.0, x[..., :HALF] * 1.0]
        for _ in range(times):
            for step in steps:
                perform(w, pool, step)
        return tuple(pool[-4:])

    return Small(body)


def outputs_of(gm: fx.GraphModule, expressions: dict[Any, int]) -> Any:
    """The outputs as numbers of expressions: operator, operands and shape, whatever the order of the nodes."""
    numbers: dict[fx.Node, int] = {}
    for place, node in enumerate(gm.graph.nodes):
        operands = str(fx.map_arg((node.args, node.kwargs), lambda source: f"#{numbers[source]}"))
        if node.op == "output":
            return operands
        what = node.target if node.op == "call_function" else place
        shape = str(getattr(node.meta.get("val"), "shape", None))
        numbers[node] = expressions.setdefault((node.op, what, operands, shape), len(expressions))
    return None


def normalised_both_ways(module: Small, ids: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found = []
    expressions: dict[Any, int] = {}

    def rewrite(gm: fx.GraphModule) -> fx.GraphModule:
        with monkeypatch.context() as patch:
            found.append(outputs_of(normalise(gm), expressions))
            patch.setattr(functional_trace, "RepeatingInterpreter", functional_trace.PropagateUnbackedSymInts)
            found.append(outputs_of(normalise(gm), expressions))
        return gm

    capture(module, ids, rewrite=rewrite)
    return found


PROGRAMS = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8
)


@given(PROGRAMS)
@example([("same", 0, 0), ("same", 0, 0), ("add_", 2, 2)])  # a copied view, whose base is written to
@example([("low", 0, 0), ("write_half", 0, 0), ("add", 0, 1)])  # a copied view that is written to
@example([("add", 0, 0), ("mul_", 0, 0), ("add", 0, 0)])  # a copy that is written to and read again
@example([("low", 0, 0), ("high", 0, 0), ("join", 0, 1), ("linear", 0, 0)])
def test_written_or_not_it_is_what_eager_computes(steps: list[Step]) -> None:
    assert_as_eager(module_of(steps, 3), {"input_ids": torch.randint(11, (2, 5))}, tolerance=1e-6)


@given(PROGRAMS)
def test_the_graph_is_the_one_that_recording_every_call_gives(steps: list[Step]) -> None:
    ids = {"input_ids": torch.randint(11, (2, 5))}
    with pytest.MonkeyPatch.context() as monkeypatch:
        copied, recorded = normalised_both_ways(module_of(steps, 3), ids, monkeypatch)
    assert copied == recorded


class Counting(RepeatingInterpreter):
    """Notes the calls that are recorded and the runs that are void."""

    recorded = 0
    void = 0

    def _record(self, *args: Any) -> Any:
        Counting.recorded += 1
        try:
            return super()._record(*args)
        except AliasWritten:
            Counting.void += 1
            raise


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(functional_trace, "RepeatingInterpreter", Counting)
    Counting.recorded = Counting.void = 0
    return Counting


def test_more_layers_record_no_more_calls(counting: type[Counting], ids: dict[str, Tensor]) -> None:
    steps: list[Step] = [("linear", 0, 0), ("low", 0, 0), ("high", 0, 0), ("join", 0, 1), ("add", 0, 1)]
    recorded = []
    for times in (3, 12):
        counting.recorded = 0
        capture(module_of(steps, times), ids, rewrite=normalise)
        recorded.append(counting.recorded)
    assert recorded[0] == recorded[1]
    assert counting.void == 0


@pytest.mark.parametrize(
    ("steps", "void"),
    [
        ([("same", 0, 0), ("same", 0, 0), ("add_", 2, 2)], True),
        ([("low", 0, 0), ("write_half", 0, 0)], True),
        ([("low", 0, 0), ("mul_", 0, 0)], True),
        ([("add", 0, 0), ("mul_", 0, 0)], False),
        ([("low", 0, 0), ("join", 0, 0), ("mul_", 0, 0)], False),
    ],
)
def test_a_run_is_void_where_a_copied_view_or_its_base_is_written_to(
    counting: type[Counting], ids: dict[str, Tensor], steps: list[Step], void: bool
) -> None:
    assert_as_eager(module_of(steps, 3), ids, tolerance=1e-6)
    assert bool(counting.void) is void


def test_changes_of_shape_in_place_are_made_each_time(ids: dict[str, Tensor]) -> None:
    def body(w: Small, x: Tensor) -> Tensor:
        for _ in range(3):
            y = x * 1.5
            y.unsqueeze_(0)
            x = w.up(y.sum(0)) + y[0]
        return x

    assert_as_eager(Small(body), ids, tolerance=1e-6)
