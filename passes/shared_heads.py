"""See through the copies that a model makes of key heads which several query heads share.

The variable-length operator reads key head `h // G` for query head `h`. Copies would cost memory, and in the backward
gradients G times as large, to be added up.

Shapes: B samples, S positions, Hk key heads, G query heads to each, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from regate_fx.passes.base import fake, operator_name
from regate_fx.passes.token_symbols import size_expr

aten = torch.ops.aten

_RESHAPES = {"aten.view", "aten.reshape", "aten._unsafe_view"}
COPIES = {"aten.clone", "aten.contiguous", "aten.alias"}
_HEADS = 1  # the dimension of [B, H, S, d]


def before_repeat(key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values [B, Hk, S, d] of which the given ones [B, Hk * G, S, d] are copies, or the given ones."""
    own_key, own_value = _source(key), _source(value)
    if own_key is None or own_value is None:
        return key, value
    same = fake(own_key).shape[_HEADS] == fake(own_value).shape[_HEADS]
    return (own_key, own_value) if same else (key, value)


def own_keys(transposed: fx.Node) -> fx.Node | None:
    """Keys [B, H, S, d] of which [B, H, d, S] are a transposed view; None where they are made otherwise."""
    node = _peel(transposed)
    if node.target is not aten.transpose.int or len(fake(node).shape) != 4:
        return None
    source, *swapped = node.args
    return source if {dim % 4 for dim in swapped} == {2, 3} else None


def _source(node: fx.Node) -> fx.Node | None:
    node = _peel(node)
    if operator_name(node) == "aten.repeat_interleave":
        return _interleaved(node)
    if operator_name(node) not in _RESHAPES:
        return None
    expanded = _peel(node.args[0])
    if operator_name(expanded) != "aten.expand":
        return None
    unsqueezed = _peel(expanded.args[0])
    # Copies side by side: the new dimension comes right behind that of the heads.
    if unsqueezed.target is not aten.unsqueeze.default or unsqueezed.args[1] not in (_HEADS + 1, -3):
        return None
    source = unsqueezed.args[0]
    assert isinstance(source, fx.Node)
    sizes, copied = _sizes(source), _sizes(expanded)
    heads, copies = copied[_HEADS : _HEADS + 2]
    kept = [*copied[:_HEADS], heads * copies, *copied[_HEADS + 2 :]]
    if len(sizes) != 4 or copied != [*sizes[:2], copies, *sizes[2:]] or _sizes(node) != kept:
        return None
    return source


def _interleaved(node: fx.Node) -> fx.Node | None:
    if node.target is not aten.repeat_interleave.self_int or len(node.args) < 3:
        return None
    source, _, dim = node.args[:3]
    if not isinstance(source, fx.Node) or len(fake(source).shape) != 4 or dim not in (_HEADS, _HEADS - 4):
        return None
    return source


def _peel(node: Any) -> fx.Node:
    """The value that a node hands on unchanged."""
    while operator_name(node) in COPIES or (
        node.target is aten.slice.Tensor and _sizes(node) == _sizes(node.args[0])
    ):
        node = node.args[0]
    return node


def _sizes(node: fx.Node) -> list[Any]:
    return [size_expr(size) for size in fake(node).shape]
