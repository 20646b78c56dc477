"""A data set cut into windows, windows into batches, and the work shared between processes.

A window is a run of samples in the order of the data; each becomes one shard. Its batches depend on the window alone,
so that whoever computes it, whenever, computes the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from regate_fx.errors import InvalidInput
from regate_fx.runtime.store import SampleLosses
from regate_fx.runtime.store_plan import SAMPLES_PER_SHARD
from regate_fx.runtime.store_writer import StoreWriter

Example = Mapping[str, Any]

_SECONDS_BETWEEN_LOOKS = 0.2
_WINDOWS = 256
_FEWEST, _OF_A_STREAM = 500, 5_000


def size_of_windows(samples: int | None) -> int:
    """Samples of a window unless somebody says otherwise; samples: of the data set, None of a stream.

    A window is what processes share the work by, and what a kill loses at most: in a small data set it is small, and a
    large one has no more of them than a folder is quick to list.
    """
    if samples is None:
        return _OF_A_STREAM
    return min(max(-(-samples // _WINDOWS), _FEWEST), SAMPLES_PER_SHARD)


class Windows:
    """The windows of a data set: an indexable one of known length, or a stream that is read from its beginning.

    samples: number of samples, None of a stream; size: samples of a window; count: of windows, 0 of a stream.
    """

    def __init__(self, data: Any, size: int | None = None) -> None:
        """size: by default that of `size_of_windows`. Raises `InvalidInput` for data that can be read once only."""
        if isinstance(data, Iterator):
            raise InvalidInput(
                "data",
                "is an iterator, which can be read only once.",
                "Pass what it was made from, a sequence or an iterable data set.",
            )
        if size is not None and size < 1:
            raise InvalidInput("samples_per_shard", f"is {size}.", "Give at least 1.")
        self._data = data
        # Torch's iterable data sets have a __getitem__, which only raises.
        indexable = hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)
        indexable = indexable and hasattr(data, "__len__")
        self.samples = len(data) if indexable else None
        self.size = size_of_windows(self.samples) if size is None else size
        self.count = -(-(self.samples or 0) // self.size)

    def sweep(self, first: int = 0) -> Iterator[tuple[int, Iterator[Example]]]:
        """Every window with its examples, which are read when asked for; not to be asked for after the next window.

        first: the window to begin with; a stream begins with its first in any case.
        """
        if self.samples is None:
            yield from self._stream()
            return
        for step in range(self.count):
            window = (first + step) % self.count
            begin = window * self.size
            rows = range(begin, min(begin + self.size, self.samples))
            yield window, (self._data[row] for row in rows)

    def _stream(self) -> Iterator[tuple[int, Iterator[Example]]]:
        examples = iter(self._data)
        for window in itertools.count():
            first = list(itertools.islice(examples, 1))
            if not first:
                return
            inside = itertools.chain(first, itertools.islice(examples, self.size - 1))
            yield window, inside
            for _ in inside:
                pass

    def length(self, window: int) -> int:
        """Samples of a window; of a stream, at most so many."""
        return self.size if self.samples is None else min(self.size, self.samples - window * self.size)


def fill(
    writer: StoreWriter,
    windows: Windows,
    score: Callable[[Iterator[Example]], Sequence[SampleLosses]],
    check: Callable[[int, Iterator[Example]], None] = lambda window, examples: None,
    *,
    rank: int = 0,
    ranks: int = 1,
    passed: Callable[[int], None] = lambda window: None,
) -> int:
    """Compute every window that nobody has computed, until all are published. Returns their number.

    score:  the losses of the examples of a window, in their order
    check:  called with each window that was published before, and its examples; by one of `ranks`
    passed: called with each window that was published, or is, by someone else
    A stream is read again where a window was left to a process that then died.
    """
    before = writer.shards().keys()
    first = rank * windows.count // ranks
    done: set[int] = set()
    while True:
        held: set[int] = set()
        for window, examples in windows.sweep(first):
            if window in done:
                continue
            if window in before and window % ranks == rank:
                check(window, examples)
            if not writer.has(window):
                with writer.claim(window) as mine:
                    if not mine:
                        held.add(window)
                        continue
                    # Between the look and the lock, someone else may have published it.
                    if not writer.has(window):
                        writer.write(window, score(examples))
                        done.add(window)
                        continue
            passed(window)
            done.add(window)
        finished = held - _wait(writer, held)
        for window in finished:
            passed(window)
        done |= finished
        if finished == held:
            return len(done)


def _wait(writer: StoreWriter, held: set[int]) -> set[int]:
    """Until each window is published, or until the holder of one is gone. Returns those that are not published."""
    while waiting := {window for window in held if not writer.has(window)}:
        for window in waiting:
            with writer.claim(window) as free:
                if free:
                    return waiting
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return waiting
