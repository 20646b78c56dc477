"""Rules for the linear layers of bitsandbytes: 4-bit weights, and 8-bit ones without outliers.

Rows of tokens are multiplied by a weight that is dequantised on the way; every row is computed by itself.
"""

from __future__ import annotations

from regate_fx.passes.axes import NO_AXES, Axes, has_token
from regate_fx.passes.rules import Operands, Verdict, kind_of, rule


@rule("bitsandbytes.gemm_4bit")
def _four_bit(op: Operands) -> Verdict:
    return _rows_times_weight(op, ("B", "absmax", "bias", "absmax_8bit", "absmax_code", "absmax_offset"))


@rule("bitsandbytes.int8_scaled_mm")
def _eight_bit(op: Operands) -> Verdict:
    stats = op.axes("row_stats")
    if stats.factors != Axes(op.axes("A").dims[:-1]).factors:
        raise op.refuse("broadcast", "scales rows by numbers that are not theirs")
    return _rows_times_weight(op, ("B", "col_stats", "bias"))


@rule("bitsandbytes.int8_vectorwise_quant")
def _quantise(op: Operands) -> Verdict:
    """To int8 rows and a number for each; a threshold finds outlying columns, by the largest value in all rows."""
    rows = op.axes("A")
    if op["threshold"] != 0.0 and rows.has_tokens:
        raise op.refuse("mixes-tokens", "looks for outlying features among all tokens")
    if has_token(rows.dims[-1]):
        raise op.refuse("mixes-tokens", "quantises along a token axis")
    stats = Axes((Axes(rows.dims[:-1]).factors,))
    return Verdict((rows, stats, NO_AXES), kind_of(rows))


def _rows_times_weight(op: Operands, weights: tuple[str, ...]) -> Verdict:
    rows = op.axes("A")
    if has_token(rows.dims[-1]) or any(op.axes(name).has_tokens for name in weights):
        raise op.refuse("matmul", "multiplies along a token axis")
    result = rows.with_dims([*rows.dims[:-1], op.symbols.dim_of_size(op.shape[-1])])
    return Verdict(result, kind_of(result))
