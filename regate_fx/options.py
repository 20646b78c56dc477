"""What a caller may ask of `regate_fx.compile`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from regate_fx.ops.attention_kernels import Preferred

Scope = Literal["model", "layers"]


@dataclass(frozen=True)
class Options:
    """What `regate_fx.compile` was asked for."""

    backend: str | Callable[..., Any] = "inductor"
    keep_logits: bool = False
    validate: bool = True
    reference: bool = False
    scope: Scope = "model"
    strict: bool = True
    fused_loss: bool | None = None
    bucket: int | None = None
    attention: Preferred = "auto"
