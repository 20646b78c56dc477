"""Difficulties kept on the host: the same values as beside the losses, however late these come.

Shapes: B rows, S positions.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from busy_device import BusyDevice, OnDevice
from collated import padded, reference_of
from hypothesis import given, settings
from hypothesis import strategies as st
from restatement import NO_LABEL, Token
from torch import Tensor

from regate_fx.errors import InvalidInput
from regate_fx.runtime import DualCycle, ReGate
from regate_fx.runtime.samples import Samples
from regate_fx.runtime.shared_difficulty import SharedDifficulty

DOCS = {
    number: [Token(5), *(Token(6 + at, 6 + at, 0.5) for at in range(2 + number % 3))] for number in range(6)
}
LOSSES = reference_of(DOCS)

# Which samples a step draws, a loss for each of its labels, and whether the device is done with its copies by then.
drawn = st.lists(st.integers(0, len(DOCS) - 1), min_size=1, max_size=3, unique=True)
steps = st.lists(st.tuples(drawn, st.integers(0, 2**16), st.booleans()), min_size=1, max_size=12)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> BusyDevice:
    return BusyDevice(monkeypatch)


def samples_of(numbers: list[int]) -> Samples:
    gate = ReGate(LOSSES, special_ids=(), visual_ids=())
    return gate.choose(padded({number: DOCS[number] for number in numbers})).samples


def losses_of(samples: Samples, seed: int) -> Tensor:
    return torch.rand(samples.slot.shape, generator=torch.Generator().manual_seed(seed)) * 9


def observe_late(host: SharedDifficulty, samples: Samples, loss: Tensor) -> None:
    """`observe` with losses that are on the device."""
    on_device = replace(samples, observed=_Flags(samples.observed))
    host.observe(on_device, OnDevice(loss), _Flags(samples.slot >= 0))  # type: ignore[arg-type]


class _Flags(OnDevice):
    def __and__(self, other: _Flags) -> _Flags:
        return _Flags(self._values & other._values)


@settings(max_examples=60, deadline=None)
@given(steps=steps)
def test_it_knows_what_a_table_beside_the_losses_knows(steps: list[tuple[list[int], int, bool]]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        busy = BusyDevice(patched)
        host, beside = SharedDifficulty(LOSSES, 0.5, on_host=True), SharedDifficulty(LOSSES, 0.5)
        for numbers, seed, done in steps:
            samples = samples_of(numbers)
            assert torch.equal(host.known(samples).nan_to_num(-1), beside.known(samples).nan_to_num(-1))
            loss = losses_of(samples, seed)
            busy.is_done = done
            observe_late(host, samples, loss)
            beside.observe(samples, loss, samples.slot >= 0)
        busy.is_done = False
        copied = copy.deepcopy(host)
        for table in (host, copied):
            assert torch.equal(table.state()["ema"].nan_to_num(-1), beside.state()["ema"].nan_to_num(-1))


def test_it_waits_for_a_sample_that_comes_again_and_for_nothing_else(busy: BusyDevice) -> None:
    host = SharedDifficulty(LOSSES, on_host=True)
    for numbers in ([0, 1], [2], [3, 4]):
        host.known(samples_of(numbers))
        observe_late(host, samples_of(numbers), losses_of(samples_of(numbers), 1))
    assert not busy.waits and host.ema.isnan().all()
    assert not host.known(samples_of([2]))[samples_of([2]).slot >= 0].isnan().any()
    assert busy.waits == 2
    host.known(samples_of([5]))
    assert busy.waits == 2
    busy.is_done = True
    observe_late(host, samples_of([5]), losses_of(samples_of([5]), 1))
    assert not host.ema.isnan().any()


def test_a_broken_loss_is_named_with_a_later_batch_and_changes_nothing(busy: BusyDevice) -> None:
    host = SharedDifficulty(LOSSES, on_host=True)
    first, second = samples_of([1]), samples_of([2])
    observe_late(host, first, torch.full(first.slot.shape, math.nan))
    observe_late(host, second, losses_of(second, 3))
    busy.is_done = True
    with pytest.raises(InvalidInput, match="the loss of sample 1 is NaN or infinite"):
        observe_late(host, second, losses_of(second, 4))
    assert host.ema[first.slot[first.slot >= 0]].isnan().all()
    assert not host.ema[second.slot[second.slot >= 0]].isnan().any()
    host.settle()


def test_a_broken_loss_of_the_last_batch_is_named_by_a_state(busy: BusyDevice) -> None:
    host = SharedDifficulty(LOSSES, on_host=True)
    observe_late(host, samples_of([1]), torch.full(samples_of([1]).slot.shape, math.inf))
    with pytest.raises(InvalidInput, match="the loss of sample 1 is NaN or infinite"):
        host.state()


def test_a_loaded_state_forgets_what_was_on_the_way(busy: BusyDevice) -> None:
    host = SharedDifficulty(LOSSES, on_host=True)
    state = host.state()
    busy.is_done = False
    observe_late(host, samples_of([1]), losses_of(samples_of([1]), 1))
    observe_late(host, samples_of([1]), torch.full(samples_of([1]).slot.shape, math.nan))
    host.load_state(state)
    assert host.state()["ema"].isnan().all()


def test_a_gate_chooses_alike_from_either(generator: torch.Generator) -> None:
    schedule = DualCycle(keep=0.5, warmup=0, cycle=1, dense=0)
    gates: list[Any] = [
        ReGate(LOSSES, schedule=schedule, special_ids=(), visual_ids=(), difficulty_on=where)
        for where in ("device", "host")
    ]
    batch = padded(DOCS)
    for _ in range(3):
        masks = [gate.select(batch) for gate in gates]
        assert torch.equal(*masks)
        loss = torch.rand(batch["labels"].shape, generator=generator)
        for gate in gates:
            gate.difficulty.observe(gate.choose(batch).samples, loss, batch["labels"] != NO_LABEL)
    with pytest.raises(InvalidInput, match="difficulty_on: is 'gpu'"):
        ReGate(LOSSES, difficulty_on="gpu")  # type: ignore[arg-type]


@pytest.mark.cuda
def test_on_an_accelerator_it_knows_what_a_table_there_knows() -> None:
    host, beside = SharedDifficulty(LOSSES, on_host=True), SharedDifficulty(LOSSES)
    for numbers in ([0, 1], [2, 3], [1, 2], [4], [0, 4]):
        samples = samples_of(numbers).to("cuda")
        known = host.known(samples)
        assert known.is_cuda
        assert torch.equal(known.nan_to_num(-1), beside.known(samples).nan_to_num(-1))
        loss = losses_of(samples_of(numbers), sum(numbers)).cuda()
        for table in (host, beside):
            table.observe(samples, loss, samples.slot >= 0)
    assert torch.equal(host.state()["ema"].nan_to_num(-1), beside.state()["ema"].nan_to_num(-1))
