"""`semantics` of selection in plain Python, one token at a time: no tensors, nothing imported from the project.

A document is a list of `Token`s. Padding is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NO_LABEL = -100


@dataclass(frozen=True)
class Token:
    """input id, label or -100, and the two signals of its label (ema None where it was never observed)."""

    id: int
    label: int = NO_LABEL
    ref: float = 0.0
    ema: float | None = None


@dataclass(frozen=True)
class Rules:
    special: frozenset[int] = frozenset()
    visual: frozenset[int] = frozenset()
    align: str = "predictor"
    shifted: bool = True
    weight: float = 0.5
    combine: str = "additive"
    policy: str = "regate"
    seed: int = 0
    step: int = 0


def predictor(rules: Rules, t: int) -> int | None:
    if not rules.shifted:
        return t
    return t - 1 if t > 0 else None


def positions_for(rules: Rules, t: int) -> set[int]:
    """The positions that selecting label t keeps active."""
    kept = set()
    if rules.align in ("predictor", "both"):
        kept.add(predictor(rules, t))
    if rules.align in ("token", "both"):
        kept.add(t)
    return kept


def predicted_labels(tokens: list[Token], rules: Rules) -> list[int]:
    """The labels that some position of the document predicts."""
    return [
        t for t, token in enumerate(tokens) if token.label != NO_LABEL and predictor(rules, t) is not None
    ]


def always_active(tokens: list[Token], rules: Rules) -> set[int]:
    predicted = predicted_labels(tokens, rules)
    predictors = {predictor(rules, t) for t in predicted}
    active = set()
    for s, token in enumerate(tokens):
        if token.id in rules.visual or token.label == NO_LABEL:
            active.add(s)
        elif rules.align == "predictor" and s not in predictors and any(t > s for t in predicted):
            active.add(s)  # the end of a turn that a later turn follows
    for t in predicted:
        if tokens[t].label in rules.special:
            active |= positions_for(rules, t)
    return active


def candidates(tokens: list[Token], rules: Rules) -> list[int]:
    always = always_active(tokens, rules)
    return [
        t
        for t in predicted_labels(tokens, rules)
        if tokens[t].label not in rules.special and not positions_for(rules, t) <= always
    ]


def score(tokens: list[Token], rules: Rules, t: int, sample_id: int = 0) -> float:
    labelled = [other for other, token in enumerate(tokens) if token.label != NO_LABEL]
    ref = tokens[t].ref
    if rules.policy == "random":
        return draw(rules.seed, rules.step, sample_id, labelled.index(t))
    if rules.policy == "reference":
        return ref
    if rules.policy == "rho1":
        return known_or_mean(
            {i: tokens[i].ema - tokens[i].ref for i in labelled if tokens[i].ema is not None}, t
        )
    ema = known_or_mean({i: tokens[i].ema for i in labelled if tokens[i].ema is not None}, t)
    if rules.policy == "loss":
        return ema
    if rules.combine == "convex":
        return (1 - rules.weight) * ema + rules.weight * ref
    return ema + rules.weight * ref


def known_or_mean(known: dict[int, float], t: int) -> float:
    return known.get(t, sum(known.values()) / len(known) if known else 0.0)


def draw(seed: int, step: int, sample_id: int, label: int) -> float:
    """53 bits of a hash that takes in one number after the other."""
    state = 0
    for number in (seed, step, sample_id, label):
        state = mixed((state + number) % 2**64)
    return float(state % 2**53)


def mixed(number: int) -> int:
    """splitmix64's finaliser."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def active_positions(tokens: list[Token], rules: Rules, ratio: float, sample_id: int = 0) -> set[int]:
    if ratio == 1.0:
        return set(range(len(tokens)))
    competing = candidates(tokens, rules)
    K = math.ceil(ratio * len(competing))
    ranked = sorted(competing, key=lambda t: (-score(tokens, rules, t, sample_id), t))
    active = always_active(tokens, rules)
    for t in ranked[:K]:
        active |= positions_for(rules, t)
    return active


def updated(ema: float | None, loss: float, beta: float) -> float:
    return loss if ema is None else beta * ema + (1 - beta) * loss


def keep_ratio(step: int, keep: float, warmup: int, cycle: int, dense: int) -> float:
    if step < warmup:
        return 1.0
    return 1.0 if (step - warmup) % cycle < dense else keep
