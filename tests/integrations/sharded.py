"""Run `examples/fsdp2.py` and leave in `FOLDER/RANK.pt` what each training call computed. Launched by `test_launch.py`:

torchrun --nproc_per_node 2 tests/integrations/sharded.py FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests" / "integrations")]

import fsdp2  # noqa: E402
from accelerate import PartialState  # noqa: E402
from computed import Computed  # noqa: E402
from conftest import SMALL_LLAMA  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    into = Path(sys.argv[1])
    rank = PartialState(cpu=True).process_index
    args = argparse.Namespace(
        backend="eager", samples=64, epochs=2, gradient_checkpointing=True, cpu=True, folder=str(into)
    )
    with pytest.MonkeyPatch.context() as patch:
        computed = Computed(patch, SMALL_LLAMA)
        fsdp2.main(args)
    torch.save([(call.computed, call.tokens) for call in computed.calls], into / f"{rank}.pt")
