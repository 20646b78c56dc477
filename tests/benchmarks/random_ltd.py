"""random-LTD's way to drop tokens: each layer but the first and the last gathers its own, and scatters them back.

The method of arXiv 2211.11586, as a wrapper around a decoder layer of transformers. Every position reaches the head and
the loss; the layers in between compute a random part of them.

Shapes: B samples, S positions, K positions of each sample that a layer computes, D width, d rotary features.
"""

from __future__ import annotations

from typing import Any

import torch
from hand_packed import causal_only_model
from torch import Tensor, nn
from transformers import PreTrainedModel


class Dropping(nn.Module):
    """A decoder layer that computes a random `share` of the positions, another in every call."""

    def __init__(self, layer: nn.Module, share: float) -> None:
        super().__init__()
        self.layer = layer
        self.share = share

    def forward(
        self,
        states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        position_ids: Tensor,
        **arguments: Any,
    ) -> Tensor:
        B, S, D = states.shape
        K = round(self.share * S)
        # Sorted, so that causal attention by row stays causal by position.
        rows = torch.rand(B, S, device=states.device).argsort(dim=1)[:, :K].sort(dim=1).values
        index = rows[:, :, None].expand(B, K, D)
        tables = tuple(
            table.expand(B, S, -1).gather(1, rows[:, :, None].expand(B, K, table.shape[-1]))
            for table in position_embeddings
        )
        arguments["attention_mask"] = None
        positions = position_ids.expand(B, S).gather(1, rows)
        computed = self.layer(
            states.gather(1, index), position_embeddings=tables, position_ids=positions, **arguments
        )
        return states.scatter(1, index, computed)


def random_ltd_model(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """The same parameters, all layers but the first and the last dropping positions. For batches without padding."""
    dropping = causal_only_model(model)
    layers = dropping.get_decoder().layers
    for n in range(1, len(layers) - 1):
        layers[n] = Dropping(layers[n], share)
    return dropping
