"""The gate's state beside that of model and optimizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from regate_fx.runtime import ReGate
from regate_fx.runtime.checkpoint import STATE

logger = logging.getLogger("regate_fx")


def register(accelerator: Accelerator, gate: ReGate) -> None:
    """Let `accelerator.save_state` and `load_state` take the gate along, in a file `regate.safetensors`.

    What each rank has observed is in it: `register_for_checkpointing` would save that of the main process alone.
    A state saved in the middle of a gradient accumulation is written all the same, since it may be the last chance to
    write one; a warning says what resuming from it loses.
    """

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if not accelerator.sync_gradients and accelerator.is_main_process:
            logger.warning(
                "%s is saved in the middle of a gradient accumulation. accelerate saves no gradients: resumed from "
                "here, the batches since the last optimizer step are missing from the next one, though the gate has "
                "observed them. For a resumed run that equals an uninterrupted one, save where "
                "accelerator.sync_gradients is True, after optimizer.step().",
                output_dir,
            )
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        gate.save(Path(output_dir) / STATE)

    def load(models: list[Any], input_dir: str) -> None:
        gate.load(Path(input_dir) / STATE)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
