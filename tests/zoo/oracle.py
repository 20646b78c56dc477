"""What a gated step of any architecture must compute, found without the compiler and without knowing the architecture.

Transformers makes nearly all of its masks in one place. There the padding mask is replaced by the active positions, and
nothing else is: positions, biases and layers that mix tokens see what they always see. Layers that are reported as
dense run as they are, behind those that are gated elided positions show what went in, as a constant.

Shapes: B samples, S positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from comparison import Outcome
from oracles import _forget_gradients, _gradients, _token_losses
from small_models import Batch
from text_batches import UserMaskBatch
from torch import Tensor, nn
from transformers import masking_utils

NO_LABEL = -100


class Unmasked(Exception):
    """The model does not make its masks where they can be replaced, or sees elided tokens all the same."""


def run_masked(
    model: nn.Module,
    batch: Batch,
    shifted: bool,
    gated: Sequence[nn.Module] = (),
    dtype: torch.dtype | None = None,
) -> Outcome:
    """The untouched model on a whole batch, no query seeing an elided key.

    shifted: whether row t - 1 of the logits is paired with label t. gated: modules whose output is to be constant
    at elided positions; none where no layer mixes tokens outside attention.
    """
    counted = counted_labels(batch, shifted)
    labels = batch.labels.masked_fill(~counted, NO_LABEL)
    _forget_gradients(model, batch)
    masked = _only_in(gated, batch.active) if gated else keys_masked(batch.active)
    with masked, _constant_where_elided(gated, batch.active):
        out = model(**_hiding(batch).model_inputs(), labels=labels, **no_cache(model))
    loss = out.loss if counted.any() else (out.logits * 0).sum()
    loss.backward()
    logits = out.logits.detach()
    small = mock.Mock(shifted=shifted)
    return Outcome(
        loss.detach(), _token_losses(small, logits, labels), counted, _gradients(model, batch), logits
    )


def _hiding(batch: Batch) -> Batch:
    """The same batch; where its user says which keys are seen, elided ones are not."""
    return batch.hidden() if isinstance(batch, UserMaskBatch) else batch


def counted_labels(batch: Batch, shifted: bool) -> Tensor:
    """bool [B, S]: the labels whose predictor is active."""
    predictor = batch.active
    if shifted:
        predictor = torch.cat([torch.zeros_like(predictor[:, :1]), predictor[:, :-1]], dim=1)
    return predictor & (batch.labels != NO_LABEL)


def no_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@contextmanager
def _only_in(gated: Sequence[nn.Module], active: Tensor) -> Iterator[None]:
    """While active, the masks that some modules are given hide elided keys; others see what they always see."""

    def hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise Unmasked("its layers are not given the mask that they use")
        keys = active[:, None, None, :]
        lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0.0
        return args, {
            **kwargs,
            "attention_mask": mask & keys if mask.dtype is torch.bool else mask.where(keys, lowest),
        }

    handles = [module.register_forward_pre_hook(hide, with_kwargs=True) for module in gated]
    try:
        with keys_masked(torch.ones_like(active)):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def keys_masked(active: Tensor) -> Iterator[list[Tensor]]:
    """While active, masks of transformers hide elided keys; yields the padding masks that were seen."""
    original = masking_utils.padding_mask_function
    seen: list[Tensor] = []

    def both(padding_mask: Tensor) -> Callable[..., Any]:
        if padding_mask.shape != active.shape:
            return original(padding_mask)
        seen.append(padding_mask)
        return original(padding_mask.bool() & active)

    def never(*args: Any, **kwargs: Any) -> bool:
        return False

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(masking_utils, "padding_mask_function", both))
        patches.enter_context(mock.patch.object(masking_utils, "_ignore_causal_mask_sdpa", never))
        patches.enter_context(mock.patch.object(masking_utils, "_ignore_bidirectional_mask_sdpa", never))
        yield seen


@contextmanager
def _constant_where_elided(gated: Sequence[nn.Module], active: Tensor) -> Iterator[None]:
    def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        shown = torch.where(active[..., None], after, before.detach())
        return (shown, *output[1:]) if isinstance(output, tuple) else shown

    handles = [module.register_forward_hook(show, with_kwargs=True) for module in gated]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_shifted(model: nn.Module, batch: Batch) -> bool:
    """How the untouched model pairs logits and labels. Raises `Unmasked` where its loss is another."""
    with torch.no_grad():
        out = model(**batch.model_inputs(), labels=batch.labels, **no_cache(model))
    for shifted in (True, False):
        rows, targets = (out.logits[:, :-1], batch.labels[:, 1:]) if shifted else (out.logits, batch.labels)
        loss = nn.functional.cross_entropy(rows.flatten(0, 1).float(), targets.flatten())
        if torch.allclose(loss, out.loss, rtol=1e-3):
            return shifted
    raise Unmasked("its loss is not the mean cross entropy of its logits")


def check_elided_is_unseen(model: nn.Module, batch: Batch, words: range) -> None:
    """Raise `Unmasked` unless other ids at elided positions leave the oracle's active logits alone."""
    other = torch.randint(words.start, words.stop, batch.input_ids.shape)
    inputs = _hiding(batch).model_inputs()
    ids = torch.where(batch.active, batch.input_ids, other)
    changed = _hiding(replace(batch, input_ids=ids)).model_inputs()
    with keys_masked(batch.active) as seen, torch.no_grad():
        first = model(**inputs, **no_cache(model)).logits
        second = model(**changed, **no_cache(model)).logits
    if not seen and not isinstance(batch, UserMaskBatch):
        raise Unmasked("it makes its masks elsewhere")
    if not torch.allclose(first[batch.active], second[batch.active], rtol=1e-4, atol=1e-4):
        raise Unmasked("elided tokens reach active ones outside attention")
