"""The way to a CUDA kernel and back, with the CPU in its place: layouts, keys repeated for it, gradients summed.

Shapes: N packed rows, H heads, d width.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from explicit_attention import SCALE, Batch, Case
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from regate_fx.errors import Unsupported
from regate_fx.ops import attention_cpu, attention_cuda, attention_kernels
from regate_fx.ops.attention import varlen_attention
from regate_fx.ops.visibility import Scoring, Visibility

ALIGNED = 16


class Kernel:
    """torch's kernel as it is documented, in that it computes by row, [N, H, d]; with equal heads only, in that it is
    one of an older torch."""

    def __init__(self, batch: Batch, groups_heads: bool) -> None:
        self.groups_heads = groups_heads
        self.sees = Visibility(batch.positions, None, batch.case.causal, 0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, most: int, *rest: Any) -> Any:
        # A kernel takes a single row for a decoding step, where it expects each sample to have one.
        assert most > 1
        assert self.groups_heads or q.shape == k.shape == v.shape
        heads = [self._checked(rows) for rows in (q, k, v)]
        out, lse = attention_cpu.forward(*heads, bounds, self.sees, Scoring(SCALE), dropout_p=0.0, seed=0)
        return out[0].transpose(0, 1), lse

    def backward(self, *arguments: Any) -> Any:
        *rows, lse, bounds = arguments[:7]
        heads = [self._checked(each) for each in rows]
        grads = attention_cpu.backward(*heads, lse, bounds, self.sees, Scoring(SCALE), dropout_p=0.0, seed=0)
        return [grad[0].transpose(0, 1) for grad in grads]

    def _checked(self, rows: Tensor) -> Tensor:
        """[1, H, N, d] of rows that vector loads of 16 bytes can read."""
        assert rows.stride(2) == 1
        assert rows.data_ptr() % ALIGNED == 0
        assert all(stride * rows.element_size() % ALIGNED == 0 for stride in rows.stride()[:2])
        return rows.transpose(0, 1)[None]


@pytest.mark.parametrize("groups_heads", [True, False])
@pytest.mark.parametrize(
    "case",
    [Case(), Case(heads=(4, 4), causal=False), Case(sinks=True), Case(lengths=(1, 0, 1))],
    ids=["grouped", "one key head each", "sinks", "no sample of two rows"],
)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "odd offset"])
def test_rows_for_a_kernel(
    case: Case, groups_heads: bool, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(case, torch.float32)
    kernel = Kernel(batch, groups_heads)
    monkeypatch.setattr(attention_cuda, "torch_groups_heads", lambda: groups_heads)
    monkeypatch.setattr(attention_cuda, "_torch_forward", kernel.forward)
    monkeypatch.setattr(attention_cuda, "_torch_backward", kernel.backward)
    *leaves, sinks = batch.leaves() if case.sinks else [*batch.leaves(), None]
    facts = batch.cu_seqlens, max(case.lengths), case.causal, Scoring(SCALE, 0.0, sinks)
    with torch.no_grad():
        q, k, v = (_moved(leaf, offset) for leaf in leaves)
        out, lse = attention_cuda.forward("torch", q, k, v, *facts)
        found = attention_cuda.backward("torch", _moved(batch.grad_out, offset), q, k, v, out, lse, *facts)
    expected, expected_lse = varlen_attention(*batch.arguments([*leaves, sinks] if case.sinks else leaves))
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, batch.grad_out))


def _moved(rows: Tensor, offset: int) -> Tensor:
    """The same values in memory that begins `offset` elements later."""
    storage = rows.new_empty(rows.numel() + offset)
    return storage[offset:].view(rows.shape).copy_(rows)


def test_an_older_torch_is_refused_with_flash_attention_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "activated_flash_attention", lambda: "FA4")
    monkeypatch.setattr(attention_cuda, "torch_version", lambda: (2, 12))
    batch = Batch(Case(), torch.bfloat16)
    with pytest.raises(Unsupported, match=r"before torch 2\.13.*for a window.*restore_flash_attention_impl"):
        attention_cuda.forward("torch", *batch.leaves(), batch.cu_seqlens, 11, True, Scoring(SCALE))


def test_knows_whether_torch_groups_heads() -> None:
    takes = inspect.signature(varlen_attn).parameters
    assert attention_kernels.torch_groups_heads() == ("enable_gqa" in takes)
