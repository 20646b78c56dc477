"""What a gated model remembers beside the user's, and whom it asks.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Signature
from typing import Any, Protocol

from torch import Tensor, nn

from regate_fx.plan import TokenPlan


class Engine(Protocol):
    """Computes gated calls of one model.

    model: the user's own object, never a gated one.
    report: what happened to each layer; None before the first gated call.
    """

    model: nn.Module

    def __call__(self, plan: TokenPlan, inputs: dict[str, Any]) -> Any:
        """The output of one gated call, a `ModelOutput`; `inputs` as in `GatedCall`."""

    def fresh(self, model: nn.Module) -> Engine:
        """The same options for another model.

        The result must pickle, and must not look into `model` before its first call: it may be half built.
        """

    @property
    def report(self) -> Any: ...


class Choice(Protocol):
    """token_mask: bool [B, S]; active: N and L where they are known on the host, see `make_plan`."""

    @property
    def token_mask(self) -> Tensor: ...

    @property
    def active(self) -> tuple[int, int] | None: ...


class Gate(Protocol):
    """Chooses the positions to compute in training, from batches that carry `sample_id`."""

    def follow(self, model: nn.Module) -> None:
        """Called before each choice, to notice that an optimizer has stepped."""

    def choose(self, batch: Mapping[str, Any]) -> Choice:
        """The positions to compute for a batch: the arguments of the call by name, `sample_id` among them.

        Refuses a `num_items_in_batch` that counts other labels than those this choice leaves.
        """

    def take_in(self, choice: Any, output: Any) -> None:
        """Called with the choice and what the call is about to return."""


@dataclass
class Gating:
    """The state of one gated model.

    original: the user's own object. override: what others assigned to `forward`. base: the gated base model of an
    adapter model, once it was asked for. entered: calls of the gated forward so far.
    """

    original: nn.Module
    engine: Engine
    signature: Signature
    gate: Gate | None = None
    enabled: bool = True
    override: Callable[..., Any] | None = None
    base: Any = None
    entered: int = 0
    is_warned: bool = False
    is_checked: bool = False
