"""Oracle 2 for models that see images: the full run in which no position sees an elided key.

Nothing here imports the project. The original positions, which may be three numbers each, are what the language
model is given in the untouched run.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from typing import Any

import torch
from comparison import Outcome, compare
from oracles import _step, golden, observe
from small_vlms import ImageBatch, SmallVlm
from torch import Tensor, nn


def original_positions(model: nn.Module, batch: ImageBatch) -> Tensor:
    """int64 [B, S], or [3 or 4, B, S]: the positions that the untouched run numbers its tokens by."""
    given: list[Tensor | None] = []
    backbone = model.get_decoder()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(kwargs.get("position_ids"))

    handle = backbone.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**_inputs(model, batch))
    finally:
        handle.remove()
    (positions,) = given
    if positions is not None:
        return positions
    B, S = batch.input_ids.shape
    return torch.arange(S).expand(B, S)


def run_key_masked(model: nn.Module, small: SmallVlm, batch: ImageBatch, **loss_kwargs: Any) -> Outcome:
    """`model` in full, elided keys masked, positions as in the original."""
    inputs = _inputs(model, batch)
    inputs["position_ids"] = original_positions(model, batch)
    inputs["attention_mask"] = batch.active.long()
    return _step(model, small, batch, inputs, **loss_kwargs)


def check_image_step(
    gated: nn.Module, model: nn.Module, small: SmallVlm, batch: ImageBatch, context: str = ""
) -> Outcome:
    """Assert that a gated step is what oracle 2 says, within twice the error of the untouched model."""
    seen = observe(gated, batch)
    baseline = run_key_masked(model, small, batch)
    reference = golden(model, small, batch, run_key_masked)
    assert seen.token_loss.dtype == torch.float32
    compare(seen, baseline, reference, batch.active).check(context)
    return seen


def _inputs(model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
    """The model's inputs, pixels in its own dtype."""
    dtype = next(model.parameters()).dtype
    inputs = batch.model_inputs()
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
