"""The file of a gate's state: what was written comes back to the bit, and nothing else ever does."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from collated import reference_of
from crash_checkpoint import fuzz_state, torment_gate, torment_trainer
from restatement import Token
from test_ranks import SAMPLES, bits, epochs, make_gate, of_all, step

from regate_fx.errors import InvalidInput, StoreDamaged, StoreMismatch, StoreUnwritable
from regate_fx.runtime import DualCycle, ReGate

MUTATIONS = 400


@pytest.fixture
def trained() -> ReGate:
    gate = make_gate()
    epochs(gate, of_all, 2)
    return gate


def test_a_gate_goes_on_from_a_file_as_if_nothing_had_happened(trained: ReGate, tmp_path: Path) -> None:
    path = tmp_path / "regate.safetensors"
    trained.save(path)
    resumed = make_gate()
    resumed.load(path)
    assert resumed.global_step == trained.global_step == 2 * SAMPLES // 4
    for one, other in zip(
        epochs(trained, of_all, 1, first=2), epochs(resumed, of_all, 1, first=2), strict=True
    ):
        assert torch.equal(one, other)
    assert bits(trained.difficulty.ema) == bits(resumed.difficulty.ema)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_no_mutated_file_is_taken_for_a_state(trained: ReGate, tmp_path: Path) -> None:
    assert fuzz_state(trained, tmp_path / "regate.safetensors", MUTATIONS, random.Random(0)) >= MUTATIONS // 2


def test_what_cannot_be_gone_on_from_says_why(trained: ReGate, tmp_path: Path) -> None:
    path = tmp_path / "regate.safetensors"
    with pytest.raises(
        StoreMismatch, match=r"regate\.safetensors: there is no state of a gate\. Resume from"
    ):
        trained.load(path)
    path.write_bytes(b"")
    with pytest.raises(StoreDamaged, match=r"it is no state of a gate\. Resume from an older checkpoint"):
        trained.load(path)
    trained.save(path)
    other = make_gate(DualCycle(keep=0.25, warmup=0, cycle=1, dense=0))
    with pytest.raises(InvalidInput, match=r"keep: differs from the saved run"):
        other.load(path)
    grown = reference_of({number: [Token(3), Token(4, 4, 1.0)] for number in range(3)})
    with pytest.raises(StoreMismatch, match="it belongs to other reference losses"):
        ReGate(grown).load(path)
    assert ReGate(grown).difficulty.ema.isnan().all()


def test_a_folder_that_takes_nothing_leaves_the_file_that_was_there(trained: ReGate, tmp_path: Path) -> None:
    path = tmp_path / "regate.safetensors"
    trained.save(path)
    content = path.read_bytes()
    step(trained, [0, 1], 3)
    (tmp_path / f".{path.name}.unfinished").mkdir()
    with pytest.raises(StoreUnwritable, match=r"regate\.safetensors: it cannot be written .* Make room"):
        trained.save(path)
    assert path.read_bytes() == content


def test_it_travels_in_a_distributed_checkpoint(trained: ReGate, tmp_path: Path) -> None:
    dcp.save({"gate": trained}, checkpoint_id=tmp_path)
    resumed = make_gate()
    dcp.load({"gate": resumed}, checkpoint_id=tmp_path)
    assert resumed.global_step == trained.global_step
    assert bits(resumed.difficulty.ema) == bits(trained.difficulty.ema)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_end_like_the_one_that_nobody_killed() -> None:
    assert torment_gate(kills=8, seed=1).kills >= 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_trainer_resumes_to_the_bit() -> None:
    assert torment_trainer(kills=1, seed=2).kills >= 1
