"""Pictures for any vision-language model, found by trying: what its code takes, and how many positions each fills.

What a model takes pictures in is told by the names of its arguments; sizes by its vision configuration. A way of
giving pictures counts where the model trains with it and its vision half gets a gradient.

Shapes: B samples, S positions, C channels, n pictures.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from shrink import PAD, WORDS
from small_models import Batch, Side
from text_batches import text_batch
from torch import Tensor, nn

NO_LABEL = -100


class NoPictures(Exception):
    """No way was found in which a model takes pictures; the message is what the last one tried met."""


@dataclass(frozen=True)
class Pictures:
    """One picture for each of B samples, as a model takes them.

    inputs: what the pictures are read from. tokens: how many positions each picture fills; 0 where the model sees
    them elsewhere, by cross-attention say.
    """

    inputs: Mapping[str, Tensor]
    tokens: int


@dataclass(frozen=True)
class PictureBatch(Batch):
    """A batch of text with a picture in each sample. visual: bool [B, S], positions that stand for pictures."""

    visual: Tensor = field(default_factory=lambda: torch.empty(0))
    pictures: Mapping[str, Tensor] = field(default_factory=dict)

    def model_inputs(self) -> dict[str, Tensor]:
        return {**super().model_inputs(), **self.pictures}

    def double(self) -> PictureBatch:
        """The same with pictures in float64."""
        return replace(self, pictures=_double(self.pictures))


@dataclass(frozen=True)
class DecoderBatch(Batch):
    """What the decoder of an encoder-decoder reads. encoder: what its encoder is given beside it."""

    encoder: Mapping[str, Tensor] = field(default_factory=dict)

    def model_inputs(self) -> dict[str, Tensor]:
        own = {f"decoder_{name}": value for name, value in super().model_inputs().items()}
        return {**self.encoder, **own}

    def double(self) -> DecoderBatch:
        """The same with pictures in float64."""
        return replace(self, encoder=_double(self.encoder))


def _double(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def find_pictures(model: nn.Module, count: int) -> Pictures:
    """How to give a model `count` pictures, by trying. Raises `NoPictures`."""
    last: Exception | None = None
    for inputs in _candidates(model, count):
        try:
            pictures = Pictures(inputs, _tokens(model, inputs, count))
            _try(model, pictures, count)
        except Exception as error:
            last = error
        else:
            return pictures
    raise NoPictures(f"{type(last).__name__}: {last}".partition("\n")[0])


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a model takes by name; adapters around it hand on whatever they are given."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(inner.forward).parameters


def _candidates(model: nn.Module, count: int) -> Iterator[dict[str, Tensor]]:
    features = _feature_function(model)
    named = {**_parameters(model)}
    named |= {} if features is None else inspect.signature(features).parameters
    for vision in _vision_configs(model.config):
        for inputs in _pixels(named, vision, count):
            taken = {name: value for name, value in inputs.items() if name in named}
            yield taken
            if taken.pop("image_sizes", None) is not None:
                yield taken


def _vision_configs(config: Any) -> Iterator[Any]:
    parts = [getattr(config, name, None) for name in ("vision_config", "vision_tower_config", "encoder")]
    yield from (part for part in parts if part is not None)
    yield config


def _number(config: Any, names: str, default: int) -> int:
    for name in names.split():
        value = getattr(config, name, None)
        if isinstance(value, (tuple, list)) and value:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def _pixels(named: Mapping[str, Any], vision: Any, count: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    patch = _number(vision, "patch_size", 4)
    channels = _number(vision, "num_channels in_channels in_chans", 3)
    own = _number(vision, "image_size input_size", 4 * patch)
    merge = _number(vision, "spatial_merge_size", 2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if "flattened_patches" in named:
        width = _number(vision, "patch_embed_hidden_size", channels * patch * patch)
        rows = torch.cat([torch.arange(1.0, 9).view(1, 8, 1).expand(count, 8, 2), random(count, 8, width)], 2)
        yield {"flattened_patches": rows}
    if {"image_grid_thw", "image_grid_hw"} & set(named):
        for time, whole in itertools.product(
            (_number(vision, "temporal_patch_size", 1), 1, 2), (True, False)
        ):
            height, width = 2 * merge, merge
            patches = count * height * width
            shape = (patches, channels * time * patch * patch) if whole else (patches, channels, patch, patch)
            yield {
                "pixel_values": random(*shape),
                "image_grid_thw": torch.tensor([[1, height, width]] * count),
                "image_grid_hw": torch.tensor([[height, width]] * count),
                "image_merge_sizes": torch.tensor([merge] * count),
            }
    for side in dict.fromkeys((own, 4 * patch, 2 * patch, 8 * patch)):
        sizes = torch.tensor([[side, side]] * count)
        square = (channels, side, side)
        for shape in ((count,), (count, 1), (count, 2), (count, 3), (count, 1, 1)):
            pixels = random(*shape, *square)
            yield {
                "pixel_values": pixels,
                "high_res_pixel_values": random(*shape, *square),
                "pixel_attention_mask": torch.ones(*shape, side, side, dtype=torch.bool),
                "image_sizes": sizes,
                "qformer_input_ids": torch.full((count, 4), WORDS.start),
                "qformer_attention_mask": torch.ones(count, 4, dtype=torch.int64),
                "aspect_ratio_ids": torch.ones(count, 1, dtype=torch.int64),
                "aspect_ratio_mask": torch.ones(*shape[:3], dtype=torch.int64),
            }
        steps = side // patch
        flat = random(count, steps * steps, channels * patch * patch)
        places = torch.cartesian_prod(torch.arange(steps), torch.arange(steps)).expand(count, -1, -1)
        yield {
            "pixel_values": flat,
            "image_position_ids": places,
            "spatial_shapes": torch.tensor([[steps, steps]] * count),
            "pixel_attention_mask": torch.ones(count, steps * steps, dtype=torch.int64),
        }


def _tokens(model: nn.Module, inputs: Mapping[str, Tensor], count: int) -> int:
    """How many positions a picture fills: as many as there are rows of features for it."""
    features = _feature_function(model)
    if features is None or _placeholder(model) is None:
        return 0
    taken = inspect.signature(features).parameters
    with torch.no_grad():
        found = features(**{name: value for name, value in inputs.items() if name in taken})
    found = getattr(found, "pooler_output", found)
    rows = sum(_rows(part) for part in found) if isinstance(found, (tuple, list)) else _rows(found)
    return rows // count


def _feature_function(model: nn.Module) -> Any:
    """What makes features of pictures, in the model itself or in the one inside it; None where there is none."""
    inside = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    return next(
        (found for part in (model, inside) if (found := getattr(part, "get_image_features", None))), None
    )


def _rows(features: Tensor) -> int:
    return features.numel() // features.shape[-1]


def _placeholder(model: nn.Module) -> int | None:
    names = ("image_token_id", "image_token_index")
    return next(
        (value for name in names if isinstance(value := getattr(model.config, name, None), int)), None
    )


def picture_batch(
    model: nn.Module, pictures: Pictures, generator: torch.Generator, padding: Side, share: float = 0.6
) -> PictureBatch | DecoderBatch:
    """Words, a picture and more words in each sample; an encoder-decoder has its encoder read them."""
    batch = _picture_batch(model, pictures, generator, padding, share)
    if not _has_encoder(model):
        return batch
    text = text_batch(generator, _count(pictures), 7, padding, share)
    if "decoder_attention_mask" not in _parameters(model):
        text = replace(text, attention_mask=None)
    return DecoderBatch(**vars(text), encoder=batch.model_inputs())


def _has_encoder(model: nn.Module) -> bool:
    """Whether the model's text is written by a decoder that reads what an encoder made."""
    configs = (model.config, getattr(model.config, "text_config", None))
    takes = "decoder_input_ids" in _parameters(model)
    return takes and any(getattr(config, "is_encoder_decoder", False) for config in configs)


def _picture_batch(
    model: nn.Module, pictures: Pictures, generator: torch.Generator, padding: Side, share: float
) -> PictureBatch:
    """The mask keeps all of the picture."""
    B = _count(pictures)
    lengths = torch.randint(4, 9, (B, 2), generator=generator)
    rows = [_row(model, pictures.tokens, before, after, generator) for before, after in lengths.tolist()]
    S = max(map(len, rows))
    ids, real = torch.full((B, S), PAD), torch.zeros(B, S, dtype=torch.bool)
    for sample, row in enumerate(rows):
        place = slice(S - len(row), S) if padding == "left" else slice(0, len(row))
        ids[sample, place], real[sample, place] = row, True
    visual = torch.zeros_like(real) if (image := _placeholder(model)) is None else ids == image
    mask = torch.rand(B, S, generator=generator) < share
    unlabelled = torch.rand(B, S, generator=generator) < 0.2
    mask[0, int(real[0].nonzero()[-2])] = True
    named = _parameters(model)
    types = {name: visual.long() for name in ("mm_token_type_ids", "token_type_ids") if name in named}
    return PictureBatch(
        input_ids=ids,
        attention_mask=real.long(),
        labels=ids.masked_fill(unlabelled | visual | ~real, NO_LABEL),
        token_mask=mask | visual,
        visual=visual,
        pictures={**pictures.inputs, **types},
    )


def _count(pictures: Pictures) -> int:
    sizes = pictures.inputs.get("image_grid_thw", pictures.inputs.get("image_grid_hw"))
    first = next(iter(pictures.inputs.values()))
    return len(first if sizes is None else sizes)


def _row(model: nn.Module, tokens: int, before: int, after: int, generator: torch.Generator) -> Tensor:
    words = torch.randint(WORDS.start, WORDS.stop, (before + after,), generator=generator)
    if not tokens:
        return words
    return torch.cat([words[:before], torch.full((tokens,), _placeholder(model)), words[before:]])


def _try(model: nn.Module, pictures: Pictures, count: int) -> None:
    """Raise where the model does not train with pictures, or not by them."""
    batch = picture_batch(model, pictures, torch.Generator().manual_seed(3), "right")
    parameters = _vision_parameters(model)
    loss = model(**batch.model_inputs(), labels=batch.labels).loss
    if loss is None:
        raise ValueError("it computes no loss")
    loss.backward()
    seen = any(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
    model.zero_grad(set_to_none=True)
    if not seen:
        raise ValueError("the vision half gets no gradient")


def _vision_parameters(model: nn.Module) -> list[nn.Parameter]:
    marks = ("vis", "image", "img", "patch", "embed_vision")
    return [p for name, p in model.named_parameters() if any(mark in name for mark in marks)]
