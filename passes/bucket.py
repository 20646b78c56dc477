"""What a graph may not do where some packed rows only fill a bucket: count rows, or sum over them.

Attention leaves them out as a sample of their own, the loss as rows without a label. A router's auxiliary loss, say,
would take them for tokens.
"""

from __future__ import annotations

from regate_fx.passes.base import PassContext, Refused, operator_name
from regate_fx.passes.layouts import Layout
from regate_fx.passes.placement import Placement
from regate_fx.passes.token_sums import TokenSums


def refuse_counted_rows(ctx: PassContext) -> None:
    """Raise `Refused` at the first node that makes one number of many packed rows, unless it is the loss."""
    sums: TokenSums = ctx.findings["token_sums"]
    placement: Placement = ctx.findings["placement"]
    for node in sums.begins:
        if placement.layout(node) is not Layout.DENSE:
            raise Refused(
                "bucket",
                f"{operator_name(node)} counts rows, some of which are no token's but fill a bucket (bucket=...)",
                node,
            )
