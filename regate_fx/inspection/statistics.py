"""Numbers over many labels: how they are spread, and which are the hardest and the easiest.

Shapes: n labels looked at, V label ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regate_fx.inspection.run import labels_of_row, reference_of_row
from regate_fx.runtime import ReferenceLosses

MOST_SAMPLES = 20_000
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_BINS = 12


@dataclass(frozen=True)
class Spread:
    """How the known ones of some values are spread.

    count:     values in all; known: those that are not NaN
    quantiles: at `QUANTILES`
    edges, heights: of a histogram; the first and last bin take in what lies beyond the 1st and 99th percentile
    The last four are empty, and the mean NaN, where nothing is known.
    """

    count: int
    known: int
    mean: float
    quantiles: tuple[float, ...]
    edges: tuple[float, ...]
    heights: tuple[int, ...]


def spread(values: Tensor) -> Spread:
    """The spread of float [n], NaN where unknown."""
    known = values[~values.isnan()].double().numpy()
    if not len(known):
        return Spread(len(values), 0, float("nan"), (), (), ())
    low, high = np.quantile(known, [0.01, 0.99])
    heights, edges = np.histogram(
        known.clip(low, high), bins=_BINS, range=(low, high) if high > low else None
    )
    return Spread(
        len(values),
        len(known),
        float(known.mean()),
        tuple(np.quantile(known, QUANTILES).tolist()),
        tuple(edges.tolist()),
        tuple(heights.tolist()),
    )


@dataclass(frozen=True)
class Labels:
    """Labels of several samples, one after the other.

    reference: float32 [n]; ema: float32 [n], NaN where never observed
    sample_id: int64 [n]; number: int64 [n], of each label in its sample
    """

    reference: Tensor
    ema: Tensor
    sample_id: Tensor
    number: Tensor

    @property
    def excess(self) -> Tensor:
        """float32 [n]: the student's running mean minus the teacher's loss."""
        return self.ema - self.reference

    def of(self, name: str) -> Tensor:
        """float32 [n]: `reference`, `ema` or `excess`."""
        values: Tensor = getattr(self, name)
        return values


def labels_of(losses: ReferenceLosses, ema: Tensor | None, most: int = MOST_SAMPLES) -> Labels:
    """The labels of a store's samples; of more than `most` samples, of that many, evenly spread.

    ema: float32 [T], the running mean of each label of the data set.
    """
    rows = torch.linspace(0, len(losses) - 1, min(most, len(losses))).long().tolist()
    parts = []
    for row in rows:
        reference, at = reference_of_row(losses, row), labels_of_row(losses, row)
        own = torch.full_like(reference, torch.nan) if ema is None else ema[at]
        number = torch.arange(len(reference))
        parts.append((reference, own, losses.ids[row].expand(len(reference)), number))
    if not parts:
        return Labels(torch.zeros(0), torch.zeros(0), torch.zeros(0).long(), torch.zeros(0).long())
    return Labels(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Extreme:
    """One of the hardest or easiest: a label, or all labels of one token.

    name: how it is shown; count: labels; value: what it was ranked by; reference, ema: means, NaN where unknown
    """

    name: str
    count: int
    value: float
    reference: float
    ema: float


def hardest_and_easiest(labels: Labels, by: str, top: int) -> tuple[list[Extreme], list[Extreme]]:
    """The single labels with the highest and the lowest values of `by` ("reference", "ema", "excess")."""

    def shown(index: int) -> Extreme:
        return Extreme(
            f"sample {int(labels.sample_id[index])}, label {int(labels.number[index])}",
            1,
            float(labels.of(by)[index]),
            float(labels.reference[index]),
            float(labels.ema[index]),
        )

    return _ends(labels.of(by), top, shown)


class TokenMeans:
    """Means over all labels of the same token, gathered sample by sample."""

    def __init__(self) -> None:
        self._ids: list[Tensor] = []
        self._values: dict[str, list[Tensor]] = {"reference": [], "ema": [], "excess": []}

    def add(self, ids: Tensor, reference: Tensor, ema: Tensor) -> None:
        """Labels of one more sample: ids int64 [k], reference and ema float32 [k]."""
        self._ids.append(ids)
        for name, values in (("reference", reference), ("ema", ema), ("excess", ema - reference)):
            self._values[name].append(values)

    def hardest_and_easiest(
        self, by: str, top: int, name: Callable[[int], str], least: int = 2
    ) -> tuple[list[Extreme], list[Extreme]]:
        """The tokens with the highest and lowest means of `by`, of those that are a label `least` times or more."""
        if not self._ids:
            return [], []
        tokens, inverse, counts = torch.cat(self._ids).unique(return_inverse=True, return_counts=True)
        means = {key: _means(torch.cat(values), inverse, len(tokens)) for key, values in self._values.items()}
        ranked = means[by].masked_fill(counts < least, torch.nan)

        def shown(index: int) -> Extreme:
            return Extreme(
                name(int(tokens[index])),
                int(counts[index]),
                float(means[by][index]),
                float(means["reference"][index]),
                float(means["ema"][index]),
            )

        return _ends(ranked, top, shown)


def _means(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """float64 [count]: the mean of the known values of each group, NaN where there are none."""
    known = ~values.isnan()
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, groups[known], values[known].double())
    return sums / groups[known].bincount(minlength=count)


def _ends(values: Tensor, top: int, shown: Callable[[int], Extreme]) -> tuple[list[Extreme], list[Extreme]]:
    """The highest and the lowest known values; with few of them, none is both."""
    known = (~values.isnan()).nonzero().flatten()
    order = known[values[known].argsort(descending=True, stable=True)]
    top = min(top, -(-len(order) // 2))
    lowest: Iterable[int] = order.flip(0)[: min(top, len(order) - top)].tolist()
    return [shown(index) for index in order[:top].tolist()], [shown(index) for index in lowest]
