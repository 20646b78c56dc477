"""Every architecture that transformers can train as a causal or as a vision-language model, built small.

A model is built from the first of several small configurations that it accepts: they differ in what configurations
of some architectures insist on, such as as many heads for keys as for queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pictures import NoPictures, Pictures, find_pictures
from shrink import REPAIRS, WORDS, small_config
from small_models import _spread_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

Mapping = Literal["causal", "image"]
_AUTO = {"causal": AutoModelForCausalLM, "image": AutoModelForImageTextToText}

PICTURES = 3  # samples, each with one


@dataclass(frozen=True, order=True)
class Entry:
    """One model type in one of the two mappings."""

    mapping: Mapping
    model_type: str

    def __str__(self) -> str:
        return f"{self.mapping}:{self.model_type}"


ENTRIES = tuple(
    [Entry("causal", name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    + [Entry("image", name) for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
)


class NotBuilt(Exception):
    """No small configuration of a type makes a model that trains; the message is the first reason."""


@dataclass(frozen=True)
class Built:
    """A small model, and what it trains on. without_pictures: why it was given none."""

    model: nn.Module
    on_text: bool
    pictures: Pictures | None
    without_pictures: str = ""


def build(entry: Entry, seed: int = 0) -> Built:
    """A float32 model in training mode without dropout, its random weights far enough from zero.

    A configuration with attention goes before one without, and one that makes a vision-language model see pictures
    before one that only reads. Raises `NotBuilt`.
    """
    lesser: Built | None = None
    first: Exception | None = None
    for config in _configs(entry.model_type):
        try:
            found = _tried(_built(entry, config(), seed), entry.mapping == "image")
        except Exception as error:
            first = first or error
            continue
        sees = found.pictures is not None or entry.mapping == "causal"
        if sees and _has_attention(found.model):
            return found
        lesser = lesser or found
    if lesser is None:
        raise NotBuilt(f"{type(first).__name__}: {first}".partition("\n")[0]) from first
    return lesser


def _has_attention(model: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() for module in model.modules())


def _tried(model: nn.Module, sees: bool) -> Built:
    """Raises where the model trains neither on text alone nor with pictures."""
    pictures, why = None, ""
    if sees:
        try:
            pictures = find_pictures(model, PICTURES)
        except NoPictures as error:
            why = str(error)
    try:
        _try(model)
    except Exception:
        if pictures is None:
            raise
        return Built(model, False, pictures)
    return Built(model, True, pictures, why)


def _configs(model_type: str) -> Iterator:
    for repair in REPAIRS:
        yield lambda repair=repair: small_config(model_type, repair)


def _built(entry: Entry, config: PretrainedConfig, seed: int) -> nn.Module:
    for part in (config, getattr(config, "decoder", None)):
        if isinstance(part, PretrainedConfig) and entry.mapping == "causal" and hasattr(part, "is_decoder"):
            part.is_decoder = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _AUTO[entry.mapping].from_config(config)
        _spread_weights(model)
    return model.train()


def _try(model: nn.Module) -> None:
    """Raise where the model does not train on text alone."""
    ids = torch.arange(WORDS.start, WORDS.start + 14).view(2, 7)
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    if loss is None:
        raise ValueError("it computes no loss")
    loss.backward()
    model.zero_grad(set_to_none=True)
