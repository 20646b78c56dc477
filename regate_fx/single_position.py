"""Sequences of one position, which Dynamo would make a constant of: give them an elided second one.

An elided position is seen by nobody and counts for nothing, so that the result is that of the first alone.

Shapes: B samples, S positions, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regate_fx.errors import Unsupported
from regate_fx.outputs import GatedOutput
from regate_fx.plan import TokenPlan, make_plan

IGNORED = -100


def lengthen(
    plan: TokenPlan, inputs: dict[str, Any], by_position: set[str]
) -> tuple[TokenPlan, dict[str, Any]]:
    """The same call with S = 2, the second position elided. Raises `Unsupported` for a 4-D attention mask."""
    active = plan.row_of >= 0
    longer = make_plan(torch.cat([active, torch.zeros_like(active)], dim=1))
    return longer, {
        name: _append(name, value) if name in by_position and isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def _append(name: str, value: Tensor) -> Tensor:
    if name.endswith("inputs_embeds"):
        return torch.cat([value, torch.zeros_like(value)], dim=1)
    if value.dim() == 4:
        raise Unsupported(
            f"a 4-D {name} for a single position", "it cannot be made longer.", "Pass a 2-D mask, or none."
        )
    if value.shape[-1] != 1:
        return value
    added = {"labels": torch.full_like(value, IGNORED), "position_ids": value + 1}.get(
        name, torch.zeros_like(value)
    )
    return torch.cat([value, added], dim=-1)


def shorten(output: GatedOutput) -> GatedOutput:
    """What belongs to the first position."""
    for name in ("logits", "token_loss", "counted"):
        value = getattr(output, name)
        if value is not None:
            setattr(output, name, value[:, :1])
    return output
