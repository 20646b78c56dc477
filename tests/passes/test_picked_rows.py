"""Experts that pick the tokens they compute: whatever the way, each token is its own; or the layer is not gated.

Shapes: B samples, S positions, N = B * S tokens, D hidden size, E experts, K of them for each token, M picked rows.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gating import (
    assert_all_active_is_eager,
    assert_elided_ids_do_not_matter,
    assert_is_key_masked,
    assert_same_step,
    gate,
    step,
    why_dense,
)
from small_decoder import Block, D, Decoder, Extra, batch, causal_mask, decoder, some_active
from tiers import tiers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from regate_fx.errors import NotGateable

E, K = 4, 2


def routed(b: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N, D], the weights [N, K] of their experts, and which ones these are [N, K]."""
    tokens = x.reshape(-1, D)
    weights, chosen = (tokens @ b.weight[:, :E]).softmax(-1).topk(K, -1)
    return tokens, weights, chosen


def expert(b: Block, index: int, rows: Tensor) -> Tensor:
    return F.gelu(b.q(rows) * b.table[index]) @ b.weight


def looped(b: Block, x: Tensor, m: Any) -> Tensor:
    """As Mixtral had it."""
    tokens, weights, chosen = routed(b, x)
    result = torch.zeros_like(tokens)
    mask = F.one_hot(chosen, E).permute(2, 1, 0)
    for index in range(E):
        choice, token = torch.where(mask[index])
        rows = tokens[None, token].reshape(-1, D)
        result.index_add_(0, token, expert(b, index, rows) * weights[token, choice, None])
    return result.view(x.shape)


def by_condition(b: Block, x: Tensor, m: Any) -> Tensor:
    """As DeepSeek had it: every token once for each choice, the condition computed anew for each use."""
    tokens, weights, chosen = routed(b, x)
    repeated, ids = tokens.repeat_interleave(K, dim=0), chosen.view(-1)
    result = torch.empty_like(repeated)
    for index in range(E):
        result[ids == index] = expert(b, index, repeated[ids == index])
    return (result.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1).view(x.shape)


def by_number(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, weights, chosen = routed(b, x)
    result = torch.zeros_like(tokens)
    for index in range(E):
        is_chosen = chosen == index
        rows = is_chosen.any(-1).nonzero().squeeze(-1)
        share = (weights * is_chosen).sum(-1)
        computed = expert(b, index, tokens.index_select(0, rows))
        result = result.index_put((rows,), computed * share[rows, None], accumulate=True)
    return result.view(x.shape)


def by_columns(b: Block, x: Tensor, m: Any) -> Tensor:
    """Written, not added: no token has an expert twice."""
    tokens, weights, chosen = routed(b, x)
    result = torch.zeros_like(tokens)
    for index in range(E):
        places = (chosen == index).nonzero()
        rows, choice = places[:, 0], places[:, 1]
        result[rows] = result[rows] + expert(b, index, tokens[rows]) * weights[rows, choice].unsqueeze(-1)
    return result.view(x.shape)


def by_sample_and_position(b: Block, x: Tensor, m: Any) -> Tensor:
    y = torch.zeros_like(x)
    sample, position = torch.where(x[..., 0] > 0)
    y[sample, position] = expert(b, 0, x[sample, position])
    other = ~(x[..., 0] > 0)
    y[other] = expert(b, 1, x[other])
    return y


def put_back_by_order(b: Block, x: Tensor, m: Any) -> Tensor:
    """(token, choice) rows sorted by expert, and written to where they came from."""
    tokens, weights, chosen = routed(b, x)
    ids, order = chosen.reshape(-1).sort()
    computed = F.gelu(b.q(tokens[order // K]) * b.table[ids]) @ b.weight
    result = torch.empty_like(computed)
    result[order] = computed
    added = torch.zeros_like(tokens).index_add(0, order // K, computed)
    return ((result.view(-1, K, D) * weights[..., None]).sum(1) + added).view(x.shape)


def in_groups(b: Block, x: Tensor, m: Any) -> Tensor:
    """As JetMoE has it: sorted rows split into one group for each expert, by sizes read from a tensor."""
    tokens, weights, chosen = routed(b, x)
    sizes = torch.zeros(tokens.shape[0], E).scatter(1, chosen, 1).long().sum(0).tolist()
    order = chosen.flatten().sort(0)[1]
    rows = order.div(K, rounding_mode="trunc")
    groups = tokens[rows].split(sizes, dim=0)
    computed = torch.cat([expert(b, index, group) for index, group in enumerate(groups)])
    shares = weights.flatten()[order]
    return torch.zeros_like(tokens).index_add(0, rows, computed * shares[:, None]).view(x.shape)


def in_counted_groups(b: Block, x: Tensor, m: Any) -> Tensor:
    """Numbers of rows from the sorted ids, and the way back from the order."""
    tokens, weights, chosen = routed(b, x)
    ids = chosen.flatten()
    order = ids.argsort()
    sizes = torch.histc(ids[order].float(), bins=E, min=0, max=E - 1).long().tolist()
    groups = tokens[order // K].split(sizes)
    computed = torch.cat([expert(b, index, group) for index, group in enumerate(groups)])
    return (computed[order.argsort()].view(-1, K, D) * weights[..., None]).sum(1).view(x.shape)


PICKING: tuple[Extra, ...] = (
    looped, by_condition, by_number, by_columns, by_sample_and_position, put_back_by_order,
    in_groups, in_counted_groups,
)  # fmt: skip


# A single sample has another trace.
PICKED = [(extra, B) for extra in PICKING for B in (3, 1)]
IN_SEVERAL = [(extra, 3) for extra in PICKING]


@pytest.mark.parametrize("case", tiers(PICKED, *IN_SEVERAL, (looped, 1), (in_groups, 1)))
def test_picked_rows_are_gated_and_right(case: tuple[Extra, int]) -> None:
    extra, B = case
    model = decoder(extra, layers=2)
    gated = gate(model)
    inputs, active = batch(B), some_active(B)
    assert_is_key_masked(gated, model, inputs, active)
    assert_elided_ids_do_not_matter(gated, inputs, active)
    assert_all_active_is_eager(gated, model, inputs)
    assert {layer.kind for layer in gated.report.layers} == {"varlen"}


WITH_INDUCTOR = [
    (extra, scope) for extra in (looped, by_condition, in_groups) for scope in ("model", "layers")
]


@pytest.mark.parametrize("case", tiers(WITH_INDUCTOR, (by_condition, "model")))
def test_inductor_compiles_picked_rows(case: tuple[Extra, str]) -> None:
    extra, scope = case
    model = decoder(extra, layers=2)
    gated = gate(model, backend="inductor", scope=scope)
    for B, S in ((3, 7), (2, 9)):
        assert_is_key_masked(gated, model, batch(B, S), some_active(B, S))


@pytest.mark.parametrize("extra", [looped, by_condition, in_groups], ids=lambda extra: extra.__name__)
def test_an_expert_may_have_no_active_token(extra: Extra) -> None:
    model = decoder(extra, layers=1)
    active = torch.zeros(2, 7, dtype=torch.bool)
    active[0, 3] = active[1, 2] = True
    assert_is_key_masked(gate(model), model, batch(2), active)


def test_the_dense_reference_leaves_picked_rows_alone() -> None:
    model = decoder(looped, layers=1)
    inputs, active = batch(3), some_active(3)
    seen = step(gate(model, reference=True), **inputs, token_mask=active)
    assert_same_step(seen, step(gate(model), **inputs, token_mask=active))


class TypedBlock(Block):
    """Tokens of one type, which their ids tell, have an expert of their own."""

    def forward(self, x: Tensor, given: Any) -> Tensor:
        mask, is_typed = given
        x = x + self.attend(self.attention_norm(x), mask)
        assert self.extra is not None
        return x + self.extra(self, self.norm(x), is_typed)


class TypedDecoder(Decoder):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CausalLMOutput:
        x = self.embedding(input_ids)
        given = causal_mask(attention_mask, input_ids.shape[1]), input_ids % 3 == 0
        for layer in self.layers:
            x = layer(x, given)
        logits = self.head(self.final_norm(x))
        return CausalLMOutput(loss=None if labels is None else self.loss(logits, labels), logits=logits)


def typed_by_condition(b: Block, x: Tensor, is_typed: Any) -> Tensor:
    y = torch.empty_like(x)
    y[is_typed] = expert(b, 0, x[is_typed])
    y[~is_typed] = expert(b, 1, x[~is_typed])
    return y


def typed_by_place(b: Block, x: Tensor, is_typed: Any) -> Tensor:
    sample, position = torch.where(is_typed)
    y = torch.zeros_like(x)
    y[sample, position] = expert(b, 0, x[sample, position])
    return y


def typed_by_number(b: Block, x: Tensor, is_typed: Any) -> Tensor:
    rows = is_typed.flatten().nonzero().squeeze(1)
    tokens = x.reshape(-1, D)
    return torch.zeros_like(tokens).index_add(0, rows, expert(b, 0, tokens[rows])).view(x.shape)


def typed_by_order(b: Block, x: Tensor, is_typed: Any) -> Tensor:
    order = is_typed.flatten().long().argsort()
    computed = expert(b, 0, x.reshape(-1, D)[order])
    result = torch.empty_like(computed)
    result[order] = computed
    return result.view(x.shape)


def typed_in_groups(b: Block, x: Tensor, is_typed: Any) -> Tensor:
    tokens, ids = x.reshape(-1, D), is_typed.flatten().long()
    sizes = F.one_hot(ids, 2).sum(0).tolist()
    order = ids.argsort()
    groups = [expert(b, index, group) for index, group in enumerate(tokens[order].split(sizes))]
    return torch.zeros_like(tokens).index_add(0, order, torch.cat(groups)).view(x.shape)


def typed_by_inverse(b: Block, x: Tensor, is_typed: Any) -> Tensor:
    order = is_typed.flatten().long().argsort()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return expert(b, 0, x.reshape(-1, D)[order])[inverse].view(x.shape)


def typed_by_argsort_of_order(b: Block, x: Tensor, is_typed: Any) -> Tensor:
    order = is_typed.flatten().long().argsort()
    return expert(b, 0, x.reshape(-1, D)[order])[order.argsort()].view(x.shape)


TYPED: tuple[Extra, ...] = (
    typed_by_condition, typed_by_place, typed_by_number, typed_by_order, typed_by_argsort_of_order,
)  # fmt: skip


TYPED_ROWS = [(extra, B) for extra in TYPED for B in (3, 1)]
TYPED_IN_SEVERAL = [(extra, 3) for extra in TYPED]


@pytest.mark.parametrize("case", tiers(TYPED_ROWS, *TYPED_IN_SEVERAL, (typed_by_order, 1)))
def test_rows_picked_by_what_is_no_state_are_picked_anew_among_the_active(case: tuple[Extra, int]) -> None:
    extra, B = case
    torch.manual_seed(0)
    model = TypedDecoder([TypedBlock(extra), TypedBlock(extra)])
    gated = gate(model)
    inputs, active = batch(B), some_active(B)
    assert_is_key_masked(gated, model, inputs, active)
    assert_all_active_is_eager(gated, model, inputs)
    assert {layer.kind for layer in gated.report.layers} == {"varlen"}


@pytest.mark.parametrize("extra", [typed_in_groups, typed_by_inverse], ids=lambda extra: extra.__name__)
@pytest.mark.parametrize("B", [3, 1])
def test_what_is_counted_or_numbered_at_every_position_is_right_or_refused(extra: Extra, B: int) -> None:
    torch.manual_seed(0)
    model = TypedDecoder([TypedBlock(extra)])
    wanted = {
        "typed_in_groups": "counted at other positions",
        "typed_by_inverse": "of unknown meaning" * (B == 1),
    }
    assert re.search(wanted[extra.__name__], refused_or_right(model, B))


def refused_or_right(model: Decoder, B: int) -> str:
    """Why a call is refused; nothing where it is right."""
    try:
        assert_is_key_masked(gate(model), model, batch(B), some_active(B))
    except NotGateable as refused:
        return str(refused)
    return ""


def test_picked_rows_are_picked_again_where_a_layer_is_recomputed() -> None:
    model = decoder(looped, layers=2)
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    gated = gate(model, backend="aot_eager")
    assert_is_key_masked(gated, model, batch(3), some_active(3))
    assert {layer.kind for layer in gated.report.layers} == {"varlen"}


def _picked(x: Tensor) -> tuple[Tensor, Tensor]:
    tokens = x.reshape(-1, D)
    return tokens, (tokens[:, 0] > 0).nonzero().squeeze(-1)


def numbers_as_values(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return torch.zeros_like(tokens).index_add(0, rows, tokens[rows] * rows[:, None]).view(x.shape)


def reshaped_numbers(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    scale = rows[:, None].expand(-1, D).float()
    return torch.zeros_like(tokens).index_add(0, rows, tokens[rows] * scale).view(x.shape)


def numbers_in_a_table(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return torch.zeros_like(tokens).index_add(0, rows, tokens[rows] * b.table[rows]).view(x.shape)


def count_as_a_value(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return torch.zeros_like(tokens).index_add(0, rows, tokens[rows] / (rows.shape[0] + 1)).view(x.shape)


def rows_before(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return torch.zeros_like(tokens).index_add(0, rows, tokens[(rows - 1).clamp(min=0)]).view(x.shape)


def other_way_round(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return torch.zeros_like(tokens).index_add(0, rows, tokens[rows].flip(0)).view(x.shape)


def written_the_other_way_round(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return torch.zeros_like(tokens).index_add(0, rows.flip(0), tokens[rows]).view(x.shape)


def softmax_of_picked(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return torch.zeros_like(tokens).index_add(0, rows, tokens[rows].softmax(0)).view(x.shape)


def centred_among_picked(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return torch.zeros_like(tokens).index_add(0, rows, tokens[rows] - tokens[rows].mean(0)).view(x.shape)


def picked_by_position(b: Block, x: Tensor, m: Any) -> Tensor:
    (places,) = torch.where(torch.arange(x.shape[1]) % 2 == 0)
    y = torch.zeros_like(x)
    y[:, places] = x[:, places] * b.scale
    return y


def picked_by_sample(b: Block, x: Tensor, m: Any) -> Tensor:
    y = torch.zeros_like(x)
    of_sample = x.sum((1, 2)) > 0
    y[of_sample] = x[of_sample] * b.scale
    return y


def unsorted_order(b: Block, x: Tensor, m: Any) -> Tensor:
    """Rows in the order of one expert, put back in that of another."""
    tokens, _, chosen = routed(b, x)
    first, second = chosen[:, 0].argsort(), chosen[:, 1].argsort()
    result = torch.empty_like(tokens)
    result[second] = tokens[first]
    return result.view(x.shape)


def reshaped_order(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, _, chosen = routed(b, x)
    order = chosen[:, 0].argsort().view(-1, 1).expand(-1, D)
    return (tokens * order.float()).view(x.shape)


def groups_of_other_experts(b: Block, x: Tensor, m: Any) -> Tensor:
    """Sorted by one choice, and split by how many chose each expert with the other."""
    tokens, _, chosen = routed(b, x)
    sizes = F.one_hot(chosen[:, 1], E).sum(0).tolist()
    order = chosen[:, 0].argsort()
    groups = tokens[order].split(sizes, dim=0)
    computed = torch.cat([expert(b, index, group) for index, group in enumerate(groups)])
    return torch.zeros_like(tokens).index_add(0, order, computed).view(x.shape)


def falling_groups(b: Block, x: Tensor, m: Any) -> Tensor:
    """Rows by falling ids, split by numbers that go by rising ones: which expert a row meets hangs on the others."""
    tokens, _, chosen = routed(b, x)
    sizes = F.one_hot(chosen[:, 0], E).sum(0).tolist()
    order = chosen[:, 0].argsort(descending=True)
    groups = tokens[order].split(sizes, dim=0)
    computed = torch.cat([expert(b, index, group) for index, group in enumerate(groups)])
    return torch.zeros_like(tokens).index_add(0, order, computed).view(x.shape)


def groups_in_another_order(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, _, chosen = routed(b, x)
    sizes = F.one_hot(chosen[:, 0], E).sum(0).tolist()
    order = chosen[:, 0].argsort()
    computed = torch.cat(tokens[order].split(sizes, dim=0)[::-1])
    return torch.zeros_like(tokens).index_add(0, order, computed).view(x.shape)


def group_sizes_as_values(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, _, chosen = routed(b, x)
    sizes = F.one_hot(chosen[:, 0], E).sum(0).tolist()
    order = chosen[:, 0].argsort()
    computed = torch.cat([group / size for group, size in zip(tokens[order].split(sizes), sizes)])  # noqa: B905
    return torch.zeros_like(tokens).index_add(0, order, computed).view(x.shape)


def put(tokens: Tensor, rows: Tensor, values: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(tokens).index_add(0, rows, values).view(x.shape)


def reordered(tokens: Tensor, ids: Tensor, others: Tensor, x: Tensor) -> Tensor:
    """Rows sorted by some ids, put back where they would belong if they had been sorted by others."""
    times = ids.numel() // tokens.shape[0] if ids.dim() > 1 else 1
    repeated = tokens.repeat_interleave(times, 0)
    result = torch.empty_like(repeated)
    result[others.flatten().argsort()] = repeated[ids.flatten().argsort()]
    return result.view(-1, times, D).sum(1).view(x.shape)


def count_in_a_scale(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return put(tokens, rows, tokens[rows] * (b.scale / (rows.shape[0] + 1)), x)


def count_in_a_table(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return put(tokens, rows, tokens[rows] * b.table[rows.shape[0]], x)


def count_by_a_sum(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return put(tokens, rows, tokens[rows] / (torch.ones(rows.shape[0]).sum() + 1), x)


def count_by_a_product(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    M = rows.shape[0]
    return put(tokens, rows, tokens[rows] * (torch.ones(1, M) @ torch.ones(M, 1)), x)


def count_by_a_broadcast(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return put(tokens, rows, tokens[rows] * b.scale[:1].expand(rows.shape[0]).sum(), x)


def count_of_features(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return (tokens * (tokens @ b.table.T)[:, : rows.shape[0]].sum(-1, keepdim=True)).view(x.shape)


def sizes_of_features(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, _, chosen = routed(b, x)
    sizes = F.one_hot(chosen[:, 0], E).sum(0).tolist()
    order = chosen[:, 0].argsort()
    computed = [
        group * (group @ b.table.T).split([size, 64 - size], 1)[0].sum(1, keepdim=True)
        for group, size in zip(tokens[order].split(sizes), sizes)  # noqa: B905
    ]
    return put(tokens, order, torch.cat(computed), x)


def numbers_one_hot(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    wide = tokens[rows] @ b.table.T
    ones = torch.zeros_like(wide).scatter(1, rows[:, None], 1.0)
    return put(tokens, rows, tokens[rows] * (ones @ b.table), x)


def order_one_hot(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, _, chosen = routed(b, x)
    order = chosen[:, 0].argsort()
    wide = tokens[order] @ b.table.T
    ones = torch.zeros_like(wide).scatter(1, order[:, None], 1.0)
    return put(tokens, order, tokens[order] * (ones @ b.table), x)


def numbers_as_bools(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return put(tokens, rows, tokens[rows.bool().long()], x)


def numbers_in_a_softmax(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return put(tokens, rows, tokens[rows[:, None].float().softmax(-1).squeeze(-1).long()], x)


def numbers_projected(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    half = F.linear(rows[:, None].float(), torch.full((1, 1), 0.5)).squeeze(-1).long()
    return put(tokens, rows, tokens[half], x)


def numbers_of_the_largest(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, rows = _picked(x)
    return put(tokens, rows, tokens[rows[:, None].argmax(-1)], x)


def other_view_selected(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens = x.reshape(-1, D)
    ids = (tokens[:, :4] * 3).long()
    first, second = ids.view(-1, 2, 2).select(2, 0), ids.view(-1, 1, 2, 2).select(2, 0)
    return reordered(tokens, first, second.reshape(-1, 2), x)


def other_broadcast(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens = x.reshape(-1, D)
    pairs, limits = tokens[:, :4].reshape(-1, 2, 2), b.scale[:2]
    return reordered(tokens, (pairs > limits.view(2, 1)).long(), (pairs > limits.view(1, 2)).long(), x)


def narrowed_ids(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, _, chosen = routed(b, x)
    ids = chosen[:, 0] * 100
    return reordered(tokens, ids, ids.to(torch.int8), x)


def ids_as_other_bits(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, _, chosen = routed(b, x)
    ids = (chosen[:, 0] - 2).to(torch.int8)
    return reordered(tokens, ids, ids.view(torch.uint8), x)


class Sort(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, ids: Tensor) -> Tensor:
        order = ids.argsort()
        ctx.save_for_backward(order)
        return tokens[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        result = torch.empty_like(grad)
        result[ctx.saved_tensors[0]] = grad
        return result, None


class PutBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor) -> Tensor:
        order = ids.argsort()
        ctx.save_for_backward(order)
        result = torch.empty_like(rows)
        result[order] = rows
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[ctx.saved_tensors[0]], None


def functions_of_other_ids(b: Block, x: Tensor, m: Any) -> Tensor:
    tokens, _, chosen = routed(b, x)
    return PutBack.apply(Sort.apply(tokens, chosen[:, 0]), chosen[:, 1]).view(x.shape)


def sorted_twice(b: Block, x: Tensor, m: Any) -> Tensor:
    """Rows of one expert may come in another order each time."""
    tokens, _, chosen = routed(b, x)
    return reordered(tokens, chosen[:, 0], chosen[:, 0], x)


MIXING: dict[Extra, str] = {
    sorted_twice: "pairs different axes",
    count_in_a_scale: "aten.div computes with how many tokens were picked",
    count_in_a_table: "aten.select computes with how many tokens were picked",
    count_by_a_sum: "a dimension is as long as tokens were picked",
    count_by_a_product: "a dimension is as long as tokens were picked",
    count_by_a_broadcast: "a dimension is as long as tokens were picked",
    count_of_features: "a dimension is as long as tokens were picked",
    sizes_of_features: "a dimension is as long as tokens were picked|reads a number from token content",
    numbers_one_hot: "aten.scatter computes with row numbers",
    order_one_hot: "aten.scatter computes with row numbers",
    numbers_as_bools: "unknown meaning",
    numbers_in_a_softmax: "unknown meaning|computes with row numbers",
    numbers_projected: "unknown meaning|computes with row numbers",
    numbers_of_the_largest: "unknown meaning|computes with row numbers",
    other_view_selected: "pairs different axes",
    other_broadcast: "pairs different axes",
    narrowed_ids: "pairs different axes",
    ids_as_other_bits: "pairs different axes",
    functions_of_other_ids: "aten.index_put writes to rows of a token axis by number",
    numbers_as_values: "aten.mul computes with row numbers",
    reshaped_numbers: "computes with row numbers",
    numbers_in_a_table: "aten.index computes with row numbers",
    count_as_a_value: "aten.div computes with how many tokens were picked",
    rows_before: "aten.sub computes with row numbers",
    other_way_round: "aten.flip runs along token positions",
    written_the_other_way_round: "aten.flip runs along token positions",
    softmax_of_picked: "aten.softmax reduces over token positions",
    centred_among_picked: "spreads a sum over tokens",
    picked_by_position: "a size is read from data|not over single token rows",
    picked_by_sample: "a size is read from data|aten.sum|not over single token rows",
    unsorted_order: "writes values of other rows|pairs different axes",
    groups_of_other_experts: "aten.item reads a number from token content",
    falling_groups: "aten.item reads a number from token content",
    groups_in_another_order: "not all groups in their order",
    group_sizes_as_values: "aten.item reads a number from token content",
    reshaped_order: "aten.mul pairs different axes",
}


# One for every reason, always.
OTHER_REASONS = {reason: extra for extra, reason in reversed(MIXING.items())}


@pytest.mark.parametrize("extra", tiers(MIXING, *OTHER_REASONS.values()))
def test_what_mixes_picked_rows_is_never_gated(extra: Extra) -> None:
    model = decoder(extra, layers=1)
    reasons = why_dense(gate(model), model, batch(3))
    assert reasons
    assert all(re.search(MIXING[extra], reason) for reason in reasons), reasons
