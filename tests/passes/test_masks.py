"""What a mask is proven to show, against what it shows when it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captured import run_until
from torch import Tensor, nn

from regate_fx.passes.masks import MaskProof

D, H, V, W = 8, 2, 23, 3
MaskCode = Callable[[Tensor, Tensor], Tensor | None]


class Attends(nn.Module):
    """One attention whose mask is `code(input_ids, attention_mask)`."""

    def __init__(self, code: MaskCode, is_causal: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.code, self.is_causal = code, is_causal

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x.view(*x.shape[:2], H, -1).transpose(1, 2)
        mask = self.code(input_ids, attention_mask)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask, is_causal=self.is_causal)


def grid(ids: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.arange(ids.shape[1])
    return index[:, None], index[None, :]


def causal(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return (k <= q)[None, None]


def causal_and_padding(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return (q >= k) & am.bool()[:, None, None, :]


def causal_shifted(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return (k < q + 1) & am.bool()[:, None, None, :]


def window(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return ((k <= q) & (k > q - W)) & am.bool()[:, None, None, :]


def window_by_difference(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return (k <= q) & (k + W > q) & am.bool()[:, None, None, :]


def padding_only(ids: Tensor, am: Tensor) -> Tensor:
    return am.bool()[:, None, None, :]


def additive_causal(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    seen = (k <= q) & am.bool()[:, None, None, :]
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def strictly_before(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return (k < q) & am.bool()[:, None, None, :]


def one_ahead(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return (k <= q + 1) & am.bool()[:, None, None, :]


def anticausal(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return (k >= q) & am.bool()[:, None, None, :]


def two_sided_window(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return (k < q + W) & (k > q - W) & am.bool()[:, None, None, :]


def prefix(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return ((k <= q) | (k < 2)) & am.bool()[:, None, None, :]


def documents(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    document = (ids == 0).cumsum(1)
    return (k <= q) & (document[:, None, :, None] == document[:, None, None, :])


def query_padding(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return (k <= q) & am.bool()[:, None, :, None]


def triangle(ids: Tensor, am: Tensor) -> Tensor:
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()


def inverted_padding(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return (k <= q) & ~am.bool()[:, None, None, :]


def soft(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return torch.where(k <= q, 0.0, -2.0)[None, None]


def biased(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return torch.where(k <= q, 1.0 * (k - q), torch.finfo(torch.float32).min)[None, None]


def every_other(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return (k <= q) & ((q - k) % 2 == 0)


def by_positions(ids: Tensor, am: Tensor) -> Tensor:
    positions = am.cumsum(1)
    return positions[:, None, :, None] >= positions[:, None, None, :]


def reversed_index(ids: Tensor, am: Tensor) -> Tensor:
    index = torch.arange(ids.shape[1] - 1, -1, -1)
    return (index[None, :] <= index[:, None])[None, None]


def hidden_ones(ids: Tensor, am: Tensor) -> Tensor:
    """What is not zero in a mask that is added to scores is hidden."""
    q, k = grid(ids)
    return torch.where(k <= q, 0.0, torch.finfo(torch.float32).min)[None, None].bool()


def hidden_by_both(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    added = torch.where(k <= q, 0.0, torch.finfo(torch.float32).min)[None, None]
    return torch.logical_and(added, torch.where(k <= q, 0.0, -torch.inf))


def square(ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(ids.shape[1], ids.shape[1], dtype=dtype)


def triangle_of_numbers(ids: Tensor, am: Tensor) -> Tensor:
    return square(ids).tril().bool()


def not_above(ids: Tensor, am: Tensor) -> Tensor:
    return ~square(ids, torch.bool).triu(1)


def lowest_above(ids: Tensor, am: Tensor) -> Tensor:
    return torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(diagonal=1)


def filled_where_zero(ids: Tensor, am: Tensor) -> Tensor:
    return torch.zeros(ids.shape[1], ids.shape[1]).masked_fill(square(ids).tril() == 0, -torch.inf)


def one_minus(ids: Tensor, am: Tensor) -> Tensor:
    return (1.0 - square(ids).tril().view(1, 1, *square(ids).shape)) * torch.finfo(torch.float32).min


def zeros_below(ids: Tensor, am: Tensor) -> Tensor:
    index = torch.arange(ids.shape[1])
    lowest = torch.full((ids.shape[1], ids.shape[1]), torch.finfo(torch.float32).min)
    return lowest.masked_fill(index < (index + 1).view(ids.shape[1], 1), 0)


def not_hidden_by_either(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    return ~((k > q) | (~am.bool())[:, None, None, :])


def sum_of_masks(ids: Tensor, am: Tensor) -> Tensor:
    q, k = grid(ids)
    lowest = torch.finfo(torch.float32).min
    return torch.where(am.bool(), 0.0, lowest)[:, None, None, :] + torch.where(k <= q, 0.0, lowest)


def hidden_further(ids: Tensor, am: Tensor) -> Tensor:
    return lowest_above(ids, am).masked_fill(~am.bool()[:, None, None, :], -torch.inf)


def kept_further(ids: Tensor, am: Tensor) -> Tensor:
    return torch.where(am.bool()[:, None, None, :], lowest_above(ids, am), -torch.inf)


def between_triangles(ids: Tensor, am: Tensor) -> Tensor:
    return square(ids, torch.bool).tril() & square(ids, torch.bool).triu(1 - W)


def not_outside(ids: Tensor, am: Tensor) -> Tensor:
    """What is neither above nor below a band, as bools that say what is hidden."""
    q, k = grid(ids)
    return torch.logical_not((k > q) | (k <= q - W))


def added_ones(ids: Tensor, am: Tensor) -> Tensor:
    return square(ids).tril()


def hidden_a_little(ids: Tensor, am: Tensor) -> Tensor:
    return (1 - square(ids).tril()) * -1e4


def only_above(ids: Tensor, am: Tensor) -> Tensor:
    return square(ids, torch.bool).triu(1)


def hides_itself(ids: Tensor, am: Tensor) -> Tensor:
    return torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu()


def hides_what_is_below(ids: Tensor, am: Tensor) -> Tensor:
    return square(ids).tril() * torch.finfo(torch.float32).min


def below_zero(ids: Tensor, am: Tensor) -> Tensor:
    """Nothing is: numbers without a sign begin anew."""
    return (square(ids, torch.uint8).tril() - 1) < 0


def by_ids_of_documents(ids: Tensor, am: Tensor) -> Tensor:
    """What is no padding may be another number than one."""
    q, k = grid(ids)
    lowest = torch.finfo(torch.float32).min
    return torch.where(k <= q, 0.0, lowest) + (1.0 - am[:, None, None, :]) * lowest


def above_infinity(ids: Tensor, am: Tensor) -> Tensor:
    """What is hidden twice is the lowest number or minus infinity."""
    return sum_of_masks(ids, am) > -torch.inf


def at_a_rounded_number(ids: Tensor, am: Tensor) -> Tensor:
    """In half precision a tenth is another number, as the number that it is compared with is."""
    return torch.where(triangle(ids, am), 0.1, 1.0).bfloat16() == 0.1


def shown_again(ids: Tensor, am: Tensor) -> Tensor:
    return lowest_above(ids, am).masked_fill(~am.bool()[:, None, None, :], 0.0)


def positions(dtype: torch.dtype, step: int = 0) -> MaskCode:
    """Positions that a dtype does not have: it rounds them, or begins anew."""

    def mask(ids: Tensor, am: Tensor) -> Tensor:
        index = torch.arange(ids.shape[1])
        return (index.to(dtype)[:, None] - step < index.to(dtype)) & (index <= index[:, None])

    mask.__name__ = f"{dtype}"
    return mask


def made_in_half_precision(ids: Tensor, am: Tensor) -> Tensor:
    index = torch.arange(ids.shape[1], dtype=torch.float16)
    return index <= index[:, None]


def added_query_padding(ids: Tensor, am: Tensor) -> Tensor:
    return torch.where(am.bool(), 0.0, -torch.inf)[:, None, :, None]


def numbered_query_padding(ids: Tensor, am: Tensor) -> Tensor:
    return (1.0 - am.bool().float()).unsqueeze(-1)[:, None] * torch.finfo(torch.float32).min


def of_bits(ids: Tensor, am: Tensor) -> Tensor:
    """Documents by number: those of one bit are hidden from those of another."""
    q, k = grid(ids)
    return (k <= q) & ((am & torch.full((), 2))[:, None, None, :] != 0)


def of_a_larger_triangle(ids: Tensor, am: Tensor) -> Tensor:
    """Of a size that is no token axis, as chunks of a sequence have."""
    S = ids.shape[1]
    return torch.ones(S + 3, S + 3).tril()[:S, :S].bool()


def sum_of_triangles(ids: Tensor, am: Tensor) -> Tensor:
    return square(ids).tril() + square(ids).triu(1)


def halved(ids: Tensor, am: Tensor) -> Tensor:
    """The lowest number of half precision is none of single precision."""
    lowest = torch.full((ids.shape[1], ids.shape[1]), torch.finfo(torch.float16).min, dtype=torch.float16)
    return lowest.triu(1).float()


PROVEN: dict[str, tuple[MaskCode, MaskProof]] = {
    "causal": (causal, MaskProof(causal=True)),
    "causal and padding": (causal_and_padding, MaskProof(causal=True)),
    "causal, shifted index": (causal_shifted, MaskProof(causal=True)),
    "window": (window, MaskProof(causal=True, window=W)),
    "window by difference": (window_by_difference, MaskProof(causal=True, window=W)),
    "padding only": (padding_only, MaskProof()),
    "additive causal": (additive_causal, MaskProof(causal=True)),
    "triangle": (triangle, MaskProof(causal=True)),
    "triangle of numbers": (triangle_of_numbers, MaskProof(causal=True)),
    "not above": (not_above, MaskProof(causal=True)),
    "lowest above": (lowest_above, MaskProof(causal=True)),
    "filled where zero": (filled_where_zero, MaskProof(causal=True)),
    "one minus": (one_minus, MaskProof(causal=True)),
    "zeros below": (zeros_below, MaskProof(causal=True)),
    "not hidden by either": (not_hidden_by_either, MaskProof(causal=True)),
    "sum of masks": (sum_of_masks, MaskProof(causal=True)),
    "hidden further": (hidden_further, MaskProof(causal=True)),
    "kept further": (kept_further, MaskProof(causal=True)),
    "between triangles": (between_triangles, MaskProof(causal=True, window=W)),
    "positions in single precision": (positions(torch.float32, W), MaskProof(causal=True, window=W)),
    "at a rounded number": (at_a_rounded_number, MaskProof(causal=True)),
    "not outside": (not_outside, MaskProof(causal=True, window=W)),
}
EXPLICIT = (
    strictly_before, one_ahead, anticausal, two_sided_window, prefix, documents, query_padding,
    inverted_padding, soft, biased, every_other, by_positions, reversed_index, hidden_ones,
    hidden_by_both, added_ones, hidden_a_little, only_above, hides_itself, hides_what_is_below, below_zero,
    by_ids_of_documents, sum_of_triangles, halved, above_infinity, shown_again, made_in_half_precision,
    of_bits, of_a_larger_triangle, added_query_padding, numbered_query_padding, positions(torch.uint8, 3),
    positions(torch.bfloat16, 3), positions(torch.int8, 3),
)  # fmt: skip


def proof(code: MaskCode, is_causal: bool = False) -> tuple[MaskProof, int]:
    ids = torch.randint(V, (2, 7))
    am = torch.ones(2, 7, dtype=torch.int64)
    am[0, 5:] = 0
    run = run_until("prove_masks", Attends(code, is_causal), {"input_ids": ids, "attention_mask": am})
    (found,) = run.context.findings["masks"].values()
    return found, run.rewrites["prove_masks"]


@pytest.mark.parametrize("name", PROVEN)
def test_a_mask_is_proven_to_show_what_it_shows(name: str) -> None:
    code, expected = PROVEN[name]
    assert proof(code) == (expected, 1)


@pytest.mark.parametrize("name", PROVEN)
def test_what_is_proven_is_what_the_mask_says_pair_by_pair(name: str) -> None:
    code, expected = PROVEN[name]
    S = 9
    q, k = torch.arange(S)[:, None], torch.arange(S)
    low = -math.inf if not expected.window else 1 - expected.window
    wanted = (k - q >= low) & (k - q <= (0 if expected.causal else math.inf))
    seen = code(torch.zeros(1, S, dtype=torch.int64), torch.ones(1, S, dtype=torch.int64))
    assert seen is not None
    seen = seen if seen.dtype is torch.bool else seen == 0
    assert torch.equal(seen.expand(1, 1, S, S)[0, 0], wanted)


@pytest.mark.parametrize("code", EXPLICIT, ids=lambda code: code.__name__)
def test_any_other_mask_is_read_as_it_is(code: MaskCode) -> None:
    assert proof(code) == (MaskProof(explicit=True), 0)


def test_the_operators_own_causal_order_is_proven_without_a_mask() -> None:
    assert proof(lambda ids, am: None, is_causal=True) == (MaskProof(causal=True), 1)
    assert proof(lambda ids, am: None) == (MaskProof(), 1)


def test_a_window_of_one_shows_a_position_to_itself_only() -> None:
    def itself(ids: Tensor, am: Tensor) -> Tensor:
        q, k = grid(ids)
        return ((k <= q) & (k > q - 1))[None, None] & am.bool()[:, None, None, :]

    assert proof(itself)[0] == MaskProof(causal=True, window=1)


def test_proofs_name_themselves() -> None:
    assert str(MaskProof(causal=True, window=4)) == "causal, window 4"
    assert str(MaskProof()) == "full"
    assert str(MaskProof(explicit=True)) == "mask read at active pairs"
