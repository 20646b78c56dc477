"""The plan of the call that is running, and the places where it enters the captured graphs.

Shapes: B samples, S positions, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from regate_fx.inputs import padding_of
from regate_fx.plan import TokenPlan


class LivePlan:
    """What the traced code reads while one gated call runs; empty between calls.

    plan: the tensors of the `TokenPlan`. depth: length of the longest list of modules that was entered with hidden
    states, 0 where the model is one graph. token_loss, counted: the anchor's results, replaced in the graph that
    computes the loss.
    """

    def __init__(self) -> None:
        self.plan: tuple[Tensor, ...] = ()
        self.attention_mask: Tensor | None = None
        self.labels: Tensor | None = None
        self.token_loss: Tensor | None = None
        self.counted: Tensor | None = None
        self.depth = 0
        self._apart: tuple[nn.Module, Callable[..., Any]] | None = None

    def enter(self, plan: TokenPlan, inputs: dict[str, Any]) -> None:
        self.plan = plan.tensors()
        self.attention_mask = padding_of(inputs)
        self.labels = inputs.get("labels")
        self.depth = 0

    def leave(self) -> tuple[Tensor | None, Tensor | None]:
        results = self.token_loss, self.counted
        self.plan, self.attention_mask, self.labels = (), None, None
        self.token_loss, self.counted = None, None
        return results

    def anchor(self) -> None:
        """Bring the plan into the graph that is being captured, its B and S tied to those of masks and labels."""
        row_of = self.plan[1]
        for grid in (self.attention_mask, self.labels):
            if grid is not None:
                torch._check(grid.shape[0] == row_of.shape[0])
                torch._check(grid.shape[1] == row_of.shape[1])
        # The results are kept in any case: normalisation drops an operator that nobody reads.
        self.token_loss, self.counted = torch.ops.regate_fx.anchor(
            *self.plan, self.attention_mask, self.labels
        )

    @contextlib.contextmanager
    def anchored(self, model: nn.Module, everywhere: bool) -> Iterator[None]:
        """While active, and if `everywhere`: anchor again where hidden states enter a stack of layers or the head."""
        if not everywhere:
            yield
            return
        handles = [
            module.register_forward_pre_hook(self._hook(length), with_kwargs=True)
            for module, length in _entrances(model)
        ]
        try:
            with self._decoder_apart(model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _decoder_apart(self, model: nn.Module) -> Iterator[None]:
        """While active, the decoder is captured by itself, and rows it picks by a mask are part of its graph.

        Elsewhere picking them breaks the graph as it would without us: code of a vision tower branches on how many
        there are.
        """
        decoder = _decoder(model)
        if decoder is None or decoder is model or "forward" in vars(decoder):
            yield
            return
        if self._apart is None or self._apart[0] is not decoder:
            self._apart = decoder, _apart(decoder.forward)
        decoder.forward = self._apart[1]
        try:
            yield
        finally:
            del decoder.forward

    def _hook(self, length: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs.get("hidden_states")
            row_of = self.plan[1]
            if not isinstance(states, Tensor) or states.dim() != 3:
                return
            # [B, S, D]; comparing the sizes ties their symbols to those of the plan.
            if states.shape[0] == row_of.shape[0] and states.shape[1] == row_of.shape[1]:
                self.depth = max(self.depth, length)
                self.anchor()

        return enter


def _entrances(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """The first module of every list of modules, with the list's length, and the head.

    Where the model names its decoder, only the lists inside: in the layers of a vision tower a comparison with the
    plan would tie the number of images to the batch size.
    """
    decoder = _decoder(model)
    lists = _lists(decoder) if decoder is not None else []
    entrances: list[tuple[nn.Module, int]] = [
        (modules[0], len(modules)) for modules in lists or _lists(model)
    ]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [*entrances, (head, 0)] if head is not None else entrances


def _decoder(model: nn.Module) -> nn.Module | None:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else None


def _apart(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` as the start of a capture of its own, instead of a part of its caller's."""

    def alone(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            return forward(*args, **kwargs)

    return torch._dynamo.disable(alone, recursive=False)


def _lists(model: nn.Module) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
