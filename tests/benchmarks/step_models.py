"""The models and batches that a step is timed on: Llama, Qwen2 and an InternVL-shaped model, from configurations.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

IGNORED = -100
# Widths of Llama 3's and Qwen2's models of that size; "small" and "medium" are for the CPU.
WIDTHS: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "medium": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
PATCH = 14
PIXELS = {"8b": 448, "1b": 448, "medium": 224, "small": 112}  # side of the picture, InternVL's own is 448


@dataclass(frozen=True)
class Shape:
    """What is trained on what. padded: samples of S/4 to S positions, padding on the right."""

    family: str
    width: str
    layers: int
    vocabulary: int
    B: int
    S: int
    padded: bool = False

    def __str__(self) -> str:
        padded = ", padded" if self.padded else ""
        return f"{self.family}, {self.width} widths, {self.layers} layers, {self.B} x {self.S}{padded}"

    @property
    def image_id(self) -> int:
        return self.vocabulary - 1

    @property
    def image_tokens(self) -> int:
        return (PIXELS[self.width] // PATCH // 2) ** 2 if self.family == "internvl" else 0


def make_model(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """A model in training mode with random weights."""
    text: dict[str, Any] = {
        **WIDTHS[shape.width],
        "vocab_size": shape.vocabulary,
        "num_hidden_layers": shape.layers,
        "max_position_embeddings": shape.S,
        "use_cache": False,
        "pad_token_id": 0,
    }
    with torch.device(device):
        if shape.family == "internvl":
            config = AutoConfig.for_model(
                "internvl",
                text_config={"model_type": "qwen2", **text},
                vision_config=_vision(shape),
                image_token_id=shape.image_id,
            )
            model = AutoModelForImageTextToText.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.family, **text))
        model = model.to(dtype)
    model.train()
    return model


def with_same_weights(model: nn.Module) -> Any:
    """Another model of the same kind, whose parameters are those of `model`."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _vision(shape: Shape) -> dict[str, Any]:
    """InternViT-300M's widths beside a large decoder, half of the decoder's beside a small one."""
    large = shape.width in ("8b", "1b")
    width = 1024 if large else WIDTHS[shape.width]["hidden_size"] // 2
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 16 if large else 4,
        "num_hidden_layers": 24 if large else 2,
        "image_size": PIXELS[shape.width],
        "patch_size": PATCH,
    }


def make_batch(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random words, each a label; with a picture, it and a prompt of S/8 words come first and have none."""
    B, S = shape.B, shape.S
    ids = torch.randint(1, shape.image_id, (B, S), device=device)
    batch: dict[str, Tensor] = {}
    labels = ids.clone()
    if shape.image_tokens:
        ids[:, : shape.image_tokens] = shape.image_id
        labels[:, : shape.image_tokens + S // 8] = IGNORED
        side = PIXELS[shape.width]
        batch["pixel_values"] = torch.randn(B, 3, side, side, device=device, dtype=dtype)
    if shape.padded:
        lengths = torch.linspace(S // 4, S, B, device=device).long()
        real = torch.arange(S, device=device) < lengths[:, None]
        ids, labels = ids.masked_fill(~real, 0), labels.masked_fill(~real, IGNORED)
        batch["attention_mask"] = real.long()
    return {"input_ids": ids, "labels": labels, **batch}


def keep(batch: dict[str, Tensor], share: float) -> Tensor:
    """bool [B, S]: everything without a label but no padding, and `share` of the positions that predict a label."""
    predicts = predicted(batch["labels"]) != IGNORED
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(predicts)
    order = torch.rand(predicts.shape, device=predicts.device).masked_fill(~predicts, 2.0)
    rank = order.argsort(dim=1).argsort(dim=1)
    return real & (~predicts | (rank < (share * predicts.sum(1, keepdim=True)).round()))


def predicted(labels: Tensor) -> Tensor:
    """The label that each position predicts, int64 [B, S]."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
