"""Batches that somebody repacked by hand, for models that know nothing of a token mask.

Shapes: B samples, S positions, K active positions of a sample (the most of any sample where they differ), T positions
of all samples that are no padding.
"""

from __future__ import annotations

import torch
from step_models import IGNORED, predicted, with_same_weights
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def causal_only_model(model: PreTrainedModel) -> PreTrainedModel:
    """The same parameters under attention that is causal by row and builds no mask tensor.

    That is right for a packed batch, and faster than the mask transformers would build for it.
    """
    AttentionInterface.register("causal_only", sdpa_attention_forward)
    AttentionMaskInterface.register("causal_only", lambda *args, **kwargs: None)
    packed: PreTrainedModel = with_same_weights(model)
    packed.get_decoder().set_attn_implementation("causal_only")
    return packed


def pack(batch: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """The active positions of each sample, moved to the front: arguments of a hand-packed call, all [B, K].

    Where samples keep equally many, this is the limit of a gated step. Each position brings the label it predicts
    along, so the labels are passed already shifted. Where samples differ in length, the tail is padding without labels;
    causal attention never looks at it. Pictures stay as they are: all their positions are active.
    """
    K = int(mask.sum(1).max())
    position_ids = mask.int().argsort(dim=1, descending=True, stable=True)[:, :K]
    active = mask.gather(1, position_ids)
    labels = predicted(batch["labels"]).gather(1, position_ids).masked_fill(~active, IGNORED)
    input_ids = batch["input_ids"].gather(1, position_ids).masked_fill(~active, 0)
    return {
        **batch,
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "shift_labels": labels,
    }


def without_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' padding-free form: all samples in one row, [1, T], their positions counted from 0 each.

    Under SDPA, transformers makes a mask over the pairs of the whole row of it.
    """
    real = batch["attention_mask"].bool()
    positions = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    labels = predicted(batch["labels"])[real][None]
    return {
        "input_ids": batch["input_ids"][real][None],
        "position_ids": positions[real][None],
        "labels": labels,
        "shift_labels": labels,
    }
