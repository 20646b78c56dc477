"""Stores of made-up losses, written as the teacher pass writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regate_fx.runtime import ReferenceLosses, SampleLosses
from regate_fx.runtime.store_writer import Plan, StoreWriter
from regate_fx.runtime.windows import Windows, fill

ABOUT = {"teacher": "t"}


def random_samples(count: int, seed: int = 0, labels: int = 9) -> list[SampleLosses]:
    """Samples of fewer than `labels` labels, some of none, their ids in no order."""
    chance = np.random.default_rng(seed)
    ids = chance.permutation(10 * count)[:count] - count
    hashes = chance.integers(-(2**63), 2**63, (count, 2), dtype=np.int64)
    return [
        SampleLosses(int(number), int(label), chance.exponential(size=length).astype(np.float32), int(text))
        for number, (label, text), length in zip(ids, hashes, chance.integers(0, labels, count), strict=True)
    ]


def write_store(
    folder: Path, samples: Iterable[SampleLosses], per_shard: int = 3, **plan: Any
) -> ReferenceLosses:
    """A store computed by a teacher who knows the losses."""
    data = list(samples)
    writer = StoreWriter(folder, Plan(ABOUT, len(data), per_shard, **plan))
    writer.publish(fill(writer, Windows(data, per_shard), list))
    return ReferenceLosses.open(folder)


def assert_same(found: ReferenceLosses, samples: Sequence[SampleLosses]) -> None:
    """The store holds these samples, value for value."""
    expected = ReferenceLosses.of(samples, ABOUT)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.starts.tolist() == expected.starts.tolist()
    assert found.hashes.tolist() == expected.hashes.tolist()
    assert found.losses.tolist() == expected.losses.tolist()
    assert found.about == expected.about
    assert found.fingerprint == expected.fingerprint
