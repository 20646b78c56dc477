"""Modes of a model, borrowed for a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for all modules, each one's own mode restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def keeping_activations(model: nn.Module) -> Iterator[None]:
    """No checkpoints in what transformers calls layers with gradient checkpointing.

    What reentrant ones compute in the backward reaches `.grad` only, not `torch.autograd.grad`.
    """
    checkpointed = [
        module for module in model.modules() if vars(module).get("gradient_checkpointing") is True
    ]
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
