"""A small LLaVA whose two halves know their trade before they meet: one reads digits, one writes answers.

Shapes: B scenes, S positions, P patches of a scene.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from digits_scenes import IMAGE, PATCH, SCENE_SIZE, Digits, text_batch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

VISION_SIZE = 64


def build(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlavaForConditionalGeneration:
    """LLaVA with random weights: a CLIP tower of two layers and a Llama of `layers` layers."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_SIZE,
        intermediate_size=2 * VISION_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SCENE_SIZE,
        patch_size=PATCH,
        num_channels=1,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-1)
    )


def learn_to_write(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, chance: random.Random, steps: Iterable[int]
) -> float:
    """Train the language half on answers without pictures; returns the last loss."""
    language = [p for name, p in model.named_parameters() if "language_model" in name or "lm_head" in name]
    optimizer = torch.optim.AdamW(language, lr=1e-3, weight_decay=0.01)
    loss = torch.zeros(())
    for _ in steps:
        loss = model(**text_batch(16, tokenizer, chance)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def learn_to_see(model: Any, digits: Digits, chance: random.Random, steps: Iterable[int]) -> float:
    """Teach the vision half the digits of the training images, as CLIP would know them; returns the accuracy."""
    tower = model.model.vision_tower
    head = nn.Linear(VISION_SIZE, 10)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=2e-3)
    right = 0.0
    for _ in steps:
        scenes = [digits.scene(digits.training, chance) for _ in range(64)]
        shown = torch.tensor([digit for _, digits_of in scenes for digit in digits_of])
        states = tower(torch.stack([pixels for pixels, _ in scenes]), output_hidden_states=True)
        scores = head(_quarters(states.hidden_states[-1][:, 1:])).flatten(0, 1)
        F.cross_entropy(scores, shown).backward()
        right = (scores.argmax(1) == shown).float().mean().item()
        optimizer.step()
        optimizer.zero_grad()
    return right


def _quarters(patches: Tensor) -> Tensor:
    """The mean state of each quarter of a scene: float [B, P, D] to [B, 4, D]."""
    side = SCENE_SIZE // PATCH
    grid = patches.unflatten(1, (2, side // 2, 2, side // 2))
    return grid.mean((2, 4)).flatten(1, 2)
