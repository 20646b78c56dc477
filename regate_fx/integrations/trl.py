"""ReGATE in TRL's `SFTTrainer`.

Its own loss calls the backbone and a fused head of its own, past the model's forward and past the gate. Gated training
steps use the model's loss instead, which is computed on the active rows; evaluation stays TRL's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import Trainer
from trl import SFTTrainer

from regate_fx.errors import Unsupported
from regate_fx.integrations.trainer import GatedTrainer


class GatedSFTTrainer(GatedTrainer):
    """The methods of an `SFTTrainer` that `attach` overrides.

    Training logs lack TRL's `entropy`, `mean_token_accuracy` and `num_tokens`; the first two need all logits.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.model.training and self.regate.gated.gating:
            inputs = {**inputs, "use_cache": False}
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        inputs = {name: value for name, value in inputs.items() if name != "sample_id"}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_collator(self, inner: Any) -> Any:
        """A gated step computes no padding: one example a row is as good as all in one, and has a padding mask."""
        return replace(inner, padding_free=False) if getattr(inner, "padding_free", False) else inner


def sft_kind(trainer: Trainer, gated: Any) -> type[GatedTrainer]:
    """The class of what `attach` overrides. Raises `Unsupported` for what would change the loss unseen."""
    if not isinstance(trainer, SFTTrainer):
        raise Unsupported(
            f"trl.{type(trainer).__name__}",
            "it computes its loss from logits or log-probabilities of every label.",
            "Use SFTTrainer.",
        )
    if trainer.args.loss_type != "nll":
        raise Unsupported(
            f"loss_type={trainer.args.loss_type!r}", "it is computed outside the model.", "Use 'nll'."
        )
    if trainer.args.packing:
        raise Unsupported(
            "packing=True",
            "it drops the samples' ids.",
            "Leave it out: a gated step computes no padding.",
        )
    if trainer.aux_loss_enabled:
        raise Unsupported(
            "SFTTrainer's weighting of the experts' auxiliary loss",
            "it happens outside the model.",
            "Set router_aux_loss_coef=0.0.",
        )
    if gated is trainer.model and hasattr(gated, "get_base_model"):
        raise Unsupported(
            "SFTTrainer with a gate around an adapter model",
            "TRL replaces the forward inside the adapters.",
            "Gate the model first: SFTTrainer(regate_fx.compile(model), peft_config=...).",
        )
    return GatedSFTTrainer
