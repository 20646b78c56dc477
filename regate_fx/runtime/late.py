"""Errors that a device knows of, raised on the host without waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from regate_fx.errors import InvalidInput

Error = Callable[[Tensor], InvalidInput]
"""Makes the error from what was found wrong, bool of any shape on the host."""


class LateChecks:
    """Raises at once what is wrong on the host; what is wrong on an accelerator with one of the next batches.

    Until then nothing may depend on it: whoever checks leaves out what is wrong, on the device.
    """

    def __init__(self) -> None:
        self._coming: deque[_Coming] = deque()

    def __reduce__(self) -> tuple[type[LateChecks], tuple[()]]:
        """A copy has checked nothing yet: events stay with their process."""
        return LateChecks, ()

    def check(self, wrong: Tensor, error: Error) -> None:
        """Raises what `error` makes of `wrong`, or of an earlier one, where any of it is True."""
        while self._coming and self._coming[0].arrived():
            self._coming.popleft().check()
        check = _Coming(wrong, error)
        if wrong.device.type == "cpu":
            check.check()
        else:
            self._coming.append(check)


class _Coming:
    """What was found wrong with a batch, on its way from the device to the host."""

    def __init__(self, wrong: Tensor, error: Error) -> None:
        self._error = error
        self._wrong = wrong.to("cpu", non_blocking=True)
        self._copied = None if wrong.device.type == "cpu" else torch.Event(wrong.device)
        if self._copied is not None:
            self._copied.record()

    def arrived(self) -> bool:
        return self._copied is None or self._copied.query()

    def check(self) -> None:
        if bool(self._wrong.any()):
            raise self._error(self._wrong)
