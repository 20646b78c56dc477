"""The runner: order, prerequisites, failures that name the pass, and the graph checked after each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from captured import run_on, run_until
from small_decoder import batch, decoder
from torch import fx

from regate_fx.errors import PassFailed
from regate_fx.passes.base import PassContext, PassResult, Refused, operator_name, source_line
from regate_fx.passes.brackets import OpenBrackets
from regate_fx.passes.checkpointing import InlineCheckpoints
from regate_fx.passes.functionalize import Functionalize
from regate_fx.passes.masked_rows import AddMaskedRows
from regate_fx.passes.pipeline import NORMALISE, PIPELINE, run_passes
from regate_fx.passes.sinks import FoldSinks
from regate_fx.passes.token_axes import AnalyseTokenAxes


@dataclass(frozen=True)
class Does:
    """A pass that does what it is told."""

    action: object
    name: str = "does"
    after: tuple[str, ...] = ()

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        self.action(gm)  # type: ignore[operator]
        return PassResult(gm, 1)


def fail(gm: fx.GraphModule) -> None:
    raise KeyError("broken")


def refuse(gm: fx.GraphModule) -> None:
    raise Refused("reason-code", "a sentence")


def test_every_pass_names_only_passes_that_come_before_it() -> None:
    names = [step.name for step in PIPELINE]
    assert len(set(names)) == len(names)
    for index, step in enumerate(PIPELINE):
        assert set(step.after) <= set(names[:index])


def test_a_missing_prerequisite_is_named() -> None:
    with pytest.raises(
        PassFailed, match="'token_axes' failed after \\[inline_checkpoints\\]: it needs find_plan"
    ):
        run_on(decoder(layers=1), batch(), (InlineCheckpoints(), AnalyseTokenAxes()))


def test_a_failing_pass_is_named_with_those_before_it() -> None:
    with pytest.raises(PassFailed, match=r"'does' failed after .*KeyError") as caught:
        run_on(decoder(layers=1), batch(), (*NORMALISE, Does(fail)))
    assert caught.value.name == "does"
    assert caught.value.before == tuple(step.name for step in NORMALISE)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_refusal_is_no_failure() -> None:
    with pytest.raises(Refused) as caught:
        run_on(decoder(layers=1), batch(), (*NORMALISE, Does(refuse)))
    assert caught.value.code == "reason-code"


def test_a_broken_graph_is_blamed_on_the_pass_that_broke_it() -> None:
    def forget(gm: fx.GraphModule) -> None:
        (node, *_) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        del node.meta["val"]

    with pytest.raises(PassFailed, match=r"'does' failed after .*: linear has no fake value"):
        run_on(decoder(layers=1), batch(), (*NORMALISE, Does(forget)))


def test_rewrites_and_seconds_are_kept_for_every_pass_and_dumps_are_called() -> None:
    dumped: list[str] = []

    def dump(name: str, gm: fx.GraphModule) -> None:
        gm.graph.lint()
        dumped.append(name)

    run = run_until("close_brackets", decoder(layers=1), batch())
    assert list(run.rewrites) == list(run.seconds) == [step.name for step in PIPELINE]
    assert all(seconds >= 0 for seconds in run.seconds.values())

    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    run_passes(fx.GraphModule({}, graph), PassContext(), (InlineCheckpoints(),), dump)
    assert dumped == ["inline_checkpoints"]


def test_normalisation_is_the_first_five_passes() -> None:
    assert [type(step) for step in NORMALISE] == [
        InlineCheckpoints,
        Functionalize,
        OpenBrackets,
        AddMaskedRows,
        FoldSinks,
    ]


def test_a_node_is_described_by_its_operator_and_its_source_line() -> None:
    run = run_until("token_axes", decoder(layers=1), batch())
    (node, *_) = run.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)
    assert operator_name(node) == "aten.gelu"
    line = source_line(node)
    assert line.startswith("small_decoder.py:")
    assert "F.gelu(self.up(self.norm(x)))" in line
    assert source_line(None) == ""
