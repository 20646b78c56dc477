"""What a gated call returns.

Shapes: B samples, S positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class GatedOutput(CausalLMOutputWithPast):
    """The output of a gated call; cache, hidden states and attentions are always None.

    loss:       float []         mean over counted labels, or sum / `num_items_in_batch`; None without labels
    logits:     float [B, S, V]  None with labels, unless they were asked for
    token_loss: float32 [B, S]   negative log-likelihood of label t at index t, 0 where it is not counted
    counted:    bool [B, S]      which labels were counted

    The last two are fields, not extra keys: pytree (and so DDP and FSDP) rebuilds outputs by their fields.
    """

    aux_loss: Tensor | None = None
    token_loss: Tensor | None = None
    counted: Tensor | None = None
