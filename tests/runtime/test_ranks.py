"""Several ranks, each with its own samples: what they know of difficulties, and what they save of it.

Shapes: B rows, S positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from collated import reference_of
from restatement import Token
from torch import Tensor

from regate_fx.errors import InvalidInput, Unsupported
from regate_fx.runtime import DualCycle, ReferenceLosses, ReGate
from regate_fx.runtime.policies import Random
from regate_fx.runtime.shared_difficulty import by_sample

RANKS = 2
SAMPLES = 12
SPARSE = DualCycle(keep=0.5, warmup=0, cycle=1, dense=0)


def made_up_losses(samples: int = SAMPLES) -> ReferenceLosses:
    generator = torch.Generator().manual_seed(5)
    docs = {}
    for sample_id in range(samples):
        refs = torch.rand(9, generator=generator).tolist()
        docs[sample_id] = [Token(3 + t, 3 + t if t > 2 else -100, ref) for t, ref in enumerate(refs)]
    return reference_of(docs)


def make_gate(schedule: DualCycle = SPARSE, **settings: Any) -> ReGate:
    return ReGate(made_up_losses(), schedule=schedule, **settings)


def make_batch(samples: list[int]) -> dict[str, Any]:
    ids = torch.arange(3, 12).expand(len(samples), 9).clone()
    labels = ids.masked_fill(torch.arange(9) <= 2, -100)
    return {"input_ids": ids, "labels": labels, "sample_id": torch.tensor(samples)}


def step(gate: ReGate, samples: list[int], epoch: int) -> Tensor:
    """Select from a batch, and observe losses that follow from sample, label and epoch."""
    batch = make_batch(samples)
    mask = gate.select(batch)
    counted = gate.rules.predicted(mask) & (batch["labels"] != -100)
    labels = torch.arange(9) * 7 + batch["sample_id"][:, None] * 13 + epoch * 5
    token_loss = torch.where(counted, (labels % 11).float() / 4, 0.0)
    gate.observe(batch, SimpleNamespace(token_loss=token_loss, counted=counted))
    gate.step()
    return mask


def epochs(gate: ReGate, batches: Callable[[int], list[int]], number: int, first: int = 0) -> list[Tensor]:
    masks = []
    for epoch in range(first, first + number):
        masks += [step(gate, batches(begin), epoch) for begin in range(0, SAMPLES, 4)]
        gate.exchange()
    return masks


def of_rank(rank: int) -> Callable[[int], list[int]]:
    return lambda begin: [begin + rank * 2, begin + rank * 2 + 1]


def of_all(begin: int) -> list[int]:
    return list(range(begin, begin + 4))


def bits(values: Tensor) -> list[int]:
    return values.contiguous().view(torch.int32).tolist()


def run_ranks(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What `work(rank, folder)` returned on each of two ranks."""
    torch.multiprocessing.start_processes(_rank, (work, folder), nprocs=RANKS, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _rank(rank: int, work: Callable[[int, Path], Any], folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("where", ["device", "host"])
def test_two_ranks_select_and_learn_what_one_does(tmp_path: Path, where: Any) -> None:
    def work(rank: int, folder: Path) -> Any:
        gate = make_gate(difficulty_on=where)
        return epochs(gate, of_rank(rank), 3), gate.difficulty.ema

    alone = make_gate()
    expected = epochs(alone, of_all, 3)
    (first, of_first), (second, of_second) = run_ranks(work, tmp_path)
    for whole, *halves in zip(expected, first, second, strict=True):
        assert torch.equal(whole, torch.cat(halves))
    assert bits(of_first) == bits(of_second) == bits(alone.difficulty.ema)
    assert not torch.equal(expected[0], expected[3])


def test_an_observation_of_another_rank_shows_after_the_exchange(tmp_path: Path) -> None:
    def work(rank: int, folder: Path) -> Any:
        gate = make_gate()
        step(gate, [rank], epoch=0)
        slots = torch.arange(gate.losses.starts[2])[None]
        before = gate.difficulty.look_up(slots)
        gate.exchange()
        return before, gate.difficulty.look_up(slots)

    (before, after), (_, of_other) = run_ranks(work, tmp_path)
    assert before[:, :6].isfinite().any() and before[:, 6:].isnan().all()
    assert after[:, 6:].isfinite().any()
    assert bits(after) == bits(of_other)


def test_of_a_sample_that_both_draw_the_first_rank_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work(rank: int, folder: Path) -> Any:
        gate = make_gate()
        step(gate, [7], epoch=rank)
        own = gate.difficulty.own
        with caplog.at_level("WARNING", logger="regate_fx"):
            gate.exchange()
        return own, gate.difficulty.ema, caplog.text

    (own, ema, said), (others, of_other, _) = run_ranks(work, tmp_path)
    assert bits(own[1]) != bits(others[1])
    assert bits(ema[own[0]]) == bits(own[1])
    assert bits(ema) == bits(of_other)
    assert "1 samples were observed by several ranks" in said and "[7]" in said


def test_of_a_sample_that_several_ranks_observed_all_labels_are_of_one() -> None:
    starts = torch.tensor([0, 3, 3, 6, 9])
    observed = [
        (torch.tensor([0, 4]), torch.tensor([0.1, 0.2])),
        (torch.tensor([0, 1, 8]), torch.tensor([1.1, 1.2, 1.3])),
        (torch.tensor([2, 3, 6]), torch.tensor([2.1, 2.2, 2.3])),
    ]
    kept, repeated = by_sample(observed, starts)
    assert [slots.tolist() for slots, _ in kept] == [[0, 4], [8], []]
    assert kept[1][1].tolist() == [pytest.approx(1.3)]
    assert repeated.tolist() == [0, 2, 3]
    assert by_sample([], starts)[0] == []


def test_labels_of_a_sample_that_both_draw_are_not_mixed(tmp_path: Path) -> None:
    """The second rank counts labels that the first does not, of the same sample."""

    def work(rank: int, folder: Path) -> Any:
        gate = make_gate()
        batch = make_batch([7])
        counted = (batch["labels"] != -100) & (torch.arange(9) % 2 == rank)
        gate.observe(batch, SimpleNamespace(token_loss=torch.full((1, 9), 1.0 + rank), counted=counted))
        gate.gather()
        state = gate.state_dict()
        gate.exchange()
        return gate.difficulty.ema, state

    (ema, state), (of_other, _) = run_ranks(work, tmp_path)
    assert bits(ema) == bits(of_other)
    assert ema[ema.isfinite()].tolist() == [1.0] * 3
    resumed = make_gate()
    resumed.load_state_dict(state)
    assert bits(resumed.difficulty.ema) == bits(ema)


@pytest.mark.parametrize("exchanging", [False, True])
def test_epochs_without_an_exchange_are_noticed_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, exchanging: bool
) -> None:
    def work(rank: int, folder: Path) -> Any:
        gate = make_gate()
        with caplog.at_level("WARNING", logger="regate_fx"):
            for epoch in range(3):
                for begin in range(0, SAMPLES, 4):
                    step(gate, of_rank(rank)(begin), epoch)
                if exchanging:
                    gate.exchange()
        return caplog.text, gate.difficulty.repeats

    for rank, (said, repeats) in enumerate(run_ranks(work, tmp_path)):
        noticed = f"sample {rank * 2} was observed again by this process since the last gate.exchange()"
        assert said.count("was observed again") == said.count(noticed) == (0 if exchanging else 1)
        assert repeats == (0 if exchanging else SAMPLES)


def test_a_sample_that_comes_twice_in_an_epoch_of_one_process(caplog: pytest.LogCaptureFixture) -> None:
    """A process alone tells its epochs apart by `exchange`, or not at all."""
    gate = make_gate()
    for epoch in range(2):
        step(gate, [1, 2], epoch)
    assert (caplog.text, gate.difficulty.repeats) == ("", 0)
    for epoch in range(2):
        gate.exchange()
        for samples in ([1, 2], [3, 1], [4, 4], [2, 5]):
            step(gate, samples, epoch)
    assert caplog.text.count("was observed again") == caplog.text.count("sample 1 was observed again") == 1
    assert gate.difficulty.repeats == 6
    gate.load_state_dict(gate.state_dict())
    step(gate, [1, 2], 2)
    assert gate.difficulty.repeats == 6


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state in the middle of the second epoch, and how the run went on from there."""

    def work(rank: int, folder: Path) -> Any:
        gate = make_gate()
        epochs(gate, of_rank(rank), 1)
        step(gate, of_rank(rank)(0), epoch=1)
        with pytest.raises(Unsupported, match=re.escape("Call gate.gather() on every rank")):
            gate.state_dict()
        gate.gather()
        state = gate.state_dict()
        rest = [step(gate, of_rank(rank)(begin), 1) for begin in (4, 8)]
        gate.exchange()
        return state, rest + epochs(gate, of_rank(rank), 1, first=2), gate.difficulty.ema

    folder = tmp_path_factory.mktemp("interrupted")
    (state, first, ema), (other, second, _) = run_ranks(work, folder)
    assert state["pending"] == other["pending"]
    assert bits(state["ema"]) == bits(other["ema"])
    return {"state": state, "masks": (first, second), "ema": ema}


def test_a_resumed_run_is_the_uninterrupted_one(interrupted: dict[str, Any], tmp_path: Path) -> None:
    def work(rank: int, folder: Path) -> Any:
        gate = make_gate()
        gate.load_state_dict(interrupted["state"])
        rest = [step(gate, of_rank(rank)(begin), 1) for begin in (4, 8)]
        gate.exchange()
        return rest + epochs(gate, of_rank(rank), 1, first=2), gate.difficulty.ema

    for rank, (masks, ema) in enumerate(run_ranks(work, tmp_path)):
        for seen, expected in zip(masks, interrupted["masks"][rank], strict=True):
            assert torch.equal(seen, expected)
        assert bits(ema) == bits(interrupted["ema"])


def test_one_process_goes_on_from_two_ranks(interrupted: dict[str, Any]) -> None:
    gate = make_gate()
    gate.load_state_dict(interrupted["state"])
    masks = [step(gate, of_all(begin), 1) for begin in (4, 8)] + epochs(gate, of_all, 1, first=2)
    for seen, *halves in zip(masks, *interrupted["masks"], strict=True):
        assert torch.equal(seen, torch.cat(halves))
    assert bits(gate.difficulty.ema) == bits(interrupted["ema"])


def test_two_ranks_go_on_from_one_process(tmp_path: Path) -> None:
    alone = make_gate()
    epochs(alone, of_all, 1)
    state = alone.state_dict()
    expected = epochs(alone, of_all, 1, first=1)

    def work(rank: int, folder: Path) -> Any:
        gate = make_gate()
        gate.load_state_dict(state)
        return epochs(gate, of_rank(rank), 1, first=1), gate.difficulty.ema

    (first, ema), (second, _) = run_ranks(work, tmp_path)
    for whole, *halves in zip(expected, first, second, strict=True):
        assert torch.equal(whole, torch.cat(halves))
    assert bits(ema) == bits(alone.difficulty.ema)


def test_a_distributed_checkpoint_of_two_ranks(tmp_path: Path) -> None:
    def work(rank: int, folder: Path) -> Any:
        gate = make_gate()
        epochs(gate, of_rank(rank), 1)
        step(gate, of_rank(rank)(0), epoch=1)
        gate.gather()
        dcp.save({"gate": gate}, checkpoint_id=folder / "checkpoint")
        resumed = make_gate()
        resumed.gather()
        dcp.load({"gate": resumed}, checkpoint_id=folder / "checkpoint")
        rest = [[step(g, of_rank(rank)(begin), 1) for begin in (4, 8)] for g in (gate, resumed)]
        for each in (gate, resumed):
            each.exchange()
        return rest, gate.difficulty.ema, resumed.difficulty.ema

    for rest, ema, resumed in run_ranks(work, tmp_path):
        assert all(torch.equal(one, other) for one, other in zip(*rest, strict=True))
        assert bits(ema) == bits(resumed)


def other_keep(rank: int) -> ReGate:
    return make_gate(DualCycle(keep=0.5 - rank / 4, warmup=rank, cycle=1, dense=0))


def other_losses(rank: int) -> ReGate:
    return ReGate(made_up_losses(SAMPLES + rank), schedule=SPARSE)


def other_seed(rank: int) -> ReGate:
    return ReGate(made_up_losses(), schedule=SPARSE, policy=Random(seed=rank))


def other_difficulties(rank: int) -> ReGate:
    gate = make_gate()
    step(gate, of_rank(rank)(0), 0)  # with which the ranks have agreed once
    gate.gather()
    state = gate.state_dict()
    gate.load_state_dict({**state, "ema": torch.full_like(state["ema"], 1.0 + rank)})
    return gate


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (
            other_keep,
            r"keep: is 0\.5 on rank 0 and 0\.25 on rank 1, which differ in \['keep', 'warmup'\] altogether",
        ),
        (
            other_losses,
            r"losses: is '\w{64}' on rank 0 and '\w{64}' on rank 1\. Start every rank with the same store",
        ),
        (other_seed, r"policy\.seed: is 0 on rank 0 and 1 on rank 1\."),
        (other_difficulties, r"difficulty: is '\w{64}' on rank 0 and '\w{64}' on rank 1\."),
    ],
    ids=["keep", "losses", "seed", "difficulties"],
)
def test_ranks_that_disagree_stop_with_the_same_words(
    tmp_path: Path, other: Callable[[int], ReGate], problem: str
) -> None:
    def work(rank: int, folder: Path) -> Any:
        gate = other(rank)
        with pytest.raises(InvalidInput) as caught:
            step(gate, of_rank(rank)(0), 0)
        return str(caught.value)

    said = run_ranks(work, tmp_path)
    assert said[0] == said[1]
    assert re.match(problem, said[0])
