"""Notice that an optimizer has stepped, from the parameters alone."""

from __future__ import annotations

import weakref

from torch import nn


class OptimizerSteps:
    """Counts optimizer steps between forward passes.

    Every in-place write raises a tensor's version, so that no optimizer has to be known, and batches that are only
    accumulated or steps that a gradient scaler skipped do not count. Weights loaded between two training batches
    look like a step.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._versions = 0
        self._step = 0

    def __reduce__(self) -> tuple[type[OptimizerSteps], tuple[()]]:
        """A copy starts anew: the versions of its model's parameters do."""
        return OptimizerSteps, ()

    def count(self, model: nn.Module, step: int) -> int:
        """The number of steps so far. step: the number as its owner knows it, who may have counted one himself."""
        versions = sum(parameter._version for parameter in model.parameters() if parameter.requires_grad)
        known = self._model is not None and self._model() is model
        if known and versions != self._versions and step == self._step:
            step += 1
        self._model, self._versions, self._step = weakref.ref(model), versions, step
        return step
