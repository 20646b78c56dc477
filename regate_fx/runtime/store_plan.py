"""What a teacher pass computes, and whether that is what was computed before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regate_fx.errors import InvalidInput, StoreMismatch
from regate_fx.runtime.store import LossType

SAMPLES_PER_SHARD = 20_000
"""As many as a shard has at most, unless somebody says otherwise."""


@dataclass(frozen=True)
class Plan:
    """What a pass computes. Whoever computes a window of the same plan finds the same losses.

    about:             what the losses are computed with; stays with the store
    samples:           of the whole data set, None where only reading it tells
    samples_per_shard: a window of so many samples, in the order of the data, makes a shard
    losses:            how a loss is stored
    batches:           what else decides the last bits of a loss, such as the size of a batch
    """

    about: Mapping[str, Any]
    samples: int | None = None
    samples_per_shard: int = SAMPLES_PER_SHARD
    losses: LossType = "float32"
    batches: Mapping[str, Any] | None = None

    def content(self) -> dict[str, Any]:
        """As JSON reads it back. Raises `InvalidInput` for values that JSON has not."""
        written = {
            "about": dict(self.about),
            "samples": self.samples,
            "samples_per_shard": self.samples_per_shard,
            "losses": self.losses,
            "batches": dict(self.batches or {}),
        }
        try:
            read: dict[str, Any] = json.loads(json.dumps(written))
        except TypeError as error:
            raise InvalidInput(
                "settings", f"cannot be written as JSON ({error}).", "Use plain values."
            ) from error
        return read


def check_about(folder: Path, stored: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raises `StoreMismatch` where losses were computed with something else."""
    differing = _differing(stored, about)
    if differing:
        raise StoreMismatch(
            str(folder),
            f"its losses were computed with another {', '.join(differing)}.",
            "Choose another folder, or open it with ReferenceLosses.open if the model has been trained since.",
        )


def _differing(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of what differs, `config.rope_theta` for what lies deeper."""
    names = []
    for name in sorted(stored.keys() | now.keys()):
        before, after = stored.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            names += [f"{name}.{inner}" for inner in _differing(before, after)]
        elif before != after:
            names.append(name)
    return names


def check_samples(folder: Path, stored: int | None, samples: int | None, *, finished: bool) -> None:
    """Raises `StoreMismatch` where the data set has grown, or changed its size in mid-pass."""
    if stored is None or samples is None or stored == samples or (finished and samples < stored):
        return
    change = f"grown by {samples - stored}" if samples > stored else f"shrunk by {stored - samples}"
    raise StoreMismatch(
        str(folder),
        f"its teacher pass was over {stored} samples, the data set now has {samples}: it has {change} since.",
        "Run the teacher pass over the data set as it is now in another folder, or use the data set of that time.",
    )
