"""Notice that an optimizer has stepped, without being told which."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class OptimizerSteps:
    """Counts optimizer steps between forward passes.

    An optimizer of torch reports its steps through torch's own hook; any other shows in the versions of the
    parameters, which every in-place write raises but that of fused optimizers. Batches that are only accumulated and
    steps that a gradient scaler skipped do not count; several optimizers of one model count once. Weights loaded
    between two training batches look like a step.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._versions = 0
        self._step = 0
        self._reported = False
        self._hook: Any = None

    def __reduce__(self) -> tuple[type[OptimizerSteps], tuple[()]]:
        """A copy starts anew: the versions of its model's parameters do."""
        return OptimizerSteps, ()

    def count(self, model: nn.Module, step: int) -> int:
        """The number of steps so far. step: the number as its owner knows it, who may have counted one himself."""
        if self._hook is None:
            self._hook = _listen(self)
        versions = sum(parameter._version for parameter in model.parameters() if parameter.requires_grad)
        known = self._model is not None and self._model() is model
        if known and (self._reported or versions != self._versions) and step == self._step:
            step += 1
        self._model, self._versions, self._step, self._reported = weakref.ref(model), versions, step, False
        return step

    def catch_up(self, step: int) -> int:
        """`count` between two forward passes: a checkpoint is taken after the optimizer's step."""
        model = None if self._model is None else self._model()
        return step if model is None else self.count(model, step)

    def _report(self, optimizer: Optimizer) -> None:
        model = None if self._model is None else self._model()
        if model is None:
            return
        own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        stepped = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        self._reported = self._reported or any(parameter in own for parameter in stepped)


def _listen(steps: OptimizerSteps) -> Any:
    """Report the steps of every torch optimizer for as long as `steps` lives."""
    listener = weakref.ref(steps)

    def report(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (alive := listener()) is not None:
            alive._report(optimizer)

    handle = register_optimizer_step_post_hook(report)
    weakref.finalize(steps, handle.remove)
    return handle
