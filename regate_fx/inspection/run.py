"""What there is to look at: reference losses, and the state of a gate that was trained with them.

Shapes: T labels in the data set, k labels of one sample.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from regate_fx.errors import InvalidInput, StoreMismatch
from regate_fx.runtime import ReferenceLosses
from regate_fx.runtime.checkpoint import STATE
from regate_fx.runtime.checkpoint import read_state as read_saved
from regate_fx.runtime.shared_difficulty import whole_ema
from regate_fx.runtime.store_files import MANIFEST

# What reading raises where a file is no state, or holds something else under a state's names.
_NO_STATE = (
    pickle.UnpicklingError, SafetensorError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class GateState:
    """What a checkpoint of a gate tells.

    ema:         float32 [T], NaN where a label was never observed; with what no rank has told the others yet
    step:        optimizer steps done
    fingerprint: of the reference losses it was trained with
    settings:    of its gate, by name
    """

    ema: Tensor
    step: int
    fingerprint: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """Reference losses, a gate's state, or both; one of them is there."""

    losses: ReferenceLosses | None
    state: GateState | None

    def setting(self, name: str, default: Any) -> Any:
        """What the gate was made with; without a state, what the teacher pass recorded, if it did."""
        if self.state is not None:
            return self.state.settings.get(name, default)
        recorded = self.losses.about if self.losses is not None else {}
        return recorded.get(name, default)


def open_run(paths: Sequence[str | os.PathLike[str]]) -> Run:
    """Open a store (a folder), a gate's state (a file, or a checkpoint's folder with one in it), or one of each.

    Raises `InvalidInput` for two of a kind, `StoreMismatch` where a path holds neither, or the state belongs to
    other reference losses.
    """
    named = [_named(Path(path)) for path in paths]
    folders = [path for path in named if path.is_dir()]
    files = [path for path in named if not path.is_dir()]
    for kind, found in (("stores", folders), ("checkpoints", files)):
        if len(found) > 1:
            raise InvalidInput(
                "paths", f"name {len(found)} {kind}.", "Give one store, one checkpoint, or both."
            )
    losses = ReferenceLosses.open(folders[0]) if folders else None
    state = read_state(files[0], losses) if files else None
    if losses is not None and state is not None and losses.fingerprint != state.fingerprint:
        raise StoreMismatch(
            str(files[0]),
            f"it belongs to other reference losses than those in {folders[0]}.",
            "Name the store that the run was trained with.",
        )
    return Run(losses, state)


def _named(path: Path) -> Path:
    """The store's folder or the gate's state that a path stands for."""
    if not path.is_dir() or (path / MANIFEST).exists():
        return path
    if (path / STATE).is_file():
        return path / STATE
    raise StoreMismatch(
        str(path),
        f"it holds neither {MANIFEST}, as a store does, nor {STATE}, as a checkpoint does.",
        "Name the folder of a finished teacher pass, or of a checkpoint that was saved with a gate.",
    )


def read_state(path: Path, losses: ReferenceLosses | None = None) -> GateState:
    """Read what `gate.save(path)` or `torch.save(gate.state_dict(), path)` wrote; losses: those it belongs to, if they
    are at hand. Raises `StoreMismatch`, and `StoreDamaged` for a file of the first kind."""
    if not path.exists():
        raise StoreMismatch(str(path), "there is nothing.", "Name a store's folder or a gate's checkpoint.")
    try:
        is_file_of_gate = path.suffix == ".safetensors"
        saved = (
            read_saved(path) if is_file_of_gate else torch.load(path, map_location="cpu", weights_only=True)
        )
        starts = losses.starts if losses is not None and losses.fingerprint == saved["fingerprint"] else None
        return GateState(
            whole_ema(saved, starts),
            int(saved["global_step"]),
            saved["fingerprint"],
            dict(saved["settings"]),
        )
    except _NO_STATE as error:
        raise StoreMismatch(
            str(path),
            f"it is no saved state of a gate ({type(error).__name__}).",
            "Write one with gate.save(path), which ends in .safetensors, or torch.save(gate.state_dict(), path).",
        ) from error


def labels_of_row(losses: ReferenceLosses, row: int) -> slice:
    """Which labels of the data set belong to the sample in a row of the store."""
    return slice(int(losses.starts[row]), int(losses.starts[row + 1]))


def reference_of_row(losses: ReferenceLosses, row: int) -> Tensor:
    """float32 [k]: the teacher's losses on the labels of the sample in a row of the store."""
    return losses.of_row(row)
