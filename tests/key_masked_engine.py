"""An engine without a compiler, and gated models that use it, for tests of what surrounds the compiler.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from small_models import VOCABULARY
from torch import Tensor, nn

from regate_fx.outputs import GatedOutput
from regate_fx.plan import TokenPlan
from regate_fx.wrapper import original_forward, ungated, wrap

B, S = 2, 9


@dataclass
class KeyMaskedEngine:
    """The user's model in full, elided keys masked.

    Right for models whose tokens mix in attention only and whose loss pairs row t - 1 with label t.
    `seen` holds the inputs of every gated call.
    """

    model: nn.Module
    note: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, plan: TokenPlan, inputs: dict[str, Any]) -> GatedOutput:
        self.seen.append(dict(inputs))
        active = plan.row_of >= 0
        inputs = {**inputs, "attention_mask": active.long(), "use_cache": False}
        labels = inputs.get("labels")
        counted = None
        if labels is not None:
            counted = predictors(active) & (labels != -100)
            inputs["labels"] = labels.masked_fill(~counted, -100)
        output = original_forward(self.model)(**inputs)
        return GatedOutput(loss=output.loss, logits=output.logits, counted=counted)

    def fresh(self, model: nn.Module) -> KeyMaskedEngine:
        return KeyMaskedEngine(model, self.note)

    @property
    def report(self) -> str | None:
        return f"{len(self.seen)} gated calls" if self.seen else None


def predictors(active: Tensor) -> Tensor:
    """bool [B, S]: whether position t - 1, which predicts label t, is active."""
    return torch.cat([torch.zeros_like(active[:, :1]), active[:, :-1]], dim=1)


def gate(model: nn.Module) -> tuple[Any, KeyMaskedEngine]:
    engine = KeyMaskedEngine(ungated(model))
    return wrap(model, engine), engine


def engine_of(gated: Any) -> KeyMaskedEngine:
    return gated._regate.engine


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (B, S), generator=generator)
    mask = torch.rand(B, S, generator=generator) < 0.6
    mask[:, 0] = True
    return {"input_ids": ids, "labels": ids.clone(), "token_mask": mask}


def without_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "token_mask"}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def is_gated(gated: Any) -> bool:
    """Whether a call with a token mask really computes something else than one without."""
    model = gated.eval()
    inputs = batch()
    with torch.no_grad():
        return not torch.allclose(model(**inputs).loss, model(**without_mask(inputs)).loss)
