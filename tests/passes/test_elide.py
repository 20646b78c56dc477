"""The rewrite as a whole: operators before and after, numbers, and what cannot be made anew for the active rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import calls, operators, run_until
from gating import (
    assert_all_active_is_eager,
    assert_elided_ids_do_not_matter,
    assert_is_key_masked,
    gate,
)
from small_decoder import Block, Decoder, Loss, V, batch, decoder, heads, hide, merge_heads, some_active
from torch import Tensor

from regate_fx.errors import NotGateable
from regate_fx.passes.base import operator_name

S = 7


def pairs(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return hide(torch.sin(block.q(x) @ block.k(x).mT), mask).softmax(-1) @ block.v(x)


def test_operators_before_and_after() -> None:
    inputs = batch(padded=True)
    before = operators(run_until("place", Loss(decoder(layers=3)), inputs, some_active()).graph_module)
    run = run_until("remove_unused", Loss(decoder(layers=3)), inputs, some_active())
    after = operators(run.graph_module)

    assert run.rewrites["elide_tokens"] == 3
    assert before["aten.scaled_dot_product_attention"] == 3
    assert after["aten.scaled_dot_product_attention"] == 0
    assert after["regate_fx.varlen_attention"] == 3
    for name in ("aten.linear", "aten.layer_norm", "aten.gelu"):
        assert before[name] == after[name]
    # Gathered are the ids and the rows of learned positions, before the first layer; no states are moved anywhere.
    assert after["regate_fx.take_rows"] == 0
    assert after["aten.index_select"] == 1
    tokens, positions = calls(run.graph_module, "aten.embedding")
    rows = run.context.findings["plan"].rows.meta["val"].shape[0]
    assert str(tokens.meta["val"].shape[1]) == str(rows)
    assert positions.meta["val"].dim() == 2


def test_no_logits_for_all_positions() -> None:
    run = run_until("remove_unused", Loss(decoder()), batch(), some_active())
    symbols = run.context.findings["symbols"]
    wide = [
        node
        for node in run.graph_module.graph.nodes
        if isinstance(value := node.meta.get("val"), torch.Tensor)
        and value.is_floating_point()
        and value.dim() > 1
        and any(not isinstance(n, int) and n.node.expr == symbols.length for n in value.shape)
        and node.op == "call_function"
    ]
    # What still has S is no wider than a number per position, or depends on positions alone.
    assert all(node.meta["val"].dim() == 2 for node in wide)
    assert not any(node.meta["val"].shape[-1] == V for node in wide)


def test_one_scatter_where_logits_are_wanted() -> None:
    run = run_until("remove_unused", Loss(decoder(layers=3), logits=True), batch(), some_active())
    # The stream before the first layer is gathered, the one after the last scattered, the logits gathered.
    assert operators(run.graph_module)["regate_fx.take_rows"] == 3
    where, _ = calls(run.graph_module, "aten.where")  # the other one places the labels
    scattered, base = where.args[1:]
    assert operators_above(scattered)["regate_fx.varlen_attention"] == 3
    assert operators_above(base)["regate_fx.varlen_attention"] == 0
    assert operator_name(base) == "aten.detach"


def operators_above(node: Any) -> Counter[str]:
    """How often each operator is called in what `node` is computed from."""
    seen: set[Any] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo.extend(current.all_input_nodes)
    return Counter(operator_name(n) for n in seen if n.op == "call_function")


def test_pairs_are_computed_over_slots() -> None:
    run = run_until("remove_unused", Loss(decoder(pairs)), batch(), some_active())
    slots = run.context.findings["plan"].slot_rows.meta["val"].shape[1]
    for node in calls(run.graph_module, "aten.softmax"):
        assert [str(size) for size in node.meta["val"].shape[-2:]] == [str(slots)] * 2
    assert operators(run.graph_module)["aten.softmax"] == 2


@pytest.mark.parametrize("extra", [None, pairs], ids=["kernel", "compact"])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_numbers(extra: Callable[..., Tensor] | None, B: int, padded: bool) -> None:
    model = decoder(extra)
    gated = gate(model)
    inputs, active = batch(B, S, padded=padded), some_active(B, S)
    assert_is_key_masked(gated, model, inputs, active)
    assert_elided_ids_do_not_matter(gated, inputs, active)
    assert_all_active_is_eager(gated, model, batch(B, S))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scores_that_are_turned_around(scale: float) -> None:
    """Kernels that hide scores by minus infinity, and scale them then, would show what is hidden."""

    class Scaled(Block):
        def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = (heads(project(x)) for project in (self.q, self.k, self.v))
            assert mask is not None
            return self.o(merge_heads(F.scaled_dot_product_attention(q, k, v, mask, scale=scale)))

    model = Decoder([Scaled(), Scaled()])
    inputs, active = batch(padded=True), some_active()
    gated = gate(model)
    assert_is_key_masked(gated, model, inputs, active)
    whole = dict(batch(), attention_mask=torch.ones(2, S, dtype=torch.int64))
    assert_all_active_is_eager(gated, model, whole)
    assert {layer.attention for layer in gated.report.layers} == {"causal, proven from the mask"}


@pytest.mark.parametrize("active", [1, 2, S], ids=lambda n: f"{n} active")
def test_numbers_at_the_edges(active: int) -> None:
    model = decoder(pairs)
    mask = torch.zeros(2, S, dtype=torch.bool)
    mask[0, :active] = True
    assert_is_key_masked(gate(model), model, batch(2, S), mask)


def test_kept_logits_show_the_passed_through_state_at_elided_positions() -> None:
    model = decoder()
    inputs, active = batch(), some_active()
    out = gate(model, keep_logits=True)(**inputs, token_mask=active)

    entering = model.embedding(inputs["input_ids"]) + model.positions(torch.arange(S))
    torch.testing.assert_close(out.logits[~active], model.head(model.final_norm(entering))[~active])
    masked = model(inputs["input_ids"], attention_mask=active.long()).logits
    torch.testing.assert_close(out.logits[active], masked[active], rtol=1e-4, atol=1e-5)


def by_length(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return x * x.shape[1]


def by_batch(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return x / (x.shape[0] + 1)


def by_root_of_length(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return x / math.sqrt(x.shape[1])


def by_float_of_length(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return x * (1.0 / x.shape[1])


def filled_with_length(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return x * x.new_full((x.shape[0], x.shape[1], 1), x.shape[1])


def full_of_length(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return x * torch.full((x.shape[0], x.shape[1], 1), x.shape[1])


def scores_by_length(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return hide(x @ x.mT / x.shape[1], mask).softmax(-1) @ x


SIZES = (
    by_length, by_batch, by_root_of_length, by_float_of_length, filled_with_length, full_of_length, scores_by_length,
)  # fmt: skip


@pytest.mark.parametrize("extra", SIZES, ids=lambda extra: extra.__name__)
def test_a_size_used_as_a_number_keeps_its_value_or_is_refused(extra: Callable[..., Tensor]) -> None:
    """N and L are not S: what is computed with S itself must not be made anew from them."""
    model = decoder(extra)
    gated = gate(model)
    try:
        assert_all_active_is_eager(gated, model, batch(3, S))
    except NotGateable as refused:
        reason = str(refused)
        assert "size" in reason
        return
    assert_is_key_masked(gated, model, batch(3, S), some_active(3))


def position_over_length(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return x * (torch.arange(x.shape[1]) / x.shape[1])[:, None]


def position_over_root(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    return x * (torch.arange(x.shape[1]) / math.sqrt(x.shape[1]))[:, None]


@pytest.mark.parametrize("extra", [position_over_length, position_over_root], ids=lambda e: e.__name__)
def test_sizes_outside_the_rows_stay_what_they_were(extra: Callable[..., Tensor]) -> None:
    model = decoder(extra)
    gated = gate(model)
    assert_is_key_masked(gated, model, batch(), some_active())
    assert gated.report.layers[0].kind == "varlen"
