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

# To load what was given and constants, to call a method, to return; by the names of several Python versions.
_STEPS = (
    "RESUME",
    "NOP",
    "CACHE",
    "PUSH_NULL",
    "LOAD_",
    "PRECALL",
    "CALL",
    "POP_TOP",
    "RETURN_",
    "NOT_TAKEN",
)


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
    """Whether all that a hook `(module, args, output)` does is `output.requires_grad_(True)`.

    Read from its bytecode: with these steps alone, a hook that touches nothing but its output cannot compute with it.
    """
    if not isinstance(hook, types.FunctionType):
        return False
    code = hook.__code__
    if code.co_names != ("requires_grad_",) or code.co_argcount != 3 or code.co_freevars or code.co_cellvars:
        return False
    if not set(code.co_consts) <= {None, True}:
        return False
    steps = list(dis.get_instructions(code))
    loaded = {step.argval for step in steps if step.opname.startswith("LOAD_FAST")}
    return loaded == {code.co_varnames[2]} and all(step.opname.startswith(_STEPS) for step in steps)
