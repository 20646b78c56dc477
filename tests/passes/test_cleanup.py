"""What nobody reads any more is removed; what is returned or written back is not."""

from __future__ import annotations

import torch
from captured import operators, run_until
from small_decoder import Block, Decoder, batch, some_active
from torch import Tensor, nn


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder([Block(), Block()])
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, **inputs: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return self.model(**inputs).loss


def test_masks_and_dense_index_arithmetic_are_gone() -> None:
    inputs = batch(padded=True)
    before = run_until("elide_tokens", Loss(), inputs, some_active())
    after = run_until("remove_unused", Loss(), inputs, some_active())

    old, new = operators(before.graph_module), operators(after.graph_module)
    assert after.rewrites["remove_unused"] == old.total() - new.total() > 0
    assert old["aten.ge"] > new["aten.ge"]  # the causal comparison: proven, so never computed
    assert new["regate_fx.anchor"] == 0
    assert new["aten.__and__"] == 0
    for node in after.graph_module.graph.nodes:
        kept = (
            node.users or node.op in ("placeholder", "output") or node.target is torch.ops.aten.copy_.default
        )
        assert kept


def test_what_counts_stays() -> None:
    before = run_until("elide_tokens", Loss(), batch(), some_active()).graph_module
    after = run_until("remove_unused", Loss(), batch(), some_active()).graph_module
    assert operators(after)["aten.copy_"] == operators(before)["aten.copy_"] == 1
    for name in ("aten.linear", "aten.layer_norm", "regate_fx.varlen_attention", "aten.cross_entropy_loss"):
        assert operators(after)[name] == operators(before)[name] > 0
    assert len(after.graph.find_nodes(op="placeholder")) == len(before.graph.find_nodes(op="placeholder"))
