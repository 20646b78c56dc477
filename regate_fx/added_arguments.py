"""Arguments that a gated call adds to the caller's, where the model takes them.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from regate_fx.inputs import own_signature, padding_mask_name
from regate_fx.plan import TokenPlan


class AddedArguments:
    """Of calls of one model. Its signature is read when it is first needed: before, the model may be half built."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @functools.cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return own_signature(self.model).parameters

    @functools.cached_property
    def no_cache(self) -> dict[str, Any]:
        """A gated call has no cache: what it computed of a sequence is not what a later call would need."""
        parameters = self._parameters.values()
        takes = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        return {"use_cache": False} if takes else {}

    @functools.cached_property
    def _passed_on(self) -> frozenset[str]:
        """The model's arguments, and those of the model inside that it passes what it does not name on to (PEFT's)."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._parameters.values())
        inside = own_signature(base).parameters if takes_any else {}
        return frozenset((*self._parameters, *inside))

    def with_padding_mask(self, plan: TokenPlan, inputs: dict[str, Any]) -> dict[str, Any]:
        """Say that there is no padding where the caller says nothing.

        Without mask and positions, models look for packed documents in positions they have just made themselves.
        """
        name = padding_mask_name(inputs)
        if name not in self._passed_on or "position_ids" in inputs or name in inputs:
            return inputs
        return inputs | {name: torch.ones_like(plan.row_of)}
