"""A fixed sample of random decoder programs, the programs that once failed, and tests of the fuzzer itself.

`run.py` tries as many as one likes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from choices import DECODER, LAYER
from program import Layer, Program, draw, settle, shrink
from tiers import tiers
from verdict import judge

SEEDS = tiers(range(12), *range(8))
KEPT = sorted((Path(__file__).parent / "kept").glob("*.json"))
ALLOWED = ("equal", "equal, some dense", "unmatched", "unchecked", "refused")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_program_is_equal_to_its_oracle_or_refused(seed: int) -> None:
    verdict = judge(draw(seed))
    assert verdict.status in ALLOWED, verdict


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_program_that_once_failed_does_not_fail_again(path: Path) -> None:
    kept = json.loads(path.read_text())
    program = Program.from_json(kept["program"])
    assert settle(program) == program, "a choice that another one overrules tests nothing"
    verdict = judge(program)
    assert verdict.status == kept["status"], (kept["why"], verdict)


@pytest.mark.parametrize("attend", ["sdpa_causal", "scores", "mha"])
def test_an_oracle_that_hides_no_keys_is_noticed(attend: str) -> None:
    program = Program(layers=(Layer(attend=attend),) * 2)
    assert judge(program).status == "equal"
    wrong = judge(program, hides=False)
    assert (wrong.status, wrong.code) == ("failed", "token_loss")


def test_a_layer_that_mixes_runs_dense_beside_one_that_does_not() -> None:
    verdict = judge(Program(layers=(Layer(mix="running_mean", mix_at="input"), Layer())))
    assert verdict.status == "equal, some dense"
    assert verdict.kinds == {"dense": 1, "varlen": 1}


@pytest.mark.parametrize("kind", [kind for kind in DECODER["router_loss"] if kind != "none"])
def test_a_loss_over_all_tokens_is_over_the_active_ones(kind: str) -> None:
    mixing = Layer(mix="running_mean", mix_at="input")
    verdict = judge(Program(layers=(mixing, Layer(attend="scores")), router_loss=kind, keep_logits=True))
    assert verdict.status == "equal, some dense", verdict


def test_drawing_is_deterministic_and_programs_survive_json() -> None:
    programs = [draw(seed) for seed in range(300)]
    assert programs == [draw(seed) for seed in range(300)]
    for program in programs:
        assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program
        assert settle(program) == program


def test_every_value_of_every_choice_is_drawn() -> None:
    programs = [draw(seed) for seed in range(4000)]
    layers = [layer for program in programs for layer in program.layers]
    for choices, drawn in ((LAYER, layers), (DECODER, programs)):
        for name, weights in choices.items():
            if name not in ("before", "after"):  # rare
                assert {getattr(chosen, name) for chosen in drawn} == set(weights), name


def test_the_simplest_value_is_the_first() -> None:
    assert {name: next(iter(weights)) for name, weights in LAYER.items()} == vars(Layer())
    simplest = {name: next(iter(weights)) for name, weights in DECODER.items()}
    assert replace(Program(), **simplest) == Program()


def test_shrinking_ends_at_the_simplest_program() -> None:
    program, steps = draw(3), 0
    while (simpler := next(shrink(program), None)) is not None:
        program, steps = simpler, steps + 1
        assert steps < 200
    assert program.layers == (Layer(),)
