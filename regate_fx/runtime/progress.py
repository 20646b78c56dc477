"""How far the teacher pass is, in the terminal."""

from __future__ import annotations

from datetime import timedelta
from typing import Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text


class PassProgress:
    """A bar over the samples of all processes, with this one's tokens a second and the time left for all."""

    def __init__(self, samples: int | None, *, shown: bool) -> None:
        """samples: of the data set, None of a stream."""
        columns = (
            TextColumn("teacher pass"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples"),
            _TokensPerSecond(),
            TimeElapsedColumn(),
            _TimeLeft(),
        )
        self._bar = Progress(*columns, disable=not shown)
        self._task = self._bar.add_task("", total=samples, tokens=0, earlier=0)
        self._tokens = 0
        self._earlier = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def computed(self, samples: int, tokens: int) -> None:
        """A batch is done. tokens: its positions without padding."""
        self._tokens += tokens
        self._bar.update(self._task, advance=samples, tokens=self._tokens)

    def passed(self, samples: int, *, earlier: bool) -> None:
        """Samples that someone else has computed, earlier: before the start, so that they tell nothing of the pace."""
        self._earlier += samples if earlier else 0
        self._bar.update(self._task, advance=samples, earlier=self._earlier)


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["earlier"]
        if not done or not task.elapsed or task.remaining is None:
            return Text("left: ?")
        return Text(f"left: {timedelta(seconds=round(task.remaining * task.elapsed / done))}")


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.elapsed:
            return Text("")
        return Text(f"{task.fields['tokens'] / task.elapsed:,.0f} tokens/s")
