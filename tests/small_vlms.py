"""Vision-language models small enough to run hundreds of times, and random batches of text and images for them.

Shapes: B samples, S positions, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from small_models import (
    _COMMON,
    _LLAMA_LIKE,
    FIRST_WORD,
    PAD,
    VOCABULARY,
    WINDOW,
    Batch,
    Side,
    _spread_weights,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

IMAGE = VOCABULARY - 1  # the id that stands for a piece of an image; no word
PATCH = 4


@dataclass(frozen=True)
class Images:
    """The images of a batch: how many positions each takes, by sample, and what the model reads them from."""

    tokens: Sequence[Sequence[int]]
    inputs: Mapping[str, Tensor]


Painter = Callable[[Sequence[int], torch.Generator], Images]


@dataclass(frozen=True)
class SmallVlm:
    """One architecture, with what paints images for it.

    images: makes random images, given their number in each sample. types: name of the input that is 1 at image
    positions, if the model takes one. positions, shifted: see `SmallModel`.
    """

    model_type: str
    config: Mapping[str, Any]
    images: Painter
    types: str | None = None
    positions: str = "index"
    shifted: bool = True


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def stacked(side: int, tokens: int) -> Painter:
    """All images of the batch in one tensor [images, C, side, side]; each takes `tokens` positions."""

    def paint(counts: Sequence[int], generator: torch.Generator) -> Images:
        pixels = _random(generator, sum(counts), 3, side, side)
        return Images([[tokens] * count for count in counts], {"pixel_values": pixels})

    return paint


def padded(side: int, tokens: int) -> Painter:
    """[B, most images, C, side, side], empty where a sample has fewer; some images fill only a part of theirs."""

    def paint(counts: Sequence[int], generator: torch.Generator) -> Images:
        B, most = len(counts), max(counts)
        pixels = torch.zeros(B, most, 3, side, side)
        visible = torch.zeros(B, most, side, side, dtype=torch.bool)
        for sample, count in enumerate(counts):
            for image in range(count):
                width = side if (sample + image) % 2 == 0 else side - PATCH
                pixels[sample, image, :, :, :width] = _random(generator, 3, side, width)
                visible[sample, image, :, :width] = True
        inputs = {"pixel_values": pixels, "pixel_attention_mask": visible}
        return Images([[tokens] * count for count in counts], inputs)

    return paint


# Time, height and width in patches; two by two patches make one position.
_GRIDS = ((1, 4, 4), (1, 2, 4), (1, 6, 2))


def unrolled(counts: Sequence[int], generator: torch.Generator) -> Images:
    """Patches of all images in a row, [patches, C * 2 * PATCH * PATCH], and the grid of each image."""
    choices = torch.randint(len(_GRIDS), (sum(counts),), generator=generator).tolist()
    grids = [_GRIDS[choice] for choice in choices]
    patches = sum(time * height * width for time, height, width in grids)
    sizes = iter(time * height * width // 4 for time, height, width in grids)
    inputs = {
        "pixel_values": _random(generator, patches, 3 * 2 * PATCH * PATCH),
        "image_grid_thw": torch.tensor(grids),
    }
    return Images([[next(sizes) for _ in range(count)] for count in counts], inputs)


_TEXT = {**_COMMON, **_LLAMA_LIKE}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}
_ROWS_AND_COLUMNS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN_VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}

VLMS: dict[str, SmallVlm] = {
    "llava": SmallVlm(
        "llava",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "image_size": 3 * PATCH},
            "image_token_id": IMAGE,
        },
        stacked(3 * PATCH, 9),
    ),
    "internvl": SmallVlm(
        "internvl",
        {
            "text_config": {"model_type": "qwen3", **_TEXT},
            "vision_config": {**_VISION, "image_size": 4 * PATCH},
            "image_token_id": IMAGE,
        },
        stacked(4 * PATCH, 4),
    ),
    "smolvlm": SmallVlm(
        "smolvlm",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {**_VISION, "image_size": 4 * PATCH},
            "image_token_id": IMAGE,
            "pad_token_id": PAD,
        },
        padded(4 * PATCH, 4),
    ),
    "gemma3": SmallVlm(
        "gemma3",
        {
            "text_config": {
                **_TEXT,
                "sliding_window": WINDOW,
                "query_pre_attn_scalar": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {"model_type": "siglip_vision_model", **_VISION, "image_size": 4 * PATCH},
            "image_token_index": IMAGE,
            "mm_tokens_per_image": 4,
        },
        stacked(4 * PATCH, 4),
        types="token_type_ids",
    ),
    "qwen2_vl": SmallVlm(
        "qwen2_vl",
        {
            "text_config": {**_TEXT, "rope_parameters": _ROWS_AND_COLUMNS},
            "vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
            "image_token_id": IMAGE,
        },
        unrolled,
        types="mm_token_type_ids",
    ),
    "qwen3_vl": SmallVlm(
        "qwen3_vl",
        {
            "text_config": {**_TEXT, "rope_parameters": _ROWS_AND_COLUMNS},
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": IMAGE,
        },
        unrolled,
        types="mm_token_type_ids",
    ),
}


def build_vlm(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model in training mode, without dropout, its random weights far enough from zero."""
    vlm = VLMS[name]
    config = AutoConfig.for_model(vlm.model_type, **{**vlm.config, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        _spread_weights(model)
    return model.train()


@dataclass(frozen=True)
class ImageBatch(Batch):
    """A batch whose samples hold images.

    visual: bool [B, S], the positions that stand for pieces of images. images: the model's other inputs.
    """

    visual: Tensor = field(default_factory=lambda: torch.empty(0))
    images: Mapping[str, Tensor] = field(default_factory=dict)

    def model_inputs(self) -> dict[str, Tensor]:
        return {**super().model_inputs(), **self.images}


def image_batch(
    name: str,
    generator: torch.Generator,
    counts: Sequence[int],
    *,
    padding: Side = "right",
    share: float = 0.5,
    seen: float = 1.0,
    words: int = 5,
) -> ImageBatch:
    """Samples of text with images in it, text before and after each image.

    counts: images per sample. share, seen: probability of a text position and of an image position to be active.
    words: the longest text around images.
    """
    vlm = VLMS[name]
    images = vlm.images(counts, generator)
    rows = [_sample(tokens, generator, words) for tokens in images.tokens]
    B, S = len(rows), max(len(row) for row in rows)
    ids, real = torch.full((B, S), PAD), torch.zeros(B, S, dtype=torch.bool)
    for sample, row in enumerate(rows):
        place = slice(S - len(row), S) if padding == "left" else slice(0, len(row))
        ids[sample, place], real[sample, place] = row, True
    if padding is None and not real.all():
        raise ValueError("samples of different length need padding")
    visual = ids == IMAGE
    chance = torch.rand(B, S, generator=generator)
    labels = torch.randint(FIRST_WORD, IMAGE, (B, S), generator=generator)
    unlabelled = torch.rand(B, S, generator=generator) < 0.3
    types = {} if vlm.types is None else {vlm.types: visual.long()}
    return ImageBatch(
        input_ids=ids,
        attention_mask=None if padding is None else real.long(),
        labels=labels.masked_fill(unlabelled | visual | ~real, -100),
        token_mask=torch.where(visual, chance < seen, chance < share),
        visual=visual,
        images={**images.inputs, **types},
    )


def _sample(images: Sequence[int], generator: torch.Generator, words: int) -> Tensor:
    """Ids of one sample: words, and IMAGE as often as each image takes positions."""

    def text() -> Tensor:
        length = int(torch.randint(2, words + 1, (), generator=generator))
        return torch.randint(FIRST_WORD, IMAGE, (length,), generator=generator)

    parts = [text()]
    for tokens in images:
        parts += [torch.full((tokens,), IMAGE), text()]
    return torch.cat(parts)
