"""Selection against its restatement in plain Python, on random documents and on hand-made ones."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import restatement as plain
import torch
from collated import packed, padded, positions_by_sample, reference_of, set_difficulty
from hypothesis import given, settings
from hypothesis import strategies as st
from restatement import NO_LABEL, Token

from regate_fx.errors import InvalidInput
from regate_fx.runtime import DualCycle, ReGate

SPECIAL, VISUAL = 2, 3
# Eighths add and average without rounding, so that equal scores are equal in any order of summation.
eighths = st.integers(0, 24).map(lambda n: n / 8)
tokens = st.builds(
    Token,
    id=st.sampled_from([VISUAL, 5, 6, 7]),
    label=st.sampled_from([NO_LABEL, SPECIAL, 5, 6, 7, 8]),
    ref=eighths,
    ema=st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
ratios = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0])


@st.composite
def gates(draw: st.DrawFn) -> tuple[plain.Rules, dict[str, Any]]:
    """The same rules for the restatement and as arguments of the gate."""
    shared = {
        "align": draw(st.sampled_from(["predictor", "token", "both"])),
        "shifted": draw(st.booleans()),
        "weight": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "combine": draw(st.sampled_from(["additive", "convex"])),
    }
    rules = plain.Rules(special=frozenset({SPECIAL}), visual=frozenset({VISUAL}), **shared)
    return rules, {**shared, "special_ids": [SPECIAL], "visual_ids": [VISUAL]}


def sparse(ratio: float) -> DualCycle:
    return DualCycle(keep=ratio, warmup=0, cycle=1, dense=0)


documents_of_a_batch = st.lists(st.lists(tokens, max_size=12), min_size=1, max_size=4)


@settings(max_examples=200)
@given(docs=documents_of_a_batch, gate=gates(), ratio=ratios, side=st.sampled_from(["left", "right"]))
def test_padded_rows(docs: list[list[Token]], gate: Any, ratio: float, side: Any) -> None:
    rules, arguments = gate
    numbered = {10 * i + 3: doc for i, doc in enumerate(docs)}
    made = ReGate(reference_of(numbered), schedule=sparse(ratio), **arguments)
    set_difficulty(made, numbered)
    check(made, padded(numbered, side), numbered, rules, ratio)


@settings(max_examples=200)
@given(docs=documents_of_a_batch, gate=gates(), ratio=ratios, per_row=st.integers(1, 3))
def test_packed_rows(docs: list[list[Token]], gate: Any, ratio: float, per_row: int) -> None:
    rules, arguments = gate
    numbered = {i: doc for i, doc in enumerate(docs) if doc} or {0: [Token(5)]}
    made = ReGate(reference_of(numbered), schedule=sparse(ratio), **arguments)
    set_difficulty(made, numbered)
    check(made, packed(numbered, per_row), numbered, rules, ratio)


def check(gate: ReGate, batch: Any, docs: dict[int, list[Token]], rules: plain.Rules, ratio: float) -> None:
    choice = gate.choose(batch)
    found = positions_by_sample(choice.token_mask, batch)
    for sample_id, doc in docs.items():
        assert found.get(sample_id, set()) == plain.active_positions(doc, rules, ratio), sample_id
    if choice.active is not None:
        counts = choice.token_mask.sum(1)
        assert choice.active == (int(counts.sum()), int(counts.max()))
    else:
        assert rules.align == "both"
    found_labels = choice.samples.counts.counted(ratio)
    if found_labels is not None:
        assert found_labels == counted_labels(choice.token_mask, batch["labels"], rules)
    else:
        assert rules.align != "predictor" and ratio < 1.0
    assert torch.equal(gate.select(batch), choice.token_mask)


def counted_labels(mask: Any, labels: Any, rules: plain.Rules) -> int:
    """The labels that a model counts, which knows only positions: neither documents nor roles."""
    B, S = labels.shape
    back = int(rules.shifted)
    return sum(
        int(labels[b, t]) != NO_LABEL and bool(mask[b, t - back]) for b in range(B) for t in range(back, S)
    )


def answer(*refs: float, ema: float | None = None) -> list[Token]:
    """Two prompt tokens, then words with these reference losses, then the end marker."""
    words = [Token(id=5 + i, label=5 + i, ref=ref, ema=ema) for i, ref in enumerate(refs)]
    return [Token(1), Token(1), *words, Token(id=SPECIAL, label=SPECIAL)]


def selected(doc: list[Token], ratio: float, **arguments: Any) -> set[int]:
    gate = ReGate(reference_of({0: doc}), schedule=sparse(ratio), special_ids=[SPECIAL], **arguments)
    set_difficulty(gate, {0: doc})
    return positions_by_sample(gate.select(padded({0: doc})), padded({0: doc})).get(0, set())


def test_the_words_that_need_the_picture_are_kept() -> None:
    #          0  1   2    3    4    5    6    7: end
    doc = answer(0.1, 0.2, 4.0, 0.3, 3.0, 0.1)
    # Prompt 0, 1; label 2 comes free with it. Of labels 3 to 6 (position 7 ends the turn), two: 4 and 6. Position 6
    # predicts label 7; the end marker 8 is predicted at 7, the last word.
    assert plain.candidates(doc, plain.Rules(special=frozenset({SPECIAL}))) == [3, 4, 5, 6, 7]
    assert selected(doc, 0.4) == {0, 1, 3, 5, 7}


def test_equal_scores_keep_the_earliest() -> None:
    assert selected(answer(1, 1, 1, 1, 1), 0.5) == {0, 1, 2, 3, 6}


def test_nothing_and_everything() -> None:
    doc = answer(1, 2, 3)
    assert selected(doc, 0.0) == {0, 1, 4}
    assert selected(doc, 1.0) == set(range(6))


def test_difficulty_counts_where_the_teacher_is_indifferent() -> None:
    words = [
        replace(token, ema=float(token.id == 8)) if token.label > 2 else token for token in answer(1, 1, 1, 1)
    ]
    assert selected(words, 0.3, weight=0.5) == {0, 1, 4, 5}


def test_the_end_of_an_earlier_turn_stays() -> None:
    turn = answer(1, 1)
    later = [*turn, *answer(1, 1)]
    assert 4 not in selected(turn, 0.0)
    assert {4, 5, 6} <= selected(later, 0.0)


def test_a_sample_without_labels_is_computed_whole() -> None:
    assert selected([Token(1), Token(1)], 0.5) == {0, 1}


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_batch_of_empty_rows_has_no_active_position(ratio: float) -> None:
    gate = ReGate(reference_of({0: []}), schedule=sparse(ratio))
    assert not gate.select(padded({0: []})).any()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"weight": -0.1}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": 1.1, "combine": "convex"}, "weight"),
        ({"combine": "product"}, "combine"),
        ({"beta": 1.0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"align": "label"}, "align"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{name}: ") as caught:
        ReGate(reference_of({0: []}), **arguments)
    assert caught.value.argument == name


def test_what_another_document_predicts_is_no_difficulty() -> None:
    """In a packed row, the end of one document predicts the first label of the next; nobody else will."""
    docs = {1: [Token(5, 5, 1.0), Token(6, 6, 1.0)], 2: [Token(7, 7, 1.0), Token(8, 8, 1.0)]}
    gate = ReGate(reference_of(docs))
    batch = packed(docs, per_row=2)
    counted = torch.tensor([[False, True, True, True]])
    gate.select(batch)
    gate.observe(batch, SimpleNamespace(token_loss=torch.full((1, 4), 3.0), counted=counted))
    assert gate.difficulty.ema.isnan().tolist() == [True, False, True, False]
