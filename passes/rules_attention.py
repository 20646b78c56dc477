"""Rules for attention operators and the loss."""

from __future__ import annotations

from typing import Any

from regate_fx.passes.axes import Axes, Dim, Token, has_token, merge
from regate_fx.passes.rules import Kind, Operands, Verdict, kind_of_product, rule


@rule("aten.scaled_dot_product_attention")
def _attention(op: Operands) -> Verdict:
    query, key, value = op.axes("query"), op.axes("key"), op.axes("value")
    mask = op.axes("attn_mask")
    if query.dims[-2] == (Token.S,) and not any(has_token(axes.dims[-2]) for axes in (key, value)):
        return _cross_attention(op)
    if {axes.dims[-2] for axes in (query, key, value)} != {(Token.S,)}:
        if any(has_token(axes.dims[dim]) for axes in (query, key, value) for dim in (-1, -2)):
            raise op.refuse("attention", "attends over something else than the decoder's own positions")
        batch = merge([Axes(axes.dims[:-2]) for axes in (query, key, value)], "attention")
        return Verdict(Axes((*batch, query.dims[-2], value.dims[-1])))
    heads = [axes.dims[:-2] for axes in (query, key, value)]
    if any(_batch(dims) != _batch(heads[0]) for dims in heads):
        raise op.refuse("attention", "pairs queries and keys of different samples")
    if mask.dims and (len(mask) < 2 or any(dim not in ((), (Token.S,)) for dim in mask.dims[-2:])):
        raise op.refuse("attention", "has a mask that is not over (query, key) positions")
    result = Axes((*query.dims[:-1], value.dims[-1]))
    plain = len(query) == 4 and query.dims[0] in ((Token.B,), ()) and not has_token(query.dims[1])
    return Verdict(result, Kind.ATTENTION if plain else Kind.PAIRS)


def _cross_attention(op: Operands) -> Verdict:
    """Over what an encoder made of the same sample: every query by itself."""
    query, key, value, mask = (op.axes(name) for name in ("query", "key", "value", "attn_mask"))
    if any(has_token(axes.dims[-1]) for axes in (query, key, value)):
        raise op.refuse("attention", "has heads whose features are positions")
    if any(_batch(axes.dims[:-2]) != _batch(query.dims[:-2]) for axes in (key, value)):
        raise op.refuse("attention", "pairs queries and keys of different samples")
    if op["is_causal"] or (mask.dims and has_token(mask.dims[-1])):
        raise op.refuse("attention", "orders the decoder's positions against keys that are none of them")
    result = Axes((*query.dims[:-1], value.dims[-1]))
    return Verdict(result, kind_of_product(result, query, key, value))


def _batch(dims: tuple[Dim, ...]) -> list[Any]:
    return [factor for dim in dims for factor in dim if isinstance(factor, Token)]


@rule("aten.cross_entropy_loss")
def _cross_entropy(op: Operands) -> Verdict:
    logits, target = op.axes("self"), op.axes("target")
    if not logits.has_tokens:
        return Verdict(op.symbols.axes_of_shape(op.shape))
    if len(logits) != 2 or len(target) != 1 or has_token(logits.dims[1]):
        raise op.refuse(
            "loss", "takes logits that are not [tokens, vocabulary] or labels that are not [tokens]"
        )
    if op.symbols.size(logits.dims[0]) != op.symbols.size(target.dims[0]):
        raise op.refuse("loss", "pairs logits and labels of different positions")
    if op["weight"] is not None or op["label_smoothing"] != 0.0:
        raise op.refuse("loss", "weights classes or smooths labels, which has no per-token loss to report")
    if op["reduction"] == 0:
        raise op.refuse(
            "loss", "returns losses per token, to be averaged by code that does not know which count"
        )
    return Verdict(Axes((), aggregate=True), Kind.LOSS)
