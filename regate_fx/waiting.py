"""Tell the user what a slow first call is doing while they wait."""

from __future__ import annotations

import logging
import os
import time

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers.utils.logging import is_progress_bar_enabled

logger = logging.getLogger("regate_fx")


class Waiting:
    """The stages of a call that compiles, one after the other.

    At a terminal (standard error) the present stage and its seconds stand in a line that goes away in the end; only in
    the first process of a machine, and not after `transformers.utils.logging.disable_progress_bar()`. The logger
    `regate_fx` gets every stage at level INFO when it is over, wherever it runs.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._line: Progress | None = None
        self._stage = ""
        self._began = 0.0

    def tell(self, stage: str) -> None:
        """Another stage begins."""
        self._end_stage()
        self._stage, self._began = stage, time.perf_counter()
        console = self._console or Console(stderr=True)
        if (
            not console.is_terminal
            or not is_progress_bar_enabled()
            or os.environ.get("LOCAL_RANK", "0") != "0"
        ):
            return
        if self._line is None:
            columns = SpinnerColumn(), TextColumn("regate_fx: {task.description}"), TimeElapsedColumn()
            # What the model prints while it is traced goes where it always goes.
            self._line = Progress(
                *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._line.start()
        for task in self._line.task_ids:
            self._line.remove_task(task)
        self._line.add_task(stage, total=None)

    def over(self) -> None:
        """The call that compiled returns."""
        self._end_stage()
        if self._line is not None:
            self._line.stop()
            self._line = None

    def _end_stage(self) -> None:
        if self._stage:
            logger.info("%s took %.1f s", self._stage, time.perf_counter() - self._began)
        self._stage = ""
