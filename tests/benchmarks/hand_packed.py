"""The limit of a gated step: the same model on a batch that physically holds only the active tokens.

Shapes: B samples, S positions, K active positions of a sample (the most of any sample where they differ).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IGNORED = -100


def causal_only_model(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same parameters under attention that is causal by row and builds no mask tensor.

    That is right for a packed batch, and faster than the mask transformers would build for it.
    """
    AttentionInterface.register("causal_only", sdpa_attention_forward)
    AttentionMaskInterface.register("causal_only", lambda *args, **kwargs: None)
    packed = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    packed.set_attn_implementation("causal_only")
    return packed


def random_mask(counts: list[int], S: int, device: str = "cpu") -> Tensor:
    """bool [B, S] with `counts[b]` active positions in sample b."""
    order = torch.rand(len(counts), S, device=device).argsort(dim=1).argsort(dim=1)
    return order < torch.tensor(counts, device=device)[:, None]


def pack(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The active positions of each sample, moved to the front: arguments of a hand-packed call, all [B, K].

    Each position brings the label it predicts along, so the labels are passed already shifted. Where samples
    differ in length, the tail is padding without labels; causal attention never looks at it.
    """
    K = int(mask.sum(1).max())
    position_ids = mask.int().argsort(dim=1, descending=True, stable=True)[:, :K]
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED)
    labels = labels.gather(1, position_ids).masked_fill(~mask.gather(1, position_ids), IGNORED)
    input_ids = ids.gather(1, position_ids)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "shift_labels": labels,
    }
