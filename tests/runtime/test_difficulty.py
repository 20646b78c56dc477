"""The running mean of the student's losses against Eq. 2 restated."""

from __future__ import annotations

import math

import pytest
import restatement as plain
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regate_fx.errors import InvalidInput
from regate_fx.runtime.difficulty import Difficulty

LABELS = 5
observations = st.lists(st.tuples(st.integers(0, LABELS - 1), st.floats(0, 20, width=32)), max_size=30)


def update(difficulty: Difficulty, slot: int, loss: float, observed: bool = True) -> None:
    """One observation, beside a position without a label."""
    slots, losses = torch.tensor([[slot, -1]]), torch.tensor([[loss, 7.0]])
    difficulty.update(slots, losses, torch.tensor([[observed, True]]), torch.tensor([[4, 4]]))


@settings(max_examples=100)
@given(steps=observations, beta=st.sampled_from([0.0, 0.5, 0.9]))
def test_the_first_observation_sets_it_and_later_ones_decay(
    steps: list[tuple[int, float]], beta: float
) -> None:
    difficulty = Difficulty(LABELS, beta)
    expected: list[float | None] = [None] * LABELS
    for slot, loss in steps:
        update(difficulty, slot, loss)
        expected[slot] = plain.updated(expected[slot], loss, beta)
    wanted = torch.tensor([math.nan if value is None else value for value in expected])
    torch.testing.assert_close(difficulty.ema, wanted, equal_nan=True)


def test_labels_that_were_not_counted_keep_what_they_had() -> None:
    difficulty = Difficulty(LABELS)
    update(difficulty, 2, 3.0)
    update(difficulty, 2, 100.0, observed=False)
    update(difficulty, 3, 100.0, observed=False)
    assert difficulty.look_up(torch.tensor([[2, 3, -1]])).tolist()[0][0] == 3.0
    assert difficulty.look_up(torch.tensor([[3, -1]])).isnan().all()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_broken_loss_is_rejected_and_named(loss: float) -> None:
    difficulty = Difficulty(LABELS)
    update(difficulty, 2, 3.0)
    before = difficulty.ema.clone()
    slot, losses = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1.0, 2.0], [3.0, loss]])
    with pytest.raises(InvalidInput, match=r"token_loss: the loss of sample 9 is NaN or infinite at label 1"):
        difficulty.update(slot, losses, torch.ones(2, 2, dtype=torch.bool), torch.tensor([[8, 8], [9, 9]]))
    assert torch.equal(difficulty.ema.nan_to_num(-1), before.nan_to_num(-1))


def test_a_broken_loss_of_a_label_that_was_not_counted_does_no_harm() -> None:
    difficulty = Difficulty(LABELS)
    update(difficulty, 2, math.nan, observed=False)
    assert difficulty.ema.isnan().all()


def test_a_data_set_without_labels() -> None:
    difficulty = Difficulty(0)
    nothing = torch.tensor([[-1, -1]])
    assert difficulty.look_up(nothing).isnan().all()
    difficulty.update(nothing, torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool), nothing)
    assert difficulty.ema.numel() == 0


def test_a_table_of_another_data_set_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"ema: has \[3\] entries, the data set \[5\] labels"):
        Difficulty(LABELS).load(torch.zeros(3))


@pytest.mark.cuda
def test_on_an_accelerator_a_broken_loss_is_named_later_and_stored_never() -> None:
    difficulty = Difficulty(LABELS)
    slot = torch.tensor([[1, 2]], device="cuda")
    everything = torch.ones(1, 2, dtype=torch.bool, device="cuda")
    ids = torch.tensor([[9, 9]])
    difficulty.update(slot, torch.tensor([[1.0, math.nan]], device="cuda"), everything, ids)
    assert difficulty.ema.isnan().all()
    torch.cuda.synchronize()
    with pytest.raises(InvalidInput, match="sample 9"):
        difficulty.update(slot, torch.ones(1, 2, device="cuda"), everything, ids)
