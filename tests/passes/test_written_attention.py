"""Attention that a model writes by hand becomes one operator where that computes the same, and nowhere else.

Shapes: B samples, S positions, H heads, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gating import assert_all_active_is_eager, assert_elided_ids_do_not_matter, assert_is_key_masked, gate
from small_decoder import Block, Decoder, H, batch, heads, hide, merge_heads, some_active
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min
Way = Callable[[Block, Tensor, Tensor, Tensor, Tensor], Tensor]


def seen_by(mask: Tensor | None, S: int) -> Tensor:
    """bool [B or 1, 1, S, S]."""
    index = torch.arange(S)
    return (index[:, None] >= index)[None, None] if mask is None else mask


class Written(Block):
    """A layer whose attention is `way`: of q, k and v, [B, H, S, d], and what is seen, bool [B or 1, 1, S, S]."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("triangle", torch.ones(1, 1, 64, 64).tril())

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (heads(project(x)) for project in (self.q, self.k, self.v))
        return self.o(merge_heads(self.way(self, q, k, v, seen_by(mask, x.shape[1]))))


def added(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.shape[-1])
    return torch.matmul(F.softmax(scores + torch.where(seen, 0.0, LOWEST), dim=-1), v)


def filled(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = (q * 0.5) @ k.mT
    return F.dropout(F.softmax(scores.masked_fill(~seen, -1e9), -1), 0.0) @ v


def chosen(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = torch.where(seen, 0.3 * (q @ k.mT), torch.full((), LOWEST))
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def by_triangle_of_numbers(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """A triangle of numbers, and the padding added."""
    S = q.shape[2]
    triangle = torch.ones(S, S).tril().bool()
    scores = torch.where(triangle, q @ k.mT, LOWEST) + torch.where(seen, 0.0, LOWEST)
    return scores.softmax(-1) @ v


def kept_finite(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = q @ k.mT + torch.where(seen, 0.0, LOWEST)
    return torch.max(scores, torch.tensor(LOWEST)).softmax(-1) @ v


def merged(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Samples and heads as one dimension, and two while the mask is added."""
    B, _, S, d = q.shape
    flat_q, flat_k, flat_v = (x.reshape(B * H, S, d) for x in (q, k, v))
    scores = torch.bmm(flat_q, flat_k.transpose(1, 2)).view(B, H, S, S) + torch.where(seen, 0.0, LOWEST)
    return torch.bmm(scores.view(B * H, S, S).softmax(-1), flat_v).view(B, H, S, d)


def added_product(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    B, _, S, d = q.shape
    flat_q, flat_k, flat_v = (x.reshape(B * H, S, d) for x in (q, k, v))
    mask = torch.where(seen, 0.0, LOWEST).expand(B, H, S, S).reshape(B * H, S, S)
    return torch.bmm(torch.baddbmm(mask, flat_q, flat_k.mT, alpha=0.4).softmax(-1), flat_v).view(B, H, S, d)


def turned_around(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return hide(-0.5 * (q @ k.mT), seen).softmax(-1) @ v


def by_root(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = q @ k.mT / torch.full([], v.shape[-1] ** 0.5)
    return torch.where(~seen, -1e9, scores).softmax(-1) @ v


def two_biases(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """In half precision: added to the scores, each keeps what their sum would lose."""
    index = torch.arange(q.shape[2])
    near, far = (x.bfloat16() for x in ((index - index[:, None]) * 0.37, (index - index[:, None]) * 0.011))
    return (q @ k.mT + near + far + torch.where(seen, 0.0, LOWEST)).softmax(-1) @ v


def lifted(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return (q @ k.mT + seen.float() * 1e4).softmax(-1) @ v


def of_one_key(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """One head of keys and values for all queries."""
    return hide(q @ k[:, :1].mT, seen).softmax(-1) @ v[:, :1]


def shared_keys(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    k, v = (x[:, :1].repeat_interleave(H, dim=1) for x in (k, v))
    return hide(q @ k.mT, seen).softmax(-1) @ v


def near(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    return torch.where(seen & (index > index[:, None] - 3), q @ k.mT, LOWEST).softmax(-1) @ v


def by_distance(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """ALiBi: another slope for each head."""
    index = torch.arange(q.shape[2])
    slopes = torch.tensor([0.5, 0.25]).view(H, 1, 1)
    return (q @ k.mT + slopes * (index - index[:, None]) + torch.where(seen, 0.0, LOWEST)).softmax(-1) @ v


def in_double(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return (hide(q.double() @ k.double().mT, seen).softmax(-1) @ v.double()).float()


def by_not_of_numbers(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """What is not zero in a mask that is added is hidden, and zeros are shown."""
    hidden = torch.logical_not(torch.where(seen, 0.0, LOWEST))
    return (q @ k.mT).masked_fill(~hidden, -1e9).softmax(-1) @ v


def by_triangle(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    S = q.shape[2]
    hidden = torch.logical_not(torch.ones(S, S).tril())
    return hide((q @ k.mT).masked_fill(hidden, -1e9), seen).softmax(-1) @ v


def by_buffer(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    S = q.shape[2]
    scores = (q @ k.mT).masked_fill(b.triangle[:, :, :S, :S] == 0, -torch.inf)
    return (scores + torch.where(seen, 0.0, LOWEST)).softmax(-1) @ v


def widened(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    S = q.shape[2]
    scores = q @ k.mT + torch.full((S, S), -torch.inf).triu(1) + torch.where(seen, 0.0, torch.tensor(LOWEST))
    return scores.double().softmax(-1).type_as(v) @ v


def whole_factor(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return hide(q @ k.mT * torch.full((), 2.7).long(), seen).softmax(-1) @ v


def capped(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * 0.7 / 1.5) * 1.5
    return hide(scores, seen).softmax(-1) @ v


def squashed(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return hide(torch.tanh(q @ k.mT), seen).softmax(-1) @ v


def beside_sinks(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = hide(q @ k.mT, seen)
    sinks = b.scale[:H].view(1, H, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


def capped_beside_one_sink(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = hide(0.9 * torch.tanh(q @ k.mT), seen)
    both = torch.cat([scores, b.scale[:1].view(1, 1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    return (both - both.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


def summed_with_sinks(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores, sinks = hide(q @ k.mT, seen), b.scale[:H].view(1, H, 1, 1)
    largest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    powers = (scores - largest).exp()
    return powers / (powers.sum(-1, keepdim=True) + (sinks - largest).exp()) @ v


def scaled_by_what_sinks_leave(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = hide(q @ k.mT, seen)
    left = (scores.logsumexp(-1) - b.scale[:H].view(1, H, 1)).sigmoid()
    return scores.softmax(-1) @ v * left.unsqueeze(-1)


def scaled_by_what_sinks_leave_in_double(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """What is cast for the sum alone comes behind the softmax."""
    scores, sinks = hide(q @ k.mT, seen), b.scale[:H].view(1, H, 1, 1)
    given = scores.softmax(-1) @ v
    return given * (scores.double().logsumexp(-1, keepdim=True) - sinks).sigmoid().to(given.dtype)


def a_head_switched_off(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores, sinks = hide(q @ k.mT, seen), torch.tensor([0.3, torch.inf]).view(1, H, 1)
    return scores.softmax(-1) @ v * (scores.logsumexp(-1) - sinks).sigmoid().unsqueeze(-1)


ONE_OPERATOR = [
    (added, "causal, proven from its masks"),
    (filled, "causal, proven from its masks"),
    (chosen, "causal, proven from its masks"),
    (kept_finite, "causal, proven from its masks"),
    (merged, "causal, proven from its masks"),
    (added_product, "causal, proven from its masks"),
    (of_one_key, "causal, proven from its masks"),
    (shared_keys, "causal, proven from its masks"),
    (near, "causal, window 3, proven from its masks"),
    (turned_around, "causal, proven from its masks"),
    (by_root, "causal, proven from its masks"),
    (by_triangle_of_numbers, "causal, proven from its masks"),
    (by_triangle, "causal, proven from its masks"),
    (by_not_of_numbers, "causal, proven from its masks"),
    (whole_factor, "causal, proven from its masks"),
    (widened, "causal, proven from its masks"),
    (by_buffer, "mask read at active pairs"),
    (two_biases, "mask read at active pairs"),
    (lifted, "mask read at active pairs"),
    (in_double, "causal, proven from its masks"),
    (by_distance, "mask read at active pairs"),
    (capped, "causal, proven from its masks"),
    (squashed, "causal, proven from its masks"),
    (beside_sinks, "causal, proven from its masks"),
    (capped_beside_one_sink, "causal, proven from its masks"),
    (summed_with_sinks, "causal, proven from its masks"),
    (scaled_by_what_sinks_leave, "causal, proven from its masks"),
    (scaled_by_what_sinks_leave_in_double, "causal, proven from its masks"),
    (a_head_switched_off, "causal, proven from its masks"),
]


def check(way: Way, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Decoder([Written(way), Written(way)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    gated = gate(model, **options)
    inputs, mask = batch(padded=True), some_active()
    assert_is_key_masked(gated, model, inputs, mask)
    assert_is_key_masked(gated, model, inputs, torch.ones_like(mask))
    assert_elided_ids_do_not_matter(gated, inputs, mask)
    return gated.report.layers


@pytest.mark.parametrize(("way", "words"), ONE_OPERATOR)
def test_becomes_one_operator(way: Way, words: str) -> None:
    assert [(layer.kind, layer.attention) for layer in check(way)] == [("varlen", words)] * 2


@pytest.mark.parametrize("way", [added, chosen, by_triangle, capped, beside_sinks])
def test_without_a_padding_mask(way: Way) -> None:
    model = Decoder([Written(way), Written(way)])
    gated = gate(model)
    assert_all_active_is_eager(gated, model, batch())
    assert [layer.kind for layer in gated.report.layers] == ["varlen"] * 2


@pytest.mark.parametrize("way", [added, beside_sinks, a_head_switched_off])
def test_unless_the_models_own_are_preferred(way: Way) -> None:
    assert [(layer.kind, layer.attention) for layer in check(way, attention="model")] == [
        ("compact", "as written")
    ] * 2


def capped_twice(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return hide(2 * torch.tanh(torch.tanh(q @ k.mT)), seen).softmax(-1) @ v


def capped_and_turned(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return hide(torch.tanh(q @ k.mT) * -2.0, seen).softmax(-1) @ v


def capped_with_a_bias(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    return hide(torch.tanh(q @ k.mT + 0.2 * (index - index[:, None])), seen).softmax(-1) @ v


def sinks_of_queries(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return torch.cat([hide(q @ k.mT, seen), q.sum(-1, keepdim=True)], -1).softmax(-1)[..., :-1] @ v


def sinks_by_position(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = hide(q @ k.mT, seen)
    sinks = torch.arange(q.shape[2], dtype=q.dtype).view(1, 1, -1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, 0.1 * sinks], -1).softmax(-1)[..., :-1] @ v


def weights_beside_sinks_read_twice(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores, sinks = hide(q @ k.mT, seen), b.scale[:H].view(1, H, 1, 1)
    weights = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
    return weights @ v * weights.sum(-1, keepdim=True)


def scaled_by_what_sinks_leave_of_rounded_scores(
    b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor
) -> Tensor:
    scores = hide(20 * q @ k.mT, seen)
    left = (scores.bfloat16().float().logsumexp(-1, keepdim=True) - b.scale[:H].view(1, H, 1, 1)).sigmoid()
    return scores.softmax(-1) @ v * left


def read_twice(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    weights = hide(q @ k.mT, seen).softmax(-1)
    return weights @ v * weights.amax(-1, keepdim=True)


def scaled_behind(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The factor is the biases', too."""
    index = torch.arange(q.shape[2])
    scores = (q @ k.mT + 0.2 * (index - index[:, None])) * 0.5
    return hide(scores, seen).softmax(-1) @ v


def learned(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    bias = b.table[:, 0][(index[:, None] - index).clamp(0, 63)]
    return hide(q @ k.mT + bias, seen).softmax(-1) @ v


def by_content(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return hide(q @ k.mT + k.sum(-1)[:, :, None], seen).softmax(-1) @ v


def learned_factor(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return hide(q @ k.mT * b.scale[0], seen).softmax(-1) @ v


def perhaps_learned(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """As long as what is learned is small, the factor is a number."""
    return hide(q @ k.mT / torch.maximum(torch.full((), 4.0), b.scale[0] + 6), seen).softmax(-1) @ v


def rounded_inside(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~seen, -1e9).softmax(-1, dtype=torch.bfloat16).to(v.dtype) @ v


def blind(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The first query sees nothing: what was filled in counts for it, and has no gradient."""
    index = torch.arange(q.shape[2])
    return (q @ k.mT).masked_fill(~(index < index[:, None]), -1e9).softmax(-1) @ v


def every_other(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """What is filled in hides what no proof is about."""
    index = torch.arange(q.shape[2])
    return hide((q @ k.mT).masked_fill((index[:, None] - index) % 2 == 1, -1e9), seen).softmax(-1) @ v


def two_depths(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(torch.eye(q.shape[2]).bool(), -2e4)
    return scores.masked_fill(~seen, -1e9).softmax(-1) @ v


def above_a_mask(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """What is filled in is above what is added to a pair that is seen."""
    S = q.shape[2]
    return ((q @ k.mT) - torch.eye(S) * 3e4 + torch.eye(S) * -3e4).masked_fill(~seen, -2e4).softmax(-1) @ v


def only_itself(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The first query sees itself alone, which the lowest number is added to."""
    return (q @ k.mT + torch.eye(q.shape[2]) * LOWEST).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def filled_as_low(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """To the first query all keys are alike; those that were filled in have no gradient."""
    return hide(q @ k.mT + torch.eye(q.shape[2]) * LOWEST, seen).softmax(-1) @ v


def kept_from_infinity(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    S = q.shape[2]
    scores = torch.max(q @ k.mT + torch.full((S, S), -torch.inf).triu(), torch.tensor(LOWEST))
    return scores.softmax(-1) @ v


def by_truth(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """A mask of bools that is added adds one where it is true."""
    index = torch.arange(q.shape[2])
    return hide(q @ k.mT + ((index <= index[:, None]) & (index > index[:, None] - 3)), seen).softmax(-1) @ v


def by_number(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    far = (60 * (index[:, None] - index).clamp(0, 2)).to(torch.int8)
    return hide(20 * (q @ k.mT) + far + far, seen).softmax(-1) @ v


def rounded(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return hide(q @ k.mT, seen).softmax(-1).half().float() @ v


def cut_off(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return hide(q @ k.mT, seen).softmax(-1).bool().float() @ v


def by_pairs_of_heads(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Four heads, of which a mask has every other one."""
    q, k, v = (x.transpose(1, 2).reshape(x.shape[0], -1, 4, 2).transpose(1, 2) for x in (q, k, v))
    S = q.shape[2]
    bias = torch.arange(2.0)[:, None, None] * torch.arange(S)
    scores = ((q @ k.mT).view(-1, 2, 2, S, S) + bias).view(-1, 4, S, S)
    y = hide(scores, seen).softmax(-1) @ v
    return y.transpose(1, 2).reshape(y.shape[0], S, H, -1).transpose(1, 2)


def of_samples_and_heads(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Biases for every head of every sample: as one mask they would be larger than the active scores."""
    counted = seen.float().sum(-2, keepdim=True) * torch.tensor([0.1, 0.2]).view(H, 1, 1)
    return hide(q @ k.mT + counted, seen).softmax(-1) @ v


OWN_OPERATORS = [
    capped_twice, capped_and_turned, capped_with_a_bias, sinks_of_queries, sinks_by_position,
    weights_beside_sinks_read_twice, scaled_by_what_sinks_leave_of_rounded_scores, read_twice, scaled_behind,
    learned, by_content, learned_factor, of_samples_and_heads, every_other, two_depths, by_truth, by_number,
    rounded, cut_off, by_pairs_of_heads, perhaps_learned, rounded_inside,
]  # fmt: skip


@pytest.mark.parametrize("way", OWN_OPERATORS)
def test_keeps_its_own_operators(way: Way) -> None:
    assert [(layer.kind, layer.attention) for layer in check(way)] == [("compact", "as written")] * 2


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        (blind, "compact"),
        (above_a_mask, "compact"),
        (filled_as_low, "compact"),
        (kept_from_infinity, "compact"),
        (only_itself, "varlen"),
    ],
)
def test_scores_of_hidden_keys_count_as_they_did(way: Way, kind: str) -> None:
    """Which keys count for a query that sees none is nothing that a token mask could say."""
    model = Decoder([Written(way)])
    gated = gate(model)
    assert_all_active_is_eager(gated, model, batch())
    assert [layer.kind for layer in gated.report.layers] == [kind]


def test_dropout_keeps_its_own_operators() -> None:
    """Another kernel would draw other weights to drop than those that the model's own would."""

    def dropping(b: Block, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return F.dropout(hide(q @ k.mT, seen).softmax(-1), 0.5, training=True) @ v

    gated = gate(Decoder([Written(dropping)]))
    gated(**batch(), token_mask=some_active())
    assert [layer.kind for layer in gated.report.layers] == ["compact"]


def test_costs_what_one_operator_does() -> None:
    by_hand, by_kernel = (gate(Decoder([layer])) for layer in (Written(added), Block()))
    for gated in (by_hand, by_kernel):
        gated(**batch(), token_mask=some_active())
    assert by_hand.report.layers[0].cost == by_kernel.report.layers[0].cost


def test_in_bfloat16_is_as_exact_as_the_models_own() -> None:
    torch.manual_seed(0)
    model = Decoder([Written(chosen)]).bfloat16()
    inputs, mask = batch(S=40, B=3), some_active(B=3, S=40)
    losses = {}
    for attention in ("auto", "model"):
        losses[attention] = gate(model, attention=attention)(**inputs, token_mask=mask).token_loss
    golden = gate(model.double())(**inputs, token_mask=mask).token_loss
    errors = {name: (loss - golden).norm() for name, loss in losses.items()}
    assert errors["auto"] <= 1.5 * errors["model"] + 1e-6
