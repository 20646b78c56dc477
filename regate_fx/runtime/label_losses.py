"""Losses of labels without the logits of a whole batch.

Shapes: B rows, S positions, D hidden size, V vocabulary, K labels of a chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regate_fx.runtime.identity import vocabulary_size
from regate_fx.runtime.rules import NO_LABEL

# 64 MB as float32. Twice that, with the intermediate results of the loss, is what a chunk takes.
_LOGITS_AT_ONCE = 2**24
_LARGE_VOCABULARY = 2**18
_PROBES = 16

Logits = Callable[[Tensor, Tensor], Tensor]
"""Logits float [K, V] of K positions, given by their rows and indices, int64 [K] each."""


class LabelLosses:
    """The losses of a causal model on labels, its logits computed for a few labels at a time.

    The decoder runs once. Then, for each chunk of labels, the model's own forward runs again with the decoder's output
    at hand and the hidden states of the chunk alone before the vocabulary projection, so that whatever the model does
    after it (caps, scales, biases) is done. At the first batch this is compared with the model's own logits at some
    positions; a model in which they differ, or that has no decoder and projection to be named, makes the logits
    [B, S, V] of a batch in its own dtype instead, and only their float32 copy is chunked.

    `torch.nn.functional.linear_cross_entropy` is not used: it knows a projection and nothing after it, makes all
    logits at once unless told to chunk, and its chunked path works out gradients that nobody wants here: seven times
    the time of plain chunks at a vocabulary of 151,936 (`tests/benchmarks/bench_label_losses.py`).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._parts = _parts(model)
        self._proven = False
        # Of the vocabulary alone, not of what a batch shows: results must not depend on what came before.
        self._at_once = max(1, _LOGITS_AT_ONCE // (vocabulary_size(model) or _LARGE_VOCABULARY))

    def __call__(self, inputs: Mapping[str, Any], labels: Tensor, shifted: bool) -> Tensor:
        """float32 [B, S]: the negative log-likelihood of label t at index t, 0 where there is none. No gradients.

        inputs: the arguments of the model's forward; labels: int64 [B, S]; shifted: label t is predicted at t - 1.
        """
        has_label = labels != NO_LABEL
        if shifted:
            has_label[:, 0] = False
        row, index = has_label.nonzero(as_tuple=True)
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        if not len(row):
            return losses
        logits = self._logits(dict(inputs), labels.shape)
        for begin in range(0, len(row), self._at_once):
            at = row[begin : begin + self._at_once], index[begin : begin + self._at_once]
            predicted = logits(at[0], at[1] - int(shifted)).float()
            losses[at] = F.cross_entropy(predicted, labels[at], reduction="none")
        return losses

    def _logits(self, inputs: dict[str, Any], shape: torch.Size) -> Logits:
        if self._parts is not None and not self._proven:
            self._proven = _agrees(self._model, self._parts, inputs, shape)
            if not self._proven:
                self._parts = None
        if self._parts is None:
            whole: Tensor = self._model(**inputs).logits
            return lambda row, index: whole[row, index]
        decoded = _decode(self._model, self._parts, inputs)
        return lambda row, index: decoded.logits(decoded.states[row, index])


@dataclass(frozen=True)
class _Parts:
    """Where a model can be taken apart: its text decoder and its vocabulary projection."""

    decoder: nn.Module
    head: nn.Module


def _parts(model: Any) -> _Parts | None:
    found = [getattr(model, name, lambda: None)() for name in ("get_decoder", "get_output_embeddings")]
    if any(part is model or not isinstance(part, nn.Module) for part in found):
        return None
    return _Parts(*found)


@dataclass(frozen=True)
class _Decoded:
    """What a decoder made of a batch. states: float [B, S, D], as the projection is given them; output: all of it."""

    model: Any
    parts: _Parts
    inputs: dict[str, Any]
    states: Tensor
    output: Any

    def logits(self, states: Tensor) -> Tensor:
        """float [K, V] of states [K, D]: the model's forward from the projection on."""
        with _before(self.parts.head, lambda _: states[None]), _returning(self.parts.decoder, self.output):
            logits: Tensor = self.model(**self.inputs).logits
        return logits.squeeze(0)


class _Reached(Exception):
    """The forward has come to the vocabulary projection."""


def _decode(model: Any, parts: _Parts, inputs: dict[str, Any]) -> _Decoded:
    """Run the model up to its projection."""

    def stop(states: Tensor) -> Tensor:
        reached.append(states)
        raise _Reached

    reached: list[Tensor] = []
    with _noting(parts.decoder) as outputs, _before(parts.head, stop), contextlib.suppress(_Reached):
        model(**inputs)
    return _Decoded(model, parts, inputs, reached[0], outputs[0])


def _agrees(model: Any, parts: _Parts, inputs: dict[str, Any], shape: torch.Size) -> bool:
    """Whether the model taken apart gives its own logits, at the first positions of each row."""
    B, S = shape
    probes = min(S, max(1, _PROBES // B))

    def shorten(states: Tensor) -> Tensor:
        reached.append(states)
        return states[:, :probes]

    reached: list[Tensor] = []
    try:
        with _noting(parts.decoder) as outputs, _before(parts.head, shorten):
            own: Tensor = model(**inputs).logits
        if len(reached) != 1 or len(outputs) != 1 or reached[0].shape[:2] != shape:
            return False
        decoded = _Decoded(model, parts, inputs, reached[0], outputs[0])
        # In another order, so that whatever depends on the neighbours shows.
        found = decoded.logits(reached[0][:, :probes].flatten(0, 1).flip(0)).flip(0)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        # Whatever a model has against being taken apart: it can still be run in one piece.
        return False
    if found.shape != own.flatten(0, 1).shape:
        return False
    step = max(torch.finfo(dtype).eps for dtype in (own.dtype, reached[0].dtype, _weight_dtype(parts.head)))
    if torch.is_autocast_enabled(own.device.type):
        step = max(step, torch.finfo(torch.get_autocast_dtype(own.device.type)).eps)
    error = (found - own.flatten(0, 1)).abs().max()
    return bool(error <= max(4 * step, 1e-4) * own.abs().max())


def _weight_dtype(head: nn.Module) -> torch.dtype:
    return next((weight.dtype for weight in head.parameters() if weight.is_floating_point()), torch.float32)


@contextlib.contextmanager
def _noting(module: nn.Module) -> Iterator[list[Any]]:
    """What the module returns, call by call."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextlib.contextmanager
def _before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the module's first argument."""
    handle = module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _returning(module: Any, output: Any) -> Iterator[None]:
    """Let the module return what it returned before, without running."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
