"""Pictures of four tiles, conversations about them, and a small LLaVA that looks at them, with its processor."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset
from PIL import Image
from small_chat import COLOURS, TEMPLATE, llama_config, make_tokenizer
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE, PATCH = 16, 8


def make_processor() -> LlavaProcessor:
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=size, crop_size=size, default_to_square=True)
    return LlavaProcessor(
        images,
        make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def pictures(number: int, seed: int = 0) -> Dataset:
    """Columns `sample_id`, `images` (one each) and `messages`: the colours of four tiles, row by row."""
    chance = random.Random(seed)
    return Dataset.from_list([{"sample_id": i, **_example(chance)} for i in range(number)])


def _example(chance: random.Random) -> dict[str, Any]:
    colours = [chance.choice(COLOURS) for _ in range(4)]
    image = Image.new("RGB", (SIDE, SIDE))
    for index, colour in enumerate(colours):
        image.paste(
            colour, (index % 2 * PATCH, index // 2 * PATCH, (index % 2 + 1) * PATCH, (index // 2 + 1) * PATCH)
        )
    answer = f"first is the {' then the '.join(colours)} and that is the last of the things that you see"
    question = {"role": "user", "content": "what is that"}
    return {"images": [image], "messages": [question, {"role": "assistant", "content": answer}]}


def small_llava(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = llama_config(processor.tokenizer)
    image = processor.image_token_id
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=image)
    )
