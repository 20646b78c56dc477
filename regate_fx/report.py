"""What happened to each decoder layer, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass, field

from regate_fx.errors import LayerRefusal


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer.

    kind: "varlen" (attention as one variable-length operator), "compact" (attention over slots, exact
    and somewhat slower) or "dense" (not gated: every position is computed). `attention` says what its
    queries see and how that is known. `reason` says why a layer is not "varlen"; `source` is the model line it
    comes from.
    """

    index: int
    kind: str
    attention: str
    reason: str = ""
    source: str = ""


@dataclass
class Report:
    """The compiled model, layer by layer.

    traces: graphs with decoder layers that were compiled so far. seconds: time spent per pass, all traces
    together. refusals: why layers (or whole parts of the model) stayed dense.
    """

    layers: list[LayerReport] = field(default_factory=list)
    refusals: list[LayerRefusal] = field(default_factory=list)
    traces: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def gated(self) -> int:
        """How many layers compute active tokens only."""
        return sum(layer.kind != "dense" for layer in self.layers)
