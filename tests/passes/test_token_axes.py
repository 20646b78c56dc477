"""Token-axis analysis: what is proven, with which axes, and what is refused, by name.

Every entry of the tables is a function of states x [B, S, D] and of a module with parameters; all entries are
captured in one graph and analysed there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured import run_until
from token_axes_table import PAIRS, REFUSED, ROWS, Entry, V, Weights
from torch import fx

from regate_fx.passes.axes import Axes, Cut, Token
from regate_fx.passes.base import Refused, operator_name
from regate_fx.passes.pipeline import PipelineRun
from regate_fx.passes.rules import Kind
from regate_fx.passes.token_axes import TokenAxes


def analyse(entries: list[Entry], B: int) -> tuple[TokenAxes, list[fx.Node], PipelineRun]:
    run = run_until("token_axes", Weights(entries), {"input_ids": torch.randint(V, (B, 7))})
    outputs = run.graph_module.graph.output_node().args[0]
    return run.context.findings["token_axes"], list(outputs)[: len(entries)], run  # type: ignore[arg-type]


def shown(axes: Axes) -> str:
    return ", ".join("*".join(map(_factor, dim)) or "1" for dim in axes.dims)


def _factor(factor: Any) -> str:
    if isinstance(factor, Token):
        return factor.value
    return f"S[{factor.head}:-{factor.tail}]" if isinstance(factor, Cut) else str(factor)


def without_batch(axes: str) -> str:
    """How the same axes show where B is 1: [B, S] is [1, S], [B*S] is [S]."""
    dims = [[factor for factor in dim.split("*") if factor != "B"] for dim in axes.split(", ")]
    return ", ".join("*".join(dim) or "1" for dim in dims)


def first_refusal(node: fx.Node, analysis: TokenAxes) -> Refused | None:
    """The refusal of the first node, in graph order, that lies between the states and `node`."""
    (states,) = (
        n for n in node.graph.nodes if operator_name(n) == "aten.embedding" and n.args[1].op == "placeholder"
    )
    for ancestor in sorted(ancestors(node), key=list(node.graph.nodes).index):
        if ancestor in analysis.unproven and states in ancestors(ancestor):
            return analysis.unproven[ancestor]
    return None


def ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo.extend(current.all_input_nodes)
    return seen


@pytest.fixture(scope="module", params=[2, 1], ids=["B=2", "B=1"])
def proven(request: pytest.FixtureRequest) -> tuple[int, TokenAxes, dict[str, fx.Node]]:
    table = {**ROWS, **PAIRS}
    analysis, nodes, _ = analyse([entry for entry, _ in table.values()], request.param)
    return request.param, analysis, dict(zip(table, nodes, strict=True))


@pytest.mark.parametrize("name", [*ROWS, *PAIRS])
def test_what_treats_tokens_alone_or_in_pairs_is_proven_with_its_axes(
    name: str, proven: tuple[int, TokenAxes, dict[str, fx.Node]]
) -> None:
    B, analysis, nodes = proven
    node = nodes[name]
    assert first_refusal(node, analysis) is None
    expected = {**ROWS, **PAIRS}[name][1]
    assert shown(analysis.of(node)) == (expected if B > 1 else without_batch(expected))
    paired = {ancestor for ancestor in ancestors(node) if analysis.kinds.get(ancestor) is Kind.PAIRS}
    assert bool(paired) == (name in PAIRS)


@pytest.fixture(scope="module")
def refused() -> tuple[TokenAxes, dict[str, fx.Node]]:
    analysis, nodes, _ = analyse([entry for entry, _, _ in REFUSED.values()], 2)
    return analysis, dict(zip(REFUSED, nodes, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_tokens_is_refused_by_name(
    name: str, refused: tuple[TokenAxes, dict[str, fx.Node]]
) -> None:
    analysis, nodes = refused
    refusal = first_refusal(nodes[name], analysis)
    assert refusal is not None
    code, operator = REFUSED[name][1:]
    assert code in refusal.code
    assert operator in refusal.reason or refusal.code in ("view", "broadcast")
    assert refusal.node is not None
    assert "token_axes_table.py" in refusal.refusal().source
