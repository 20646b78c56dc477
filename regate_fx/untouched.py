"""Let a model run, or be captured, and leave no trace in it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode, and afterwards its state and the random generators back as they were.

    Restored are modes, attributes and the values of buffers; not what a forward changes inside a list or an
    object that an attribute holds.
    """
    kept = [_State(module) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    drawn, numpy_drawn = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            if not model.training:
                # Not model.train(): overrides of it may merge or freeze weights.
                for module in model.modules():
                    module.training = True
            yield
        finally:
            for state in kept:
                state.restore()
            random.setstate(drawn)
            np.random.set_state(numpy_drawn)


class _State:
    """What a forward may change in one module: its attributes and its buffers' values."""

    _TABLES = ("_buffers", "_parameters", "_modules")

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._tables = {name: dict(vars(module)[name]) for name in self._TABLES}
        buffers = [buffer for buffer in module._buffers.values() if buffer is not None and not buffer.is_meta]
        self._values = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def restore(self) -> None:
        _put_back(vars(self._module), self._attributes)
        for name, table in self._tables.items():
            _put_back(vars(self._module)[name], table)
        with torch.no_grad():
            for buffer, value in self._values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _put_back(current: dict[str, Any], before: dict[str, Any]) -> None:
    for name in current.keys() - before.keys():
        del current[name]
    for name, value in before.items():
        if name not in current or current[name] is not value:
            current[name] = value
