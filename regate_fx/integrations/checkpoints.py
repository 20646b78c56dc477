"""The gate's state beside that of model and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from regate_fx.runtime import ReGate

STATE = "regate.safetensors"


def register(accelerator: Accelerator, gate: ReGate) -> None:
    """Let `accelerator.save_state` and `load_state` take the gate along, in a file `regate.safetensors`.

    What each rank has observed is in it: `register_for_checkpointing` would save that of the main process alone.
    """

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        gate.save(Path(output_dir) / STATE)

    def load(models: list[Any], input_dir: str) -> None:
        gate.load(Path(input_dir) / STATE)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
