"""A decoder of a few lines, with a place for whatever else may happen to its tokens.

Shapes: B samples, S positions, D hidden size, V vocabulary, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

V, D, H = 23, 8, 2

Extra = Callable[["Block", Tensor, Tensor | None], Tensor]


class Block(nn.Module):
    """Pre-norm layer: causal attention, then `extra` on the normalised states, then an MLP; each added back."""

    def __init__(self, extra: Extra | None = None) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.weight = nn.Parameter(torch.randn(D, D) * 0.4)
        self.table = nn.Parameter(torch.randn(64, D) * 0.4)
        self.scale = nn.Parameter(torch.randn(D))
        self.extra = extra

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.attention_norm(x), mask)
        if self.extra is not None:
            x = x + self.extra(self, self.norm(x), mask)
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (heads(project(x)) for project in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(merge_heads(y))


def hide(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores [..., S, S], the lowest number where a query does not see a key; mask is [B, 1, S, S] or None."""
    S = scores.shape[-1]
    seen = torch.arange(S)[:, None] >= torch.arange(S)
    if mask is not None:
        seen = mask if scores.dim() == 4 else mask[:, 0]
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min)


def heads(x: Tensor) -> Tensor:
    """[B, S, D] to [B, H, S, D // H]."""
    return x.view(*x.shape[:2], H, -1).transpose(1, 2)


def sequence_first_attention(b: Block, x: Tensor, m: Tensor | None) -> Tensor:
    """[S, B, D] states and heads folded into the batch, as older models have it."""
    B, S = x.shape[:2]
    q, k, v = (p(x.transpose(0, 1)).reshape(S, B * H, D // H).transpose(0, 1) for p in (b.q, b.k, b.v))
    weights = hide((q @ k.mT).view(B, H, S, S), m).softmax(-1).view(B * H, S, S)
    return (weights @ v).transpose(0, 1).reshape(S, B, D).transpose(0, 1)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def causal_mask(attention_mask: Tensor | None, S: int) -> Tensor | None:
    """bool [B, 1, S, S] from padding [B, S]; None leaves the attention plainly causal."""
    if attention_mask is None:
        return None
    index = torch.arange(S)
    return (index[:, None] >= index[None, :]) & attention_mask.bool()[:, None, None, :]


def shifted_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Row t with label t + 1: the labels are moved, the last row has none."""
    return F.cross_entropy(
        logits.reshape(-1, V), F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous().view(-1)
    )


def shifted_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Row t with label t + 1: the last row and the first label are cut off."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))


def in_float32(logits: Tensor, labels: Tensor) -> Tensor:
    return shifted_labels(logits.float(), labels)


def unshifted(logits: Tensor, labels: Tensor) -> Tensor:
    """Row t with label t."""
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1))


class Decoder(nn.Module):
    """A causal language model. Positions are learned, padding is masked, the loss is shifted by default."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor] = shifted_labels,
        after_embedding: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(V, D), nn.Embedding(64, D)
        self.layers = nn.ModuleList(blocks)
        self.final_norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        self.loss = loss
        self.after_embedding = after_embedding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CausalLMOutput:
        S = input_ids.shape[1]
        x = self.embedding(input_ids) + self.positions(torch.arange(S))
        if self.after_embedding is not None:
            x = self.after_embedding(x)
        mask = causal_mask(attention_mask, S)
        for layer in self.layers:
            x = layer(x, mask)
        logits = self.head(self.final_norm(x))
        loss = None if labels is None else self.loss(logits, labels)
        return CausalLMOutput(loss=loss, logits=logits)


class Loss(nn.Module):
    """A model's loss as a tensor, and its logits where they are wanted."""

    def __init__(self, model: nn.Module, logits: bool = False) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, **inputs: Tensor) -> Any:
        out = self.model(**inputs)
        return (out.loss, out.logits) if self.logits else out.loss


def decoder(extra: Extra | None = None, layers: int = 2, **options: object) -> Decoder:
    """`layers` blocks with `extra` in each; weights far enough from zero for errors to show."""
    torch.manual_seed(0)
    model = Decoder([Block(extra) for _ in range(layers)], **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def batch(B: int = 2, S: int = 7, seed: int = 0, padded: bool = False) -> dict[str, Tensor]:
    """Random ids and labels [B, S]; padded=True pads the first sample by two positions on the right."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(V, (B, S), generator=generator)}
    inputs["labels"] = torch.randint(V, (B, S), generator=generator)
    if padded:
        attention_mask = torch.ones(B, S, dtype=torch.int64)
        attention_mask[0, S - 2 :] = 0
        inputs["attention_mask"] = attention_mask
    return inputs


def some_active(B: int = 2, S: int = 7, seed: int = 0) -> Tensor:
    """bool [B, S]: about half the positions, a different number in each sample."""
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0, 0] = mask[0, S - 2] = True
    mask[0, 1] = mask[-1, 0] = mask[-1, S // 2] = False
    return mask
