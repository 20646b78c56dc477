"""Tell the user what a slow first call is doing while they wait."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time

from transformers.utils.logging import is_progress_bar_enabled

logger = logging.getLogger("regate_fx")


class Waiting:
    """The stages of a call that compiles, one after the other.

    Each stage is a line on standard error where that is a terminal, in the first process of a machine, and unless
    `transformers.utils.logging.disable_progress_bar()` was called. The logger `regate_fx` has it at level INFO in any
    case.
    """

    def __init__(self) -> None:
        self._began: float | None = None

    def tell(self, stage: str) -> None:
        """A stage begins."""
        if self._began is None:
            self._began = time.perf_counter()
        _say(f"{stage} ...")

    def over(self) -> None:
        """The call returns; says how long it took if there was any stage."""
        if self._began is not None:
            _say(f"this call took {time.perf_counter() - self._began:.1f} s")
        self._began = None


def _say(what: str) -> None:
    logger.info("%s", what)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    # A closed or broken standard error is no reason for training to stop.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if is_first and is_progress_bar_enabled() and sys.stderr.isatty():
            print(f"regate_fx: {what}", file=sys.stderr, flush=True)
