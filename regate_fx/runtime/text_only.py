"""Run a model without its pictures: what the text alone says about every label.

Shapes: B rows, S positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regate_fx.errors import InvalidInput
from regate_fx.modes import evaluating
from regate_fx.runtime.label_losses import LabelLosses

_VISUAL_NAME = re.compile(r"(image|video|audio)_token_(id|index)")
_TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")
_NOT_FOR_MODEL = ("labels", "sample_id")


def visual_token_ids(config: Any) -> tuple[int, ...]:
    """The ids that stand for images, video or sound in a model's input, by the names that its config gives them."""
    named = {name: getattr(config, name, None) for name in dir(config) if _VISUAL_NAME.fullmatch(name)}
    return tuple(sorted({value for value in named.values() if isinstance(value, int)}))


class TextOnly:
    """A model as the text-only teacher: evaluation mode, no gradients, placeholders instead of pictures.

    Token sequence and length stay the same; placeholders are attended to; positions are those that the model itself
    gives the sequence with its pictures.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, visual_ids: tuple[int, ...], placeholder: int | None
    ) -> None:
        """student: the model whose positions count, often `teacher` itself."""
        if visual_ids and placeholder is None:
            raise InvalidInput(
                "placeholder_id",
                "there is neither a padding nor an end token to put in the place of visual tokens.",
                "Name the token to use.",
            )
        self._teacher = teacher
        self._student = student
        self._visual = torch.tensor(visual_ids, dtype=torch.int64)
        self._placeholder = placeholder
        self._by_index = False
        self._losses = LabelLosses(teacher)

    def token_loss(self, batch: Mapping[str, Any], shifted: bool = True) -> Tensor:
        """float32 [B, S]: negative log-likelihood of label t at index t, 0 where there is none.

        batch: what the student takes, with `labels`, on the model's device. Raises `InvalidInput`.
        """
        labels: Tensor = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_MODEL}
        with evaluating(self._teacher), evaluating(self._student), torch.no_grad():
            return self._losses(self._text_inputs(inputs), labels, shifted)

    def _text_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not len(self._visual):
            pictures = [
                name for name, value in inputs.items() if _is_float(value) and name != "attention_mask"
            ]
            if pictures:
                raise InvalidInput(
                    "visual_ids",
                    f"are not known, but the batch holds {pictures}: the teacher would see the pictures.",
                    "Name the input ids that stand for pictures.",
                )
            return inputs
        ids: Tensor = inputs["input_ids"]
        visual = torch.isin(ids, self._visual.to(ids.device))
        text = {name: inputs[name] for name in _TEXT_INPUTS if inputs.get(name) is not None}
        if "position_ids" not in text and not self._by_index and bool(visual.any()):
            positions = _positions_with_pictures(self._student, inputs)
            # A model that makes none for its backbone numbers tokens by index, pictures or not.
            self._by_index = positions is None
            if positions is not None:
                text["position_ids"] = positions
        return text | {"input_ids": ids.masked_fill(visual, self._placeholder)}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Entered(Exception):
    """Carries the positions with which the text backbone was entered."""

    def __init__(self, position_ids: Tensor | None) -> None:
        self.position_ids = position_ids


def _positions_with_pictures(model: Any, inputs: dict[str, Any]) -> Tensor | None:
    """The `position_ids` that the model hands to its text backbone, None if it hands none. Stops there."""
    backbone = model.get_decoder()

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Entered(kwargs.get("position_ids"))

    handle = backbone.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs)
    except _Entered as entered:
        return entered.position_ids
    finally:
        handle.remove()
    raise InvalidInput(
        "model", "never entered the module that its get_decoder() names.", "Pass position_ids in the batch."
    )
