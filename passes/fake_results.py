"""What decides an operator's result on fake values, so that layers that are alike need not compute it again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Made of others that do, and without a tag.
_UNTAGGED = {torch.ops.aten.where.default, torch.ops.aten.nonzero_numpy.default}
_PLAIN = (
    int,
    float,
    complex,
    bool,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


def reads_values(target: Any) -> bool:
    """Whether an operator's result has numbers, or sizes, that its operands' values decide."""
    return target in _UNTAGGED or not _READS_VALUES.isdisjoint(getattr(target, "tags", ()))


class CallKeys:
    """Keys of calls. A tensor is described once: a graph of alike layers uses few values many times."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        # By identity; values are held, so that no other takes theirs over.
        self._seen: dict[int, tuple[torch.Tensor, int]] = {}

    def of(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
        """Equal for calls whose results differ in nothing that a fake value shows; None where that is not known."""
        if not isinstance(target, torch._ops.OpOverload):
            return None
        try:
            return (target, self._key(args), *((name, self._key(value)) for name, value in kwargs.items()))
        except Undecided:
            return None

    def _key(self, value: Any) -> Hashable:
        if isinstance(value, (tuple, list)):
            return tuple(map(self._key, value))
        if not isinstance(value, FakeTensor):
            return value_key(value)
        if id(value) not in self._seen:
            number = self._numbers.setdefault(value_key(value), len(self._numbers))
            self._seen[id(value)] = (value, number)
        return FakeTensor, self._seen[id(value)][1]


class Undecided(Exception):
    """Of a value that `value_key` does not know."""


def value_key(value: Any) -> Hashable:
    if isinstance(value, _SYMBOLIC):
        return value.node.expr
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return tuple(map(value_key, value))
    # The value of a constant may decide, and a value of another kind may be anything.
    if not isinstance(value, FakeTensor) or value.constant is not None or value.layout != torch.strided:
        raise Undecided
    return (
        tuple(map(value_key, value.shape)),
        tuple(map(value_key, value.stride())),
        value_key(value.storage_offset()),
        value.dtype,
        value.device,
        value.requires_grad,
        value.is_conj(),
        value.is_neg(),
    )
