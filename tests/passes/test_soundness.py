"""Decoders whose layers do all sorts of things to their tokens: a gated result is right, or the layer is not gated.

Each entry adds `extra(block, x, mask)` to the residual stream of every layer; x [B, S, D].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
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
    why_dense,
)
from small_decoder import Block, D, H, batch, decoder, heads, hide, sequence_first_attention, some_active
from torch import Tensor

Extra = Callable[[Block, Tensor, Any], Tensor]


def sequence_first(b: Block, x: Tensor, m: Any) -> Tensor:
    y = x.transpose(0, 1).reshape(-1, D)
    return F.gelu(y @ b.weight).view(x.shape[1], x.shape[0], D).transpose(0, 1)


def row_numbers(b: Block, x: Tensor, m: Any) -> Tensor:
    numbers = torch.arange(x.shape[0] * x.shape[1])
    return (x.reshape(-1, D) * numbers[:, None] / 10).view(x.shape)


def embedded_row_numbers(b: Block, x: Tensor, m: Any) -> Tensor:
    return x * F.embedding(torch.arange(x.shape[0] * x.shape[1]), b.table).view(x.shape)


def looked_up_row_numbers(b: Block, x: Tensor, m: Any) -> Tensor:
    return x * b.table[torch.arange(x.shape[0] * x.shape[1])].view(x.shape)


def alibi(b: Block, x: Tensor, m: Any) -> Tensor:
    i = torch.arange(x.shape[1])
    return hide(x @ x.mT - 0.3 * (i[:, None] - i).abs(), m).softmax(-1) @ x


def relative_bias(b: Block, x: Tensor, m: Any) -> Tensor:
    i = torch.arange(x.shape[1])
    bias = F.embedding((i[:, None] - i).clamp(-5, 5) + 5, b.table)[..., 0]
    return hide(x @ x.mT + bias, m).softmax(-1) @ x


def learned_mask(b: Block, x: Tensor, m: Any) -> Tensor:
    """A bias that is learned, added by the attention operator as its mask: its gradient must not get lost."""
    i = torch.arange(x.shape[1])
    bias = F.embedding((i[:, None] - i).clamp(-5, 5) + 5, b.table).permute(2, 0, 1)[None, :H]
    mask = hide(bias.expand(x.shape[0], -1, -1, -1), m)
    return (
        F.scaled_dot_product_attention(heads(x), heads(x), heads(x), attn_mask=mask)
        .transpose(1, 2)
        .flatten(2)
    )


def in_place_mask(b: Block, x: Tensor, m: Any) -> Tensor:
    scores = hide(x @ b.weight @ x.mT, m)
    scores.masked_fill_(scores > 3, 3.0)
    return scores.softmax(-1) @ x


def token_pair_condition(b: Block, x: Tensor, m: Any) -> Tensor:
    larger = x[:, :, None, 0] > x[:, None, :, 0]
    return hide(torch.where(larger, x @ x.mT, 0.0), m).softmax(-1) @ x


def distances(b: Block, x: Tensor, m: Any) -> Tensor:
    return hide(-(x[:, :, None] - x[:, None]).pow(2).sum(-1), m).softmax(-1) @ x


def without_softmax(b: Block, x: Tensor, m: Any) -> Tensor:
    return hide(x @ x.mT, m).sigmoid() @ x


def by_logsumexp(b: Block, x: Tensor, m: Any) -> Tensor:
    scores = hide(x @ x.mT, m)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ x


def by_amax(b: Block, x: Tensor, m: Any) -> Tensor:
    scores = hide(x @ x.mT, m)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ x


def with_sink(b: Block, x: Tensor, m: Any) -> Tensor:
    """The sum over keys meets rows again before it divides pairs."""
    weights = hide(0.1 * x @ x.mT, m).exp()
    return (weights / (weights.sum(-1, keepdim=True) + b.scale[0].exp())) @ x


def by_einsum(b: Block, x: Tensor, m: Any) -> Tensor:
    scores = hide(torch.einsum("bqd,bkd->bqk", x, x), m)
    return torch.einsum("bqk,bkd->bqd", scores.softmax(-1), x)


def additive_scores(b: Block, x: Tensor, m: Any) -> Tensor:
    """Scores by a sum over features of broadcast queries and keys."""
    scores = ((x[:, :, None] + x[:, None]).tanh() * b.scale).sum(-1)
    return hide(scores, m).softmax(-1) @ x


def sum_of_weighted_pairs(b: Block, x: Tensor, m: Any) -> Tensor:
    """The weighted sum of values, written as a product of pairs and a sum."""
    return (hide(x @ x.mT, m).softmax(-1)[..., None] * x[:, None]).sum(2)


def relative_keys(b: Block, x: Tensor, m: Any) -> Tensor:
    """A learned key for every distance, beside the keys that tokens have."""
    i = torch.arange(x.shape[1])
    distances = F.embedding((i[:, None] - i).clamp(-5, 5) + 5, b.table)
    scores = (x[:, :, None] * distances).sum(-1) + x @ x.mT
    return hide(scores, m).softmax(-1) @ x


def sigmoid_by_einsum(b: Block, x: Tensor, m: Any) -> Tensor:
    return torch.einsum("bqk,bkd->bqd", hide(x @ x.mT, m).sigmoid(), x)


def two_hops(b: Block, x: Tensor, m: Any) -> Tensor:
    """What the attended attend to; weights without softmax are nowhere zero by themselves."""
    weights = hide(x @ x.mT, m).sigmoid()
    return weights @ weights @ x


def two_hops_by_einsum(b: Block, x: Tensor, m: Any) -> Tensor:
    weights = hide(x @ x.mT, m).sigmoid()
    return torch.einsum("bqk,bkj,bjd->bqd", weights, weights, x)


def rows_written_to(b: Block, x: Tensor, m: Any) -> Tensor:
    """Each token writes to one feature of its own."""
    return x.scatter(2, x.argmax(2, keepdim=True), 3.0)


def table_as_keys(b: Block, x: Tensor, m: Any) -> Tensor:
    """Scores against a learned row per key position."""
    return hide(x @ b.table[: x.shape[1]].T, m).softmax(-1) @ x


def cut_table_as_keys(b: Block, x: Tensor, m: Any) -> Tensor:
    """The same, cut after the product: column j of the features is key position j."""
    return hide(F.linear(x, b.table)[..., : x.shape[1]], m).softmax(-1) @ x


def heads_attend(b: Block, x: Tensor, m: Any) -> Tensor:
    y = x.view(*x.shape[:2], H, -1)
    return F.scaled_dot_product_attention(y, y, y).flatten(2)


def per_sample(b: Block, x: Tensor, m: Any) -> Tensor:
    return x * (torch.arange(x.shape[0]) + 1.0)[:, None, None]


def repeated_tokens(b: Block, x: Tensor, m: Any) -> Tensor:
    return x.repeat_interleave(2, 1).view(*x.shape[:2], 2, D).sum(2)


def half_tokens(b: Block, x: Tensor, m: Any) -> Tensor:
    return (x.view(x.shape[0], -1, D // 2) @ b.weight[:4, :4]).view(x.shape)


def residual_scores(b: Block, x: Tensor, m: Any) -> Tensor:
    scores = hide(x @ x.mT, m)
    again = hide(x @ b.weight @ x.mT + scores, m)
    return scores.softmax(-1) @ x + again.softmax(-1) @ x


def chosen_rows(b: Block, x: Tensor, m: Any) -> Tensor:
    y = x * 1
    y[x[..., 0] > 0] = 0.5
    return y


GATED: tuple[Extra, ...] = (
    sequence_first, sequence_first_attention, row_numbers, alibi, relative_bias, learned_mask, in_place_mask,
    token_pair_condition, distances, without_softmax, by_logsumexp, by_amax, with_sink, by_einsum, additive_scores,
    sum_of_weighted_pairs, relative_keys, sigmoid_by_einsum, two_hops, two_hops_by_einsum, rows_written_to,
    table_as_keys, heads_attend, per_sample, repeated_tokens, half_tokens, residual_scores, chosen_rows,
)  # fmt: skip
EITHER: tuple[Extra, ...] = (embedded_row_numbers, looked_up_row_numbers, cut_table_as_keys)


@pytest.mark.parametrize("extra", GATED, ids=lambda extra: extra.__name__)
def test_what_is_gated_is_right(extra: Extra) -> None:
    model = decoder(extra, layers=1)
    gated = gate(model)
    inputs, active = batch(3), some_active(3)
    assert_is_key_masked(gated, model, inputs, active)
    assert_elided_ids_do_not_matter(gated, inputs, active)
    assert_all_active_is_eager(gated, model, inputs)
    assert {layer.kind for layer in gated.report.layers} <= {"varlen", "compact"}


def by_logsumexp_of_a_sum(b: Block, x: Tensor, m: Any) -> Tensor:
    """No gradient is stopped where a mask is added, as it is where scores are replaced."""
    scores = x @ x.mT
    scores = scores + hide(torch.zeros(scores.shape), m)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ x


def by_amax_of_a_sum(b: Block, x: Tensor, m: Any) -> Tensor:
    scores = x @ x.mT
    scores = scores + hide(torch.zeros(scores.shape), m)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ x


@pytest.mark.parametrize("extra", [by_logsumexp_of_a_sum, by_amax_of_a_sum], ids=lambda extra: extra.__name__)
@pytest.mark.parametrize("last", [(4, 6), ()], ids=["late", "none"])
def test_what_is_computed_in_empty_slots_stays_finite(extra: Extra, last: tuple[int, ...]) -> None:
    """A sample whose slots are in part empty, and which begins later than the others or has no active position."""
    model = decoder(extra, layers=1)
    active = torch.ones(3, 7, dtype=torch.bool)
    active[2] = torch.isin(torch.arange(7), torch.tensor(last, dtype=torch.int64))
    assert_is_key_masked(gate(model), model, batch(3), active)


def convolution(b: Block, x: Tensor, m: Any) -> Tensor:
    return F.conv1d(F.pad(x.mT, (2, 0)), b.table[:24, :1].reshape(D, 1, 3), groups=D).mT


def running_sum(b: Block, x: Tensor, m: Any) -> Tensor:
    return x.cumsum(1)


def token_shift(b: Block, x: Tensor, m: Any) -> Tensor:
    return F.pad(x, (0, 0, 1, -1))


def pooled_per_sample(b: Block, x: Tensor, m: Any) -> Tensor:
    return x - x.mean(1, keepdim=True)


def pooled_over_all(b: Block, x: Tensor, m: Any) -> Tensor:
    return x + x.mean((0, 1)) @ b.weight


def pooled_bias(b: Block, x: Tensor, m: Any) -> Tensor:
    return F.linear(x, b.weight, x.mean((0, 1)))


def batch_statistics(b: Block, x: Tensor, m: Any) -> Tensor:
    return F.batch_norm(x.reshape(-1, D), None, None, training=True).view(x.shape)


def softmax_over_positions(b: Block, x: Tensor, m: Any) -> Tensor:
    return x.softmax(1)


def pooled_temperature(b: Block, x: Tensor, m: Any) -> Tensor:
    return hide((x @ x.mT) * x.sum((1, 2), keepdim=True), m).softmax(-1) @ x


def sum_of_others(b: Block, x: Tensor, m: Any) -> Tensor:
    return torch.einsum("bsd,btd->bsd", x, x)


def linear_attention(b: Block, x: Tensor, m: Any) -> Tensor:
    state = torch.einsum("bsd,bse->bde", x.relu(), x)
    return torch.einsum("bsd,bde->bse", x.relu(), state)


def other_samples(b: Block, x: Tensor, m: Any) -> Tensor:
    y = x.transpose(0, 1)
    return F.scaled_dot_product_attention(y, y, y).transpose(0, 1)


def regrouped(b: Block, x: Tensor, m: Any) -> Tensor:
    return x.transpose(0, 1).reshape(x.shape)


def deviation_over_keys(b: Block, x: Tensor, m: Any) -> Tensor:
    scores = x @ x.mT
    return hide(scores / scores.std(-1, keepdim=True), m).softmax(-1) @ x


def softmax_over_queries(b: Block, x: Tensor, m: Any) -> Tensor:
    return hide(x @ x.mT, m).softmax(-2) @ x


def spatial_gate(b: Block, x: Tensor, m: Any) -> Tensor:
    return x * (b.table[: x.shape[1]] @ b.table[: x.shape[1]].T @ x)


def triangle(x: Tensor) -> Tensor:
    """Which position comes no later than which; bool [1, S, S, 1]."""
    i = torch.arange(x.shape[1])
    return (i[:, None] >= i)[None, :, :, None]


def shift_by_pairs(b: Block, x: Tensor, m: Any) -> Tensor:
    i = torch.arange(x.shape[1])
    return ((i[:, None] == i + 1)[None, :, :, None] * x[:, None]).sum(2)


def causal_mean(b: Block, x: Tensor, m: Any) -> Tensor:
    return (triangle(x) * x[:, None]).sum(2) / (torch.arange(x.shape[1]) + 1)[:, None]


def causal_maximum(b: Block, x: Tensor, m: Any) -> Tensor:
    return torch.where(triangle(x), x[:, None], -1e9).amax(2)


def sum_of_repeated(b: Block, x: Tensor, m: Any) -> Tensor:
    B, S, _ = x.shape
    return x.unsqueeze(2).expand(B, S, S, D).sum(2) / 10


def learned_pattern(b: Block, x: Tensor, m: Any) -> Tensor:
    """[1, S, S, 1], one weight for each pair of positions."""
    rows = b.table[: x.shape[1]]
    return (rows @ rows.T)[None, :, :, None] * triangle(x)


def spatial_gate_by_sum(b: Block, x: Tensor, m: Any) -> Tensor:
    return (learned_pattern(b, x, m) * x[:, None]).sum(2)


def spatial_gate_times_query(b: Block, x: Tensor, m: Any) -> Tensor:
    """Weights that depend on the query and on the positions, not on the pair's content."""
    return (x[:, :, None, :1] * learned_pattern(b, x, m) * x[:, None]).sum(2)


def spatial_gate_of_keys(b: Block, x: Tensor, m: Any) -> Tensor:
    """A sum over features makes no scores of weights that are the same for every query but for its position."""
    return (learned_pattern(b, x, m) * x[:, None]).sum(-1) @ x


def spatial_gate_of_queries(b: Block, x: Tensor, m: Any) -> Tensor:
    return (learned_pattern(b, x, m) * x[:, :, None]).sum(-1) @ x


def spatial_gate_of_positions(b: Block, x: Tensor, m: Any) -> Tensor:
    """Embedded positions are looked up like tokens, and are the same for any of them."""
    rows = F.embedding(torch.arange(x.shape[1]), b.table)
    return (rows @ rows.T).softmax(-1) @ x


def memory_slots(b: Block, x: Tensor, m: Any) -> Tensor:
    """As many rows of a table as there are positions, which they have nothing to do with."""
    rows = b.table[: x.shape[1]]
    return (x @ rows.T).softmax(-1) @ rows


def as_wide_as_long(b: Block, x: Tensor, m: Any) -> Tensor:
    rows = b.table[: x.shape[1]]
    return F.relu(x @ rows.T) @ rows


def attention_to_memory_slots(b: Block, x: Tensor, m: Any) -> Tensor:
    rows = b.table[: x.shape[1]].expand(x.shape[0], 1, x.shape[1], D)
    return F.scaled_dot_product_attention(x[:, None], rows, rows)[:, 0]


def writes_to_first_position(b: Block, x: Tensor, m: Any) -> Tensor:
    return x.scatter(2, torch.zeros(x.shape[0], 1, 1, dtype=torch.int64), 3.0)


def writes_to_first_sample(b: Block, x: Tensor, m: Any) -> Tensor:
    return x.scatter(2, torch.zeros(1, x.shape[1], 1, dtype=torch.int64), 3.0)


def seen(b: Block, x: Tensor, m: Any) -> Tensor:
    """bool [B, S, S]: which keys a query sees."""
    S = x.shape[1]
    return m[:, 0] if m is not None else torch.ones(S, S, dtype=torch.bool).tril()


def zeros_before_logsumexp(b: Block, x: Tensor, m: Any) -> Tensor:
    scores = torch.where(seen(b, x, m), x @ x.mT, 0.0)
    return scores.logsumexp(-1, keepdim=True) * (scores @ x) / 10


def zeros_before_amax(b: Block, x: Tensor, m: Any) -> Tensor:
    scores = (x @ x.mT) * seen(b, x, m)
    return scores.amax(-1, keepdim=True) * (scores @ x) / 10


def zeros_before_sigmoid(b: Block, x: Tensor, m: Any) -> Tensor:
    return (x @ x.mT).masked_fill(~seen(b, x, m), 0.0).sigmoid() @ x


def zeros_before_sigmoid_summed(b: Block, x: Tensor, m: Any) -> Tensor:
    weights = torch.where(seen(b, x, m), x @ x.mT, 0.0).sigmoid()
    return (weights[..., None] * x[:, None]).sum(2)


def zeros_before_softmax(b: Block, x: Tensor, m: Any) -> Tensor:
    return torch.where(seen(b, x, m), x @ x.mT, 0.0).softmax(-1) @ x


def hidden_too_little(b: Block, x: Tensor, m: Any) -> Tensor:
    return (x @ x.mT).masked_fill(~seen(b, x, m), -5.0).softmax(-1) @ x


def bias_behind_softmax(b: Block, x: Tensor, m: Any) -> Tensor:
    """Heads that talk behind the softmax: the bias is the weight of every key, hidden or not."""
    weights = hide(x @ x.mT, m).softmax(-1)[..., None]
    return F.linear(weights, b.weight[:1, :1], b.scale[:1])[..., 0] @ x


def zeros_before_mixed_hops(b: Block, x: Tensor, m: Any) -> Tensor:
    """What the second hop hides are its own keys, not those of the first."""
    first = torch.where(seen(b, x, m), x @ x.mT, 0.0).sigmoid()
    return first @ hide(x @ x.mT, m).softmax(-1) @ x


def zero_as_a_tensor(b: Block, x: Tensor, m: Any) -> Tensor:
    return torch.where(seen(b, x, m), x @ x.mT, torch.tensor(0.0)).softmax(-1) @ x


def zeros_under_infinity(b: Block, x: Tensor, m: Any) -> Tensor:
    """What else hides some pairs by their content does not hide those that the mask does."""
    scores = torch.where(seen(b, x, m), x @ x.mT, 0.0)
    return scores.masked_fill(x[:, :, None, 0] > x[:, None, :, 0] + 1, -math.inf).softmax(-1) @ x


def dropped_sigmoid(b: Block, x: Tensor, m: Any) -> Tensor:
    return F.dropout(torch.where(seen(b, x, m), x @ x.mT, 0.0).sigmoid(), 0.1, True) @ x


def mean_of_heads(b: Block, x: Tensor, m: Any) -> Tensor:
    q = heads(x)
    visible = m if m is not None else seen(b, x, m)
    return torch.where(visible, q @ q.mT, 0.0).sigmoid().mean(1) @ x


COUNTED: dict[Extra, str] = {
    zeros_before_mixed_hops: "aten.matmul counts 0.5",
    zero_as_a_tensor: "aten.softmax counts 0",
    zeros_under_infinity: "aten.softmax counts 0",
    dropped_sigmoid: "aten.matmul counts more than nothing",
    mean_of_heads: "aten.matmul counts 0.5",
    zeros_before_logsumexp: "aten.logsumexp counts 0",
    zeros_before_amax: "aten.amax counts 0",
    zeros_before_sigmoid: "aten.matmul counts 0.5",
    zeros_before_sigmoid_summed: "aten.sum counts more than nothing",
    zeros_before_softmax: "aten.softmax counts 0",
    hidden_too_little: "aten.softmax counts -5",
    bias_behind_softmax: "aten.matmul counts more than nothing",
}


@pytest.mark.parametrize("extra", COUNTED, ids=lambda extra: extra.__name__)
def test_a_sum_that_would_count_hidden_keys_is_not_gated(extra: Extra) -> None:
    """Whoever leaves an elided key out of it computes something else than the model that hides it."""
    model = decoder(extra, layers=1)
    reasons = why_dense(gate(model), model, batch(3))
    assert reasons
    assert all(re.search(f"{COUNTED[extra]} for every key that a mask hides", reason) for reason in reasons)


def lowest_of_products(b: Block, x: Tensor, m: Any) -> Tensor:
    """Masks by a product and a sum, as models before bool masks have them."""
    visible = seen(b, x, m).to(x.dtype)
    scores = (x @ x.mT) * visible - 1e4 * (1 - visible)
    return scores.softmax(-1) @ x


def largest_weight(b: Block, x: Tensor, m: Any) -> Tensor:
    """Zero is no larger than any weight."""
    weights = hide(x @ x.mT, m).softmax(-1)
    return weights.amax(-1, keepdim=True) * (weights @ x)


def entropy(b: Block, x: Tensor, m: Any) -> Tensor:
    weights = hide(x @ x.mT, m).softmax(-1)
    return (weights @ x) * (weights * (weights + 1e-9).log()).sum(-1, keepdim=True)


def zeros_then_lowest(b: Block, x: Tensor, m: Any) -> Tensor:
    """A local pattern of zeros, of which a later mask leaves nothing where it hides."""
    i = torch.arange(x.shape[1])
    near = torch.where((i[:, None] - i).abs() < 3, x @ x.mT, 0.0)
    return hide(near, m).softmax(-1) @ x


def scaled_by_a_tensor(b: Block, x: Tensor, m: Any) -> Tensor:
    """As older models have it: the scale and the lowest number are tensors."""
    scores = x @ x.mT / torch.full([], 2.0)
    return torch.where(seen(b, x, m), scores, torch.tensor(-1e9)).softmax(-1) @ x


def two_additive_masks(b: Block, x: Tensor, m: Any) -> Tensor:
    S = x.shape[1]
    order = torch.triu(torch.full((S, S), -1e9), 1)
    keys = (1 - seen(b, x, m).to(x.dtype)) * torch.tensor(-1e4)
    return (x @ x.mT / torch.full([], 2.0) + order + keys).softmax(-1) @ x


def mask_of_heads(b: Block, x: Tensor, m: Any) -> Tensor:
    return (hide(x @ x.mT, m).softmax(-1) * torch.ones(1, 1, 1)) @ x


def a_little_more(b: Block, x: Tensor, m: Any) -> Tensor:
    weights = hide(x @ x.mT, m).softmax(-1) + 1e-9
    return weights / weights.sum(-1, keepdim=True) @ x


def largest_square(b: Block, x: Tensor, m: Any) -> Tensor:
    weights = hide(x @ x.mT, m).relu().pow(2)
    return weights.amax(-1, keepdim=True) * x


def masked_values(b: Block, x: Tensor, m: Any) -> Tensor:
    """Weights without softmax that a product with the mask hides."""
    weights = (x @ x.mT).relu().square() * seen(b, x, m)
    return (weights / (weights.sum(-1, keepdim=True) + 1)) @ x


UNCOUNTED: tuple[Extra, ...] = (
    lowest_of_products, largest_weight, entropy, zeros_then_lowest, masked_values, scaled_by_a_tensor,
    two_additive_masks, mask_of_heads, a_little_more, largest_square,
)  # fmt: skip


@pytest.mark.parametrize("extra", UNCOUNTED, ids=lambda extra: extra.__name__)
def test_a_sum_that_counts_nothing_for_hidden_keys_is_gated(extra: Extra) -> None:
    model = decoder(extra, layers=1)
    gated = gate(model)
    assert_is_key_masked(gated, model, batch(3), some_active(3))
    assert {layer.kind for layer in gated.report.layers} <= {"varlen", "compact"}


MIXING: dict[Extra, str] = {
    convolution: "aten.conv1d|aten.pad",
    running_sum: "aten.cumsum",
    token_shift: "pad",
    pooled_per_sample: "aten.mean",
    pooled_over_all: "summed over tokens|a sum over",
    pooled_bias: "summed over tokens|a sum over",
    batch_statistics: "batch_norm",
    softmax_over_positions: "aten.softmax",
    pooled_temperature: "aten.sum",
    sum_of_others: "aten.einsum",
    linear_attention: "aten.einsum",
    other_samples: "attends over something else",
    regrouped: "regroups",
    deviation_over_keys: "aten.std",
    softmax_over_queries: "aten.softmax",
    spatial_gate: "aten.matmul sums over positions with weights that are no attention",
    shift_by_pairs: "aten.sum sums over positions with weights that are no attention",
    causal_mean: "aten.sum sums over positions with weights that are no attention",
    causal_maximum: "aten.amax sums over positions with weights that are no attention",
    sum_of_repeated: "aten.sum sums over positions with weights that are no attention",
    spatial_gate_by_sum: "aten.sum sums over positions with weights that are no attention",
    spatial_gate_times_query: "aten.sum sums over positions with weights that are no attention",
    spatial_gate_of_keys: "aten.matmul sums over positions with weights that are no attention",
    spatial_gate_of_queries: "aten.matmul sums over positions with weights that are no attention",
    spatial_gate_of_positions: "aten.matmul sums over positions with weights that are no attention",
    memory_slots: "aten.matmul attends to rows that do not vary with the tokens",
    as_wide_as_long: "aten.matmul attends to rows that do not vary with the tokens",
    attention_to_memory_slots: "attention attends to rows that do not vary with the tokens",
    writes_to_first_position: "aten.scatter writes to part of the tokens only",
    writes_to_first_sample: "aten.scatter writes to part of the tokens only",
}


@pytest.mark.parametrize("extra", MIXING, ids=lambda extra: extra.__name__)
def test_what_mixes_tokens_is_never_gated(extra: Extra) -> None:
    """The layer that mixes is dense and says why, or nothing is gated; all positions active is eager in any case."""
    model = decoder(extra, layers=1)
    reasons = why_dense(gate(model), model, batch(3))
    assert reasons
    assert all(re.search(MIXING[extra], reason) for reason in reasons)


IN_ONE_SAMPLE: tuple[Extra, ...] = (memory_slots, as_wide_as_long, writes_to_first_position)


@pytest.mark.parametrize("extra", IN_ONE_SAMPLE, ids=lambda extra: extra.__name__)
def test_what_mixes_tokens_is_not_gated_in_a_single_sample(extra: Extra) -> None:
    """Without a batch axis a table of S rows has the very axes of the states."""
    model = decoder(extra, layers=1)
    gated = gate(model)
    refusal = refusal_of(gated, model, batch(1))
    reasons = refusal or " ".join(layer.reason for layer in gated.report.layers if layer.kind == "dense")
    assert re.search(MIXING[extra], reasons)


BY_PRODUCTS: tuple[Extra, ...] = (by_einsum, sigmoid_by_einsum, two_hops, two_hops_by_einsum)


@pytest.mark.parametrize("extra", BY_PRODUCTS, ids=lambda extra: extra.__name__)
def test_the_dense_reference_hides_elided_keys(extra: Extra) -> None:
    model = decoder(extra, layers=1)
    reference, gated = gate(model, reference=True), gate(model)
    inputs, active = batch(3), some_active(3)
    seen = step(reference, **inputs, token_mask=active)
    assert_same_step(seen, step(gated, **inputs, token_mask=active))
    assert_is_key_masked(gated, model, inputs, active)


@pytest.mark.parametrize("extra", EITHER, ids=lambda extra: extra.__name__)
def test_what_looks_like_tokens_and_is_not_is_right_or_refused(extra: Extra) -> None:
    model = decoder(extra, layers=1)
    gated = gate(model)
    if refusal_of(gated, model, batch(3)) is None and all(
        layer.kind != "dense" for layer in gated.report.layers
    ):
        assert_is_key_masked(gated, model, batch(3), some_active(3))
