"""What a pass is, and what it may say.

Between two passes a graph is functional: no node writes to another node's value, the placeholders and
their order are those of the captured graph, and every tensor-valued node carries its fake value in
`meta["val"]`. `verify.py` checks this after each pass.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from regate_fx.errors import LayerRefusal


class Refused(Exception):
    """Raised inside a pass when a node cannot be proven sound; the pass turns it into a `LayerRefusal`."""

    def __init__(self, code: str, reason: str, node: fx.Node | None = None) -> None:
        self.code = code
        self.reason = reason
        self.node = node
        super().__init__(reason)

    def kept(self) -> Refused:
        """Without the frames that it was raised through, which would keep the tensors of the call alive."""
        self.__traceback__ = self.__context__ = self.__cause__ = None
        return self

    def refusal(self, layer: int | None = None) -> LayerRefusal:
        return LayerRefusal(layer, self.code, self.reason, source_line(self.node))


@dataclass(frozen=True)
class PassResult:
    """The graph after a pass, how many places it rewrote, and what it declined to rewrite."""

    graph_module: fx.GraphModule
    rewrites: int
    refusals: tuple[LayerRefusal, ...] = ()


@dataclass
class PassContext:
    """What passes of one pipeline run share: what earlier ones found, by the names their docstrings give."""

    findings: dict[str, Any] = field(default_factory=dict)


class Pass(Protocol):
    """One rewrite or analysis. `after` names the passes that must have run before it."""

    @property
    def name(self) -> str: ...

    @property
    def after(self) -> tuple[str, ...]: ...

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult: ...


_TORCH = os.path.dirname(torch.__file__) + os.sep


def source_line(node: fx.Node | None) -> str:
    """`file.py:123 code` of the model line a node came from, or an empty string."""
    trace = node.meta.get("stack_trace") if node is not None else None
    if not trace:
        return ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    places = [index for index, line in enumerate(lines) if line.startswith("File ")]
    if not places:
        return ""
    last = ([index for index in places if _TORCH not in lines[index]] or places)[-1]
    path, _, rest = lines[last].removeprefix('File "').partition('"')
    number = rest.removeprefix(", line ").partition(",")[0]
    code = lines[last + 1] if last + 1 < len(lines) else ""
    return f"{path.rsplit('/', 1)[-1]}:{number} {code}".strip()


def operator_name(node: fx.Node) -> str:
    """The operator as its author would write it: `aten.cumsum`, `getitem`, ..."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return str(getattr(target, "__name__", target))


def fake(node: fx.Node) -> Any:
    """The fake value of a node (tensor, SymInt, tuple of them or None)."""
    return node.meta.get("val")


def held_number(node: fx.Node) -> float | None:
    """The number that a graph holds as a tensor without dimensions; None where it holds something else."""
    value = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    constant = value.constant if isinstance(value, FakeTensor) else value
    if not isinstance(constant, torch.Tensor) or constant.dim() or constant.is_complex():
        return None
    return float(constant)


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """The mode that the fake values of a normalised graph belong to."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(value := fake(node), FakeTensor):
            return value.fake_mode
    raise Refused("no-inputs", "the captured graph has no tensor inputs")


# Operators that read a number from a tensor's values.
SCALARS_OF_TENSORS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


def reads_number(node: fx.Node) -> bool:
    """Whether a number was computed from one that was read from a tensor: no expression over sizes says what it is."""
    if node.target in SCALARS_OF_TENSORS:
        return True
    return not is_tensors(fake(node)) and any(reads_number(source) for source in node.all_input_nodes)


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(fake(node), torch.Tensor)


def is_tensors(value: object) -> bool:
    """Whether a fake value is a tensor, or a tuple or list that holds one."""
    if isinstance(value, (tuple, list)):
        return any(isinstance(item, torch.Tensor) for item in value)
    return isinstance(value, torch.Tensor)
