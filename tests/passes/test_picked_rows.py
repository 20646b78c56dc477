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
    refusal_of,
    step,
)
from small_decoder import Block, D, Decoder, Extra, batch, causal_mask, decoder, some_active
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

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


PICKING: tuple[Extra, ...] = (
    looped, by_condition, by_number, by_columns, by_sample_and_position, put_back_by_order,
    in_groups,
)  # fmt: skip


@pytest.mark.parametrize("extra", PICKING, ids=lambda extra: extra.__name__)
@pytest.mark.parametrize("B", [3, 1])
def test_picked_rows_are_gated_and_right(extra: Extra, B: int) -> None:
    model = decoder(extra, layers=2)
    gated = gate(model)
    inputs, active = batch(B), some_active(B)
    assert_is_key_masked(gated, model, inputs, active)
    assert_elided_ids_do_not_matter(gated, inputs, active)
    assert_all_active_is_eager(gated, model, inputs)
    assert {layer.kind for layer in gated.report.layers} == {"varlen"}


@pytest.mark.parametrize("extra", [looped, by_condition, in_groups], ids=lambda extra: extra.__name__)
@pytest.mark.parametrize("scope", ["model", "layers"])
def test_inductor_compiles_picked_rows(extra: Extra, scope: str) -> None:
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


TYPED: tuple[Extra, ...] = (typed_by_condition, typed_by_place, typed_by_number, typed_by_order)


@pytest.mark.parametrize("extra", TYPED, ids=lambda extra: extra.__name__)
@pytest.mark.parametrize("B", [3, 1])
def test_rows_picked_by_what_is_no_state_are_picked_anew_among_the_active(extra: Extra, B: int) -> None:
    torch.manual_seed(0)
    model = TypedDecoder([TypedBlock(extra), TypedBlock(extra)])
    gated = gate(model)
    inputs, active = batch(B), some_active(B)
    assert_is_key_masked(gated, model, inputs, active)
    assert_all_active_is_eager(gated, model, inputs)
    assert {layer.kind for layer in gated.report.layers} == {"varlen"}


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


MIXING: dict[Extra, str] = {
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


@pytest.mark.parametrize("extra", MIXING, ids=lambda extra: extra.__name__)
def test_what_mixes_picked_rows_is_never_gated(extra: Extra) -> None:
    model = decoder(extra, layers=1)
    gated = gate(model)
    refusal = refusal_of(gated, model, batch(3))
    reasons = (
        [refusal] if refusal else [layer.reason for layer in gated.report.layers if layer.kind == "dense"]
    )
    assert reasons
    assert all(re.search(MIXING[extra], reason) for reason in reasons)
