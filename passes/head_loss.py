"""Turn a linear head and the losses of its logits into one operator that never holds all logits.

Shapes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regate_fx.passes.base import PassContext, PassResult, fake, fake_mode_of, is_tensor, operator_name
from regate_fx.passes.emit import Emitter
from regate_fx.passes.rewrite_attention import autocast_dtype
from regate_fx.passes.token_symbols import size_expr

aten = torch.ops.aten

# From a size of the logits on, in bytes of float32, that is worth computing them twice.
WORTHWHILE = 2**30

_NO_REDUCTION = 0
# What may lie between the head and its losses, beside what `_changes_by_number`: it moves no value, and rounds none.
_BETWEEN = {
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.clone", "aten.contiguous", "aten.alias", "aten._to_copy",
    "aten.slice",
}  # fmt: skip


@dataclass(frozen=True)
class FuseHeadLoss:
    """`cross_entropy(linear(rows, weight, bias), target)`, a loss per row, becomes `regate_fx.head_loss`.

    rows: [..., D], weight: [V, D], target: int64 [N]. Done where nothing else reads the logits, and where all of them
    would take `least_bytes` at the sizes of the capture. Between the two, logits may be multiplied with numbers, and
    capped as by `cap * tanh(logits / cap)`; a head whose logits are changed otherwise is left alone.
    """

    least_bytes: int = WORTHWHILE
    name: str = "fuse_head_loss"
    after: tuple[str, ...] = ("remove_unused",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        rewrites = 0
        for node in gm.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
            chain = _chain(node)
            if chain and _bytes(node) >= self.least_bytes:
                _fuse(gm, node, chain)
                rewrites += 1
        return PassResult(gm, rewrites)


def _chain(loss: fx.Node) -> list[fx.Node]:
    """The nodes from the logits of a loss back to the linear operator that made them, if nothing else reads them."""
    weight, reduction = (*loss.args[2:4], None, None)[:2]
    logits, target = loss.args[:2]
    if weight is not None or reduction != _NO_REDUCTION or fake(target).dtype is not torch.int64:
        return []
    vocabulary = fake(logits).shape[-1]
    chain: list[fx.Node] = [loss]
    node = logits
    while isinstance(node, fx.Node) and set(node.users) - set(_sizes_of(node)) == {chain[-1]}:
        chain.append(node)
        if node.target is aten.linear.default:
            fuses = _is_fusible(node, loss) and _have_sizes_of_rows(chain[1:]) and _scale_and_cap(chain[1:])
            return chain[1:] if fuses else []
        name = operator_name(node)
        if not _changes_by_number(node) and (name not in _BETWEEN or not _keeps(node, vocabulary)):
            return []
        node = node.args[0]
    return []


def _changes_by_number(node: fx.Node) -> bool:
    """Whether a node multiplies or divides all logits with a number, or takes their tanh."""
    name = operator_name(node)
    if name == "aten.tanh":
        return True
    return (
        name in ("aten.mul", "aten.div")
        and len(node.args) == 2
        and not node.kwargs
        and _is_number(node.args[1])
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value != 0


def _scale_and_cap(chain: list[fx.Node]) -> tuple[float, float] | None:
    """The logits of a chain as `scale * x`, or as `cap * tanh(scale * x)`; None where they are neither. No cap is 0."""
    scale, cap = 1.0, 0.0
    for node in reversed(chain):
        name = operator_name(node)
        if name == "aten.tanh" and cap:
            return None
        if name == "aten.tanh":
            cap = 1.0
        elif name in ("aten.mul", "aten.div"):
            number = node.args[1]
            assert isinstance(number, (int, float))
            factor = number if name == "aten.mul" else 1 / number
            scale, cap = (scale, cap * factor) if cap else (scale * factor, 0.0)
    return scale, cap


def _sizes_of(node: fx.Node) -> list[fx.Node]:
    """The users that read nothing but a size."""
    return [user for user in node.users if user.target is aten.sym_size.int]


def _have_sizes_of_rows(chain: list[fx.Node]) -> bool:
    """Whether the sizes that are read of logits are those of the head's rows too."""
    rows = _sizes(fake(chain[-1].args[0]))[:-1]
    return all(_sizes(fake(node))[:-1] == rows for node in chain if _sizes_of(node))


def _keeps(node: fx.Node, vocabulary: Any) -> bool:
    """Whether a value has its operand's rows of logits, in a dtype that holds them."""
    source = node.args[0]
    if not is_tensor(source):
        return False
    before, after = fake(source), fake(node)
    is_whole = operator_name(node) != "aten.slice" or _sizes(before) == _sizes(after)
    widens = torch.promote_types(before.dtype, after.dtype) == after.dtype
    return bool(
        isinstance(vocabulary, int)
        and before.shape[-1] == after.shape[-1] == vocabulary
        and widens
        and is_whole
    )


def _sizes(value: torch.Tensor) -> list[Any]:
    return [size_expr(size) for size in value.shape]


def _is_fusible(head: fx.Node, loss: fx.Node) -> bool:
    """Whether operands have the dtype that the product is computed in, or are rounded to it by autocast."""
    dtypes = {fake(source).dtype for source in head.all_input_nodes}
    wide = torch.promote_types(_head_dtype(head), torch.float32)
    return (
        dtypes <= {_head_dtype(head), torch.float32} and torch.promote_types(wide, fake(loss).dtype) == wide
    )


def _head_dtype(head: fx.Node) -> torch.dtype:
    """The dtype that a head's product is computed in."""
    rows = fake(head.args[0])
    return autocast_dtype(head, rows.device.type) or rows.dtype


def _bytes(loss: fx.Node) -> int:
    """Of the logits in float32, at the sizes that the capture saw; 0 if it saw none."""
    count = 4
    for size in fake(loss.args[0]).shape:
        hint = size.node.hint if isinstance(size, torch.SymInt) else size
        count *= 0 if hint is None else int(hint)
    return count


def _fuse(gm: fx.GraphModule, loss: fx.Node, chain: list[fx.Node]) -> None:
    head = chain[-1]
    rows, weight, bias = (*head.args, None)[:3]
    dtype, wanted = _head_dtype(head), fake(loss).dtype
    ignore_index = loss.args[4] if len(loss.args) > 4 else -100
    shape = _scale_and_cap(chain)
    assert shape is not None
    emit = Emitter(gm.graph, fake_mode_of(gm))
    before = loss.prev
    with emit.like(head), gm.graph.inserting_before(loss):
        rows, weight, bias = (_cast(emit, operand, dtype) for operand in (rows, weight, bias))
        rows = emit.call(aten.reshape.default, rows, [-1, fake(weight).shape[-1]])
        both = emit.call(
            torch.ops.regate_fx.head_loss.default, rows, weight, bias, loss.args[1], ignore_index, *shape
        )
        losses = _cast(emit, emit.call(operator.getitem, both, 0), wanted)
    while before.next is not loss:
        before = before.next
        before.meta |= {key: loss.meta[key] for key in ("segment",) if key in loss.meta}
    loss.replace_all_uses_with(losses)
    for node in (loss, *chain):
        for size in _sizes_of(node):
            size.update_arg(0, head.args[0])
        gm.graph.erase_node(node)


def _cast(emit: Emitter, value: Any, dtype: torch.dtype) -> Any:
    if value is None or fake(value).dtype == dtype:
        return value
    return emit.call(aten._to_copy.default, value, dtype=dtype)
