"""How far the teacher pass is, in the terminal."""

from __future__ import annotations

from typing import Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class PassProgress:
    """A bar over the samples of all processes, with this one's tokens a second and the time left.

    The time left follows the pace at which samples become known as done, by whomever.
    """

    def __init__(self, samples: int | None, *, shown: bool) -> None:
        """samples: of the data set, None of a stream."""
        columns = (
            TextColumn("teacher pass"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples"),
            _TokensPerSecond(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, disable=not shown)
        self._task = self._bar.add_task("", total=samples, tokens=0)
        self._tokens = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def computed(self, samples: int, tokens: int) -> None:
        """A batch is done. tokens: its positions without padding."""
        self._tokens += tokens
        self._bar.update(self._task, advance=samples, tokens=self._tokens)

    def passed(self, samples: int) -> None:
        """Samples that need not be computed here."""
        self._bar.update(self._task, advance=samples)


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.elapsed:
            return Text("")
        return Text(f"{task.fields['tokens'] / task.elapsed:,.0f} tokens/s")
