"""What an elementwise operator makes of the constants that its operands hold at hidden keys."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from regate_fx.passes.base import fake, operator_name
from regate_fx.passes.rules import RULES
from regate_fx.passes.rules_math import elementwise

# What a value may be at a hidden key; nothing where that is not known. NOT_ZERO: it is another one than zero.
Constants = frozenset[float]
UNKNOWN: Constants = frozenset()
NOT_ZERO = math.nan
# exp(-100) is lost beside any score that a model gives.
NEGLIGIBLE = -100.0
# So little is added to a sum to keep it from being zero.
_COUNTS_LEAST = 1e-6

_MOST = 8  # combinations of constants followed
_PROBES = (0.7, -1.3, 3.1)  # in place of values that are not known
_SAME = 1e-2  # relative spread under which a result is taken to be independent of the probes
_EITHER: frozenset[float | None] = frozenset({0.0, 1.0})  # what a condition may be
_SCALE = {"aten.mul", "aten.div"}  # by what is not known: not to zero
_WHERE_IT_LIES = ("device", "layout", "pin_memory", "memory_format", "non_blocking")


def counting(constants: Iterable[float]) -> list[float]:
    """Those of some constants that are no zero in a sum."""
    return [value for value in constants if not abs(value) <= _COUNTS_LEAST]


def is_elementwise(node: fx.Node) -> bool:
    """Whether an operator makes every element from those in its place, by no chance."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name, tags = operator_name(node), node.target.tags
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    return name == "aten._to_copy" or torch.Tag.pointwise in tags or RULES.get(name) is elementwise


def of_elements(
    node: fx.Node, operands: Sequence[fx.Node], constants: Sequence[Constants], scalable: bool
) -> Constants:
    """The operator's own results for every choice of constants, where they do not depend on what is not known.

    scalable: what the constants are multiplied with, where it is not known, holds no zero that a mask wrote.
    """
    if not any(constants) or math.prod(max(len(known), 1) for known in constants) > _MOST:
        return UNKNOWN
    either: list[frozenset[float | None]] = [
        frozenset(known) or (_EITHER if fake(operand).dtype is torch.bool else frozenset({None}))
        for operand, known in zip(operands, constants, strict=True)
    ]
    choices = itertools.product(*either)
    results = {_result(node, operands, choice, scalable) for choice in choices}
    return frozenset(value for value in results if value is not None)


def _result(
    node: fx.Node, operands: Sequence[fx.Node], choice: tuple[float | None, ...], scalable: bool
) -> float | None:
    """What the operator makes of one choice; None where it depends on the operands without a constant."""
    numbers = [value for value in choice if value is not None and not math.isnan(value)]
    results = []
    for turn in range(len(_PROBES) if len(numbers) < len(choice) else 1):
        probes = (_PROBES[(turn + place) % len(_PROBES)] for place in range(len(choice)))
        values = [
            probe if value is None or math.isnan(value) else value
            for value, probe in zip(choice, probes, strict=True)
        ]
        results.append(_run(node, dict(zip(operands, values, strict=True))))
    first = results[0]
    if first is None or math.isnan(first):
        return None
    if all(value is not None and _is_close(value, first) for value in results):
        return first
    if None not in choice:
        return NOT_ZERO  # of another one
    scales = scalable and operator_name(node) in _SCALE
    return NOT_ZERO if scales and all(_COUNTS_LEAST < abs(value) < -NEGLIGIBLE for value in numbers) else None


def _is_close(a: float, b: float) -> bool:
    if a == b:
        return True
    return math.isfinite(a) and math.isfinite(b) and abs(a - b) <= _SAME * max(abs(a), abs(b))


def _run(node: fx.Node, values: dict[fx.Node, float]) -> float | None:
    """The operator on tensors without dimensions; None where it gives no number."""
    result = run_on_tensors(node, lambda operand: _scalar(values[operand], operand))
    return float(result) if result is not None and result.dim() == 0 else None


def run_on_tensors(node: fx.Node, tensor: Callable[[fx.Node], torch.Tensor]) -> torch.Tensor | None:
    """An operator's own result on other tensors than it is given in the graph; None where it gives no real tensor."""
    kwargs = {name: value for name, value in node.kwargs.items() if name not in _WHERE_IT_LIES}
    assert callable(node.target)
    try:
        with unset_fake_temporarily(), torch.no_grad():
            args, kwargs = fx.map_arg((node.args, kwargs), tensor)
            result = node.target(*args, **kwargs)
    except Exception:
        return None  # it takes something else than these tensors, too, a size for one
    return result if isinstance(result, torch.Tensor) and not result.is_complex() else None


def _scalar(value: float, like: fx.Node) -> torch.Tensor:
    dtype = fake(like).dtype
    if dtype is torch.bool:
        return torch.tensor(value > 0)
    return torch.tensor(value if dtype.is_floating_point else int(value), dtype=dtype)
