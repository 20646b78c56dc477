"""What a device knows, brought to the host without waiting for it; errors that are raised there later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from regate_fx.errors import InvalidInput

Error = Callable[[Tensor], InvalidInput]
"""Makes the error from what was found wrong, bool of any shape on the host."""


class OnTheWay:
    """Tensors of one device that are being copied to the host; at once where they are there."""

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
        device = tensors[0].device
        self._copied = None if device.type == "cpu" else torch.Event(device)
        if self._copied is not None:
            self._copied.record()

    def __reduce__(self) -> tuple[type[OnTheWay], tuple[Tensor, ...]]:
        """A copy has arrived: events stay with their process."""
        return OnTheWay, self.wait()

    def arrived(self) -> bool:
        return self._copied is None or self._copied.query()

    def wait(self) -> tuple[Tensor, ...]:
        """The copies, in the order in which the tensors were given."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copies


class LateChecks:
    """Raises at once what is wrong on the host; what is wrong on an accelerator with one of the next batches.

    Until then nothing may depend on it: whoever checks leaves out what is wrong, on the device.
    """

    def __init__(self) -> None:
        self._coming: deque[tuple[OnTheWay, Error]] = deque()

    def __reduce__(self) -> tuple[type[LateChecks], tuple[()]]:
        """A copy has checked nothing yet: events stay with their process."""
        return LateChecks, ()

    def check(self, wrong: Tensor, error: Error) -> None:
        """Raises what `error` makes of `wrong`, or of an earlier one, where any of it is True."""
        while self._coming and self._coming[0][0].arrived():
            _raise_if_any(*self._coming.popleft())
        coming = OnTheWay(wrong)
        if wrong.device.type == "cpu":
            _raise_if_any(coming, error)
        else:
            self._coming.append((coming, error))


def _raise_if_any(coming: OnTheWay, error: Error) -> None:
    (wrong,) = coming.wait()
    if bool(wrong.any()):
        raise error(wrong)
