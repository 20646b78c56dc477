"""Count the tokens a gated model computes, where it computes them: in the rows of matrices that its graphs multiply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import regate_fx


@dataclass
class Call:
    """A training call: its tokens without padding, and the rows of every matrix that met the weight watched for."""

    tokens: int
    rows: list[int] = field(default_factory=list)

    @property
    def computed(self) -> int:
        (rows,) = set(self.rows)
        return rows


class Computed:
    """A backend for `regate_fx.compile` that runs graphs as they are, and notes what they compute.

    shape: of the weights watched for, [out, in]; recomputes: gradient checkpointing is in one of the graphs.
    Watches every model that is compiled while `monkeypatch` lasts.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.calls: list[Call] = []
        self.recomputes = False
        self._compile = regate_fx.compile
        monkeypatch.setattr(regate_fx, "compile", self.compile)

    def compile(self, model: Any, backend: Any = None, **options: Any) -> Any:
        gated = self._compile(model, backend=self, **{"validate": False, **options})
        gated.register_forward_pre_hook(self._begin, with_kwargs=True)
        return gated

    def _begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            self.calls.append(Call(int(kwargs["attention_mask"].sum())))

    def _note(self, rows: Tensor, weight: Tensor) -> None:
        if weight.shape == self.shape:
            self.calls[-1].rows.append(rows.shape[:-1].numel())

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.recomputes |= any("recompute" in node.meta for node in gm.graph.nodes)
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            with gm.graph.inserting_before(node):
                gm.graph.call_function(self._note, node.args[:2])
        gm.recompile()
        return gm

    @property
    def sparse(self) -> list[bool]:
        """Of each call, whether fewer tokens were computed than there are."""
        assert all(call.computed <= call.tokens for call in self.calls)
        return [call.computed < call.tokens for call in self.calls]
