"""Two processes, started as users start them, train as one does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from data_parallel import run
from tiers import exhaustive

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TIMEOUT = 240


def launch(*command: str) -> str:
    """What a launcher's processes print. One that hangs is ended."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        # The launcher ends its workers.
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate()
        raise AssertionError(f"still running after {TIMEOUT} s:\n{err}") from None
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process finds, and what each of two does."""
    alone = run(tmp_path_factory.mktemp("alone"), 1)
    folder = tmp_path_factory.mktemp("two")
    program = str(HERE / "data_parallel.py")
    port = ["--main_process_port", "0"]
    launch("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *port, program, str(folder))
    return alone, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("how", ["by_trainer", "by_loop"])
def test_two_processes_train_as_one(how: str, results: Any) -> None:
    alone, ranks = results
    for rank in ranks:
        assert len(rank[how]["buckets"].split(",")) > 1
        for name, weight in alone[how]["weights"].items():
            torch.testing.assert_close(rank[how]["weights"][name], weight)
    assert all(
        torch.equal(ranks[0][how]["weights"][name], weight)
        for name, weight in ranks[1][how]["weights"].items()
    )


@pytest.mark.parametrize("how", ["by_trainer", "by_loop"])
def test_each_process_computes_a_part_of_its_own_tokens(how: str, results: Any) -> None:
    alone, ranks = results
    for rank in ranks:
        assert [computed < tokens for computed, tokens in rank[how]["calls"]] == [False] * 2 + [True] * 6
    both = [
        tuple(map(sum, zip(*pair, strict=True)))
        for pair in zip(*(rank[how]["calls"] for rank in ranks), strict=True)
    ]
    assert both == alone[how]["calls"]
    assert ranks[0][how]["calls"] != ranks[1][how]["calls"]


@pytest.mark.parametrize("how", ["by_trainer", "by_loop"])
def test_after_an_epoch_each_process_knows_what_the_other_observed(how: str, results: Any) -> None:
    alone, ranks = results
    for rank in ranks:
        torch.testing.assert_close(rank[how]["ema"], alone[how]["ema"], equal_nan=True)


def test_logs_are_those_of_all_processes(results: Any) -> None:
    alone, ranks = results
    names = ("loss", "regate/active_tokens", "regate/keep_ratio")
    for rank in ranks:
        for one, other in zip(alone["by_trainer"]["logs"][:-1], rank["by_trainer"]["logs"][:-1], strict=True):
            for name in names:
                assert other[name] == pytest.approx(one[name], rel=1e-4)
    assert alone["by_loop"]["steps"] == ranks[0]["by_loop"]["steps"] == 4


@exhaustive
def test_two_launchers_as_on_two_machines(tmp_path: Path) -> None:
    program = str(ROOT / "examples" / "accelerate_loop.py")
    options = ["--samples", "32", "--epochs", "1", "--folder", str(tmp_path)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master_addr", "127.0.0.1", "--master_port", str(free.getsockname()[1])]
    nodes = ("torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *address)
    with ThreadPoolExecutor(2) as machines:
        outputs = list(
            machines.map(lambda rank: launch(*nodes, "--node_rank", str(rank), program, *options), range(2))
        )
    assert all("after 2 steps" in output for output in outputs)


def test_sharded_layers_compute_a_part_of_their_tokens(tmp_path: Path) -> None:
    launch("torch.distributed.run", "--nproc_per_node", "2", str(HERE / "sharded.py"), str(tmp_path))
    for rank in range(2):
        calls = torch.load(tmp_path / f"{rank}.pt")
        sparse = [computed < tokens for computed, tokens in calls]
        # Four dense steps, then cycles of eight, the first two of them dense.
        assert sparse == [False] * 4 + ([False] * 2 + [True] * 6) + [False] * 2 + [True] * 2


def test_the_plugin_of_accelerate_shards_a_gated_model() -> None:
    program = str(HERE / "sharded_by_plugin.py")
    output = launch(
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        program,
    )
    assert output.count("equal: tied False") == output.count("equal: tied True") == 2
