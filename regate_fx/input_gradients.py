"""Hooks that make the first hidden states require a gradient.

Where the embedding is frozen, adapter libraries install them for checkpoints that are reentrant: those would compute no
gradients without. Dynamo breaks the graph at them, and the checkpoints it captures are none of that kind.
"""

from __future__ import annotations

import contextlib
import dis
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn


class InputGradients:
    """Those hooks of one model, as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            module
            for module in model.modules()
            if any(map(_only_requires_grad, module._forward_hooks.values()))
        ]

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """While active, the model has none of them."""
        before: list[tuple[nn.Module, dict[int, Any]]] = []
        for module in self._modules:
            hooks = module._forward_hooks
            before.append((module, hooks))
            others = ((key, hook) for key, hook in hooks.items() if not _only_requires_grad(hook))
            module._forward_hooks = OrderedDict(others)
        try:
            yield
        finally:
            for module, hooks in before:
                module._forward_hooks = hooks


def _only_requires_grad(hook: object) -> bool:
    """Whether a hook `(module, args, output)` can do nothing but call `requires_grad_` on the output."""
    if not isinstance(hook, types.FunctionType):
        return False
    code = hook.__code__
    return (
        code.co_names == ("requires_grad_",)
        and code.co_argcount == 3
        and not (code.co_freevars or code.co_cellvars)
        and not any(code.co_varnames[0] in _variables(step) for step in dis.get_instructions(code))
    )


def _variables(step: dis.Instruction) -> tuple[object, ...]:
    """Names a step of bytecode loads: from Python 3.13 on, some load two."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)
