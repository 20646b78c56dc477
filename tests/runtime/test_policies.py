"""Every policy against its restatement in plain Python, and what a policy of one's own has to be."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import restatement as plain
import torch
from collated import packed, padded, positions_by_sample, reference_of, set_difficulty
from hypothesis import given, settings
from hypothesis import strategies as st
from restatement import NO_LABEL, Token
from test_selection import answer, documents_of_a_batch, ratios, sparse
from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.runtime import ReGate, Signals, label_table, policies

SPECIAL, VISUAL = 2, 3
RULES = {"special_ids": [SPECIAL], "visual_ids": [VISUAL]}
NAMES = ("regate", "random", "loss", "reference", "rho1")


def numbered(docs: list[list[Token]]) -> dict[int, list[Token]]:
    return {10 * i + 3: doc for i, doc in enumerate(docs) if doc} or {3: [Token(5)]}


def gate_of(docs: dict[int, list[Token]], **arguments: Any) -> ReGate:
    made = ReGate(reference_of(docs), **{"schedule": sparse(0.5), **RULES, **arguments})
    set_difficulty(made, docs)
    return made


@settings(max_examples=100)
@given(
    docs=documents_of_a_batch,
    name=st.sampled_from(NAMES),
    ratio=ratios,
    per_row=st.integers(0, 3),
    step=st.integers(0, 10**6),
    seed=st.integers(-(2**70), 2**70),
)
def test_each_against_its_restatement(
    docs: list[list[Token]], name: Any, ratio: float, per_row: int, step: int, seed: int
) -> None:
    found = numbered(docs)
    policy = policies.Random(seed) if name == "random" else name
    gate = gate_of(found, policy=policy, schedule=sparse(ratio))
    gate.global_step = step
    batch = packed(found, per_row) if per_row else padded(found, "left")
    positions = positions_by_sample(gate.select(batch), batch)
    rules = plain.Rules(frozenset({SPECIAL}), frozenset({VISUAL}), policy=name, seed=seed, step=step)
    for sample_id, doc in found.items():
        expected = plain.active_positions(doc, rules, ratio, sample_id)
        assert positions.get(sample_id, set()) == expected, sample_id


@given(docs=documents_of_a_batch, name=st.sampled_from(NAMES))
def test_scores_are_those_of_the_restatement(docs: list[list[Token]], name: Any) -> None:
    found = numbered(docs)
    gate = gate_of(found, policy=name)
    batch = packed(found, 2)
    score = gate.score(batch)
    rules = plain.Rules(policy=name)
    for sample_id, doc in found.items():
        row, columns = (batch["sample_id"] == sample_id).nonzero(as_tuple=True)
        for t, token in enumerate(doc):
            if token.label != NO_LABEL:
                expected = plain.score(doc, rules, t, sample_id)
                assert float(score[row[t], columns[t]]) == expected


def long_document(length: int, sample_id: int = 3) -> dict[int, list[Token]]:
    return {sample_id: [Token(1), *(Token(5, 5) for _ in range(length))]}


def kept(gate: ReGate, batch: Any, step: int) -> Tensor:
    gate.global_step = step
    return gate.select(batch)[0, 1:-1]


def test_random_is_a_fair_draw_at_every_step() -> None:
    """Each label is kept about half of the time, and two of them together about a quarter of it."""
    docs = long_document(101)
    gate, batch = gate_of(docs, policy="random"), padded(docs)
    draws = torch.stack([kept(gate, batch, step) for step in range(400)]).double()
    assert draws.shape == (400, 100)
    # Standard deviation of a share of 400 fair draws: 0.025. 100 labels: the worst lies within 5 of them.
    assert float((draws.mean(0) - 0.5).abs().max()) < 5 * 0.025
    together = (draws.T @ draws / 400)[~torch.eye(100, dtype=torch.bool)]
    assert float((together - 0.25).abs().max()) < 6 * math.sqrt(0.25 * 0.75 / 400)
    follows = (draws[1:] * draws[:-1]).mean(0)
    assert float((follows - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / 400)


def test_random_depends_on_seed_sample_and_step_and_on_nothing_else() -> None:
    docs = long_document(40) | long_document(40, sample_id=4)
    gate = gate_of(docs, policy="random")
    alone, both = padded(long_document(40)), padded(docs)
    here = kept(gate, alone, 7)
    assert torch.equal(here, kept(gate, both, 7))
    assert torch.equal(here, gate.select(padded(docs, "left"))[0, 1:-1])
    assert not torch.equal(here, kept(gate, alone, 8))
    assert not torch.equal(here, kept(gate, padded(long_document(40, sample_id=4)), 7))
    assert not torch.equal(here, kept(gate_of(docs, policy=policies.Random(seed=1)), alone, 7))
    # In a data set with other samples before it, the sample's labels have other numbers.
    more = long_document(5, sample_id=1) | docs
    assert torch.equal(here, kept(gate_of(more, policy="random"), alone, 7))


@pytest.mark.cuda
def test_random_is_the_same_on_a_device() -> None:
    docs = long_document(200)
    gate, batch = gate_of(docs, policy="random"), padded(docs)
    expected = gate.score(batch)
    there = {name: value.to("cuda") if name != "sample_id" else value for name, value in batch.items()}
    assert torch.equal(gate.score(there).cpu(), expected)


def test_what_each_keeps_of_a_known_sample() -> None:
    #              free  0    1    2    3
    doc = answer(0.0, 3.0, 0.5, 0.0, 1.0)
    ema = dict(zip([5, 6, 7, 8, 9], [0.0, 1.0, 2.5, None, 1.5], strict=True))
    doc = [Token(t.id, t.label, t.ref, ema.get(t.label)) for t in doc]
    # Of labels 3 to 6, half: by difficulty 4 and 6, by the teacher 3 and 6, by excess (-2, 2, mean 0.167, 0.5) 4 and 6,
    # by both 4 and 3.
    for name, labels in (("loss", {4, 6}), ("reference", {3, 6}), ("rho1", {4, 6}), ("regate", {3, 4})):
        gate = gate_of({0: doc}, policy=name)
        found = positions_by_sample(gate.select(padded({0: doc})), padded({0: doc}))[0]
        assert found == {0, 1, 6} | {t - 1 for t in labels}, name


def test_weight_and_combine_are_those_of_regate() -> None:
    losses = reference_of({0: answer(1, 2)})
    assert ReGate(losses, weight=0.25, combine="convex").policy == policies.TwoSignals("convex", 0.25)
    with pytest.raises(InvalidInput, match=r"^weight: is a setting of policy 'regate', not of 'random'"):
        ReGate(losses, policy="random", weight=0.5)
    with pytest.raises(InvalidInput, match=r"^combine: is a setting of policy 'regate'\."):
        ReGate(losses, policy=policies.Loss(), combine="additive")
    with pytest.raises(InvalidInput, match=r"^policy: is 'best'\. Use one of \['loss', 'random'"):
        ReGate(losses, policy="best")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"^seed: is 1\.5"):
        policies.Random(seed=1.5)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Late:
    """A policy of one's own: later labels first, those of odd samples unknown."""

    slope: float = 1.0

    def score(self, signals: Signals) -> Tensor:
        late = self.slope * signals.label.double()
        return late.masked_fill(signals.sample_id % 2 == 1, torch.nan)


def test_a_policy_of_ones_own() -> None:
    doc = answer(1, 1, 1, 1, 1)
    docs = {8: doc, 9: doc}
    for batch in (padded(docs), packed(docs, 2)):
        found = positions_by_sample(gate_of(docs, policy=Late()).select(batch), batch)
        assert found == {8: {0, 1, 4, 5, 6}, 9: {0, 1, 2, 3, 6}}


def test_scores_without_label_are_not_looked_at() -> None:
    """Whatever a policy says of prompt and padding, a label that it cannot score ranks with the other labels' mean."""

    @dataclass(frozen=True)
    class Loud:
        def score(self, signals: Signals) -> Tensor:
            return torch.where(signals.slot >= 0, signals.ema, 1000.0)

    doc = answer(1, 1, 1, 1)
    ema = {5: 0.0, 6: 3.0, 8: 1.0, SPECIAL: 0.0}
    docs = {0: [Token(t.id, t.label, t.ref, ema.get(t.label)) for t in doc], 1: answer(*[1] * 9)}
    gate = gate_of(docs, policy=Loud(), schedule=sparse(0.3))
    for batch in (padded({0: docs[0]}), padded(docs, "left"), packed(docs, 2)):
        assert positions_by_sample(gate.select(batch), batch)[0] == {0, 1, 2, 5}


def test_infinite_scores_keep_as_many_as_finite_ones() -> None:
    @dataclass(frozen=True)
    class Endless:
        sign: float

        def score(self, signals: Signals) -> Tensor:
            first = torch.where(signals.label == 2, 1.0, 0.0)
            return self.sign * torch.inf * (1 - first) if self.sign < 0 else self.sign / first - self.sign

    doc = answer(1, 1, 1, 1, 1)
    for sign in (-1.0, 1.0):
        gate = gate_of({0: doc}, policy=Endless(sign))
        choice = gate.choose(padded({0: doc}))
        assert choice.active == (int(choice.token_mask.sum()),) * 2


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            lambda signals: signals.ema.sum(1),
            r"Broken\.score returned torch.float32 \[2\] on cpu for labels \[2, 4\]",
        ),
        (lambda signals: signals.slot, r"Broken\.score returned torch.int64 \[2, 4\] on cpu for labels"),
        (lambda signals: 1.0, r"Broken\.score returned 1\.0 for labels \[2, 4\]"),
        (
            lambda signals: torch.rand(signals.ema.shape),
            r"Broken\.score gives other scores when it is called again",
        ),
    ],
)
def test_a_policy_that_cannot_work_is_refused_at_once(broken: Any, message: str) -> None:
    @dataclass(frozen=True)
    class Broken:
        def score(self, signals: Signals) -> Tensor:
            return broken(signals)

    with pytest.raises(InvalidInput, match=f"^policy: {message}"):
        ReGate(reference_of({0: answer(1)}), policy=Broken())


def test_a_policy_that_a_checkpoint_cannot_hold_is_refused() -> None:
    @dataclass(frozen=True)
    class Table:
        bonus: Tensor

        def score(self, signals: Signals) -> Tensor:
            return signals.ema

    class Bare:
        def score(self, signals: Signals) -> Tensor:
            return signals.ema

    losses = reference_of({0: answer(1)})
    with pytest.raises(InvalidInput, match=r"^policy: Table\.bonus is a Tensor, which a checkpoint cannot"):
        ReGate(losses, policy=Table(torch.ones(3)))
    for wrong in (Bare(), Late, None):
        with pytest.raises(InvalidInput, match=r"which is no dataclass object with a score method"):
            ReGate(losses, policy=wrong)  # type: ignore[arg-type]


def test_a_checkpoint_of_another_policy_is_refused() -> None:
    docs = {0: answer(1, 2)}
    state = pickle.loads(pickle.dumps(gate_of(docs, policy=Late(2.0)).state_dict()))
    gate_of(docs, policy=Late(2.0)).load_state_dict(state)
    for other in ("random", "regate"):
        with pytest.raises(InvalidInput, match=r"^policy: differs from the saved run"):
            gate_of(docs, policy=other).load_state_dict(state)
    with pytest.raises(InvalidInput, match=r"^policy\.slope: differs from the saved run"):
        gate_of(docs, policy=Late(3.0)).load_state_dict(state)
    seeded = gate_of(docs, policy=policies.Random(4)).state_dict()
    with pytest.raises(InvalidInput, match=r"^policy\.seed: differs"):
        gate_of(docs, policy="random").load_state_dict(seeded)
    with pytest.raises(InvalidInput, match=r"^policy\.weight: differs"):
        gate_of(docs, weight=0.4).load_state_dict(gate_of(docs).state_dict())


@pytest.mark.parametrize(
    "policy", [policies.TwoSignals("convex", 0.3), policies.Random(5), policies.Loss(), policies.ExcessLoss()]
)
def test_a_shipped_policy_is_found_again_by_its_settings(policy: Any) -> None:
    assert policies.policy_of(policies.policy_settings(policy)) == policy


def test_settings_of_ones_own_policy_do_not_name_a_shipped_one() -> None:
    with pytest.raises(InvalidInput, match=r"^policy: is 'Late'"):
        policies.policy_of(policies.policy_settings(Late()))


def examples(docs: dict[int, list[Token]]) -> list[dict[str, Any]]:
    return [{"sample_id": sample_id, "document": doc} for sample_id, doc in docs.items()]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = padded(dict(enumerate(row["document"] for row in rows)))
    del batch["sample_id"]
    return batch


@settings(max_examples=30)
@given(docs=documents_of_a_batch, size=st.integers(1, 3), step=st.integers(0, 99))
def test_without_a_teacher(docs: list[list[Token]], size: int, step: int) -> None:
    """A table of labels has the ids, slots and hashes that a teacher pass would have stored."""
    found = numbered(docs)
    table = label_table(examples(found), collate, **RULES, batch_size=size)
    stored = reference_of(found)
    for name in ("ids", "starts", "hashes"):
        assert torch.equal(getattr(table, name), getattr(stored, name))
    batch = padded(found)
    for policy in ("random", "loss"):
        without, beside = ReGate(table, policy=policy, schedule=sparse(0.5)), gate_of(found, policy=policy)
        set_difficulty(without, found)
        without.global_step = beside.global_step = step
        assert torch.equal(without.select(batch), beside.select(batch))


@pytest.mark.parametrize("policy", ["regate", "reference", "rho1", policies.TwoSignals("convex", 0.5)])
def test_a_policy_that_needs_the_teacher_is_refused_without(policy: Any) -> None:
    table = label_table(examples({0: answer(1)}), collate, **RULES)
    with pytest.raises(
        InvalidInput, match=r"^policy: needs a teacher's losses, and a table of labels has none"
    ):
        ReGate(table, policy=policy)


def test_the_teacher_is_missed_in_mid_run_too() -> None:
    @dataclass(frozen=True)
    class Later:
        def score(self, signals: Signals) -> Tensor:
            return signals.ema if signals.step < 10 else signals.reference

    docs = {0: answer(1)}
    gate = ReGate(label_table(examples(docs), collate, **RULES), policy=Later(), schedule=sparse(0.5))
    gate.select(padded(docs))
    gate.global_step = 10
    with pytest.raises(InvalidInput, match=r"^policy: needs a teacher's losses"):
        gate.select(padded(docs))


def test_labels_at_padding_are_none() -> None:
    def sloppy(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        padding = batch["attention_mask"] == 0
        assert padding.any()
        return batch | {"labels": batch["labels"].masked_fill(padding, 5)}

    docs = {0: answer(1, 2, 3), 1: answer(1)}
    found, stored = label_table(examples(docs), sloppy, **RULES), reference_of(docs)
    assert torch.equal(found.hashes, stored.hashes)
    assert torch.equal(found.starts, stored.starts)


def test_a_table_is_another_store_than_the_teachers() -> None:
    """Difficulties observed with one cannot be loaded into the other."""
    docs = {0: answer(1)}
    table = label_table(examples(docs), collate, **RULES)
    assert table.fingerprint != reference_of(docs).fingerprint
    assert table.fingerprint != label_table(examples(docs), collate, special_ids=[]).fingerprint


def test_a_table_of_samples_with_the_same_id_or_none() -> None:
    row = examples({7: answer(1)})
    with pytest.raises(InvalidInput, match=r"^sample_id: \[7\] come more than once"):
        label_table(row * 2, collate, special_ids=[])
    with pytest.raises(InvalidInput, match="sample_id: is missing from an example"):
        label_table([{"document": answer(1)}], collate, special_ids=[])
