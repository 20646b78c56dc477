"""FlexAttention as it is used on CUDA, run on the CPU: results and gradients, and which blocks it is told to visit.

torch refuses to train with it on the CPU, where the plain operators it stands for have a gradient all the same.

Shapes: N packed rows, n blocks of rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.functional as F
from explicit_attention import SCALE, Batch, Case, assert_as_good_as
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import check_step
from small_models import MODELS, build, random_batch
from test_ops_attention import CASES
from tiers import tiers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import regate_fx
from regate_fx.ops import attention_cpu, attention_flex
from regate_fx.ops.attention_flex import BLOCK
from regate_fx.ops.visibility import Scoring, Visibility, grad_of_sinks


@pytest.fixture(autouse=True)
def _trains_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention_flex, "_kernel", lambda *_: attention_flex.attend)


def by_flex(batch: Batch) -> list[Tensor]:
    """out and the gradients of q, k, v and sinks."""
    case = batch.case
    given = (
        batch.cu_seqlens,
        Visibility(batch.positions, batch.mask, case.causal, case.window),
        Scoring(SCALE, case.softcap, batch.sinks),
    )
    out, lse = attention_flex.forward(*batch.qkv, *given)
    found = [out, *attention_flex.backward(batch.grad_out, *batch.qkv, *given)]
    return found if batch.sinks is None else [*found, grad_of_sinks(batch.grad_out, out, lse, batch.sinks)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_exact_as_the_plain_computation(case: Case) -> None:
    batch = Batch(case, torch.float32)
    found = by_flex(batch)
    assert_as_good_as(found, batch.explicit(torch.float32), batch.explicit(torch.float64))
    assert all(x.transpose(1, 2).is_contiguous() for x in found[:4])


@st.composite
def attentions(draw: st.DrawFn) -> dict[str, Any]:
    lengths = draw(st.lists(st.integers(0, 400), min_size=1, max_size=5).filter(any))
    causal = draw(st.booleans())
    window = draw(st.sampled_from([0, 1, 7, 60, 200])) if causal else 0
    return {"lengths": lengths, "causal": causal, "window": window, "seed": draw(st.integers(0, 99))}


@settings(max_examples=25)
@given(attention=attentions(), whole=st.booleans())
def test_blocks_are_those_with_something_to_see(attention: dict[str, Any], whole: bool) -> None:
    lengths, causal, window = attention["lengths"], attention["causal"], attention["window"]
    generator = torch.Generator().manual_seed(attention["seed"])
    drawn = [torch.randperm(420, generator=generator)[:length].sort().values for length in lengths]
    positions, rows = torch.cat(drawn), torch.arange(sum(lengths))
    samples = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    visible = samples[:, None] == samples
    if causal:
        visible &= rows <= rows[:, None]
    if window:
        visible &= positions > positions[:, None] - window
    seen = attention_flex.visible_rows(rows, samples, bounds, positions, causal, window)
    assert torch.equal((rows >= seen.first[:, None]) & (rows <= seen.last[:, None]), visible)
    mask = attention_flex.blocks_of(seen, whole, lambda *_: visible)
    some = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    # A block is full if all rows that it really has are seen.
    assert not bool((some & full).any())
    assert not bool((by_block(visible, False).any(-1) & ~some & ~full).any())
    assert not bool((full & ~by_block(visible, True).all(-1)).any())
    assert whole or not bool(full.any())
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices).T, some)


def by_block(pairs: Tensor, filler: bool) -> Tensor:
    """bool [N, N] as [n, n, BLOCK * BLOCK]."""
    fill = -len(pairs) % BLOCK
    padded = F.pad(pairs, (0, fill, 0, fill), value=filler)
    n = len(padded) // BLOCK
    return padded.view(n, BLOCK, n, BLOCK).transpose(1, 2).flatten(2)


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """bool [n, n] of the first `counts` entries of each row of indices, none of which is there twice."""
    n = counts.shape[-1]
    found = torch.zeros(n, n, dtype=torch.long)
    for row in range(n):
        chosen = indices[0, 0, row, : counts[0, 0, row]].long()
        found[row].index_add_(0, chosen, torch.ones_like(chosen))
    assert int(found.max()) <= 1
    return found.bool()


@pytest.mark.parametrize(
    "case",
    [Case(window=4), Case(causal=False, mask="bool"), Case(widths=(8, 16)), Case(softcap=0.5, sinks=True)],
    ids=str,
)
def test_one_trace_serves_all_batches(case: Case) -> None:
    """Compiled as on a device; what it is compiled to is not tried here."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention_flex.attend, dynamic=True, fullgraph=True, backend=counter)
    counts = []
    for lengths in ((200, 0, 1, 130), (50, 90), (300, 2, 2)):
        batch = long_batch(case, lengths)
        leaves = batch.leaves()
        sinks = leaves[3] if case.sinks else None
        sees = (batch.positions, batch.mask, case.causal, case.window)
        given = (*leaves[:3], batch.cu_seqlens, *sees, SCALE, str(case.softcap), sinks)
        found, _ = compiled(*given)
        wanted, _ = attention_flex.attend(*given)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), leaves),
            torch.autograd.grad(wanted.square().sum(), leaves),
        )
        counts.append(counter.frame_count)
    assert counts[1:] == counts[1:2] * 2


def long_batch(case: Case, lengths: tuple[int, ...]) -> Batch:
    """A case with more rows than one block has."""
    batch = Batch(case, torch.float32)
    (Hq, Hk), (d, dv), N = case.heads, case.widths, sum(lengths)
    batch.qkv = [torch.randn(1, heads, N, width) for heads, width in ((Hq, d), (Hk, d), (Hk, dv))]
    batch.cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    batch.positions = torch.cat([torch.arange(length) for length in lengths])
    if batch.mask is not None:
        batch.mask = torch.rand(len(lengths), 1, max(lengths), max(lengths)) > 0.3
    return batch


STEPS = [
    (name, way) for name in ("mistral", "gemma3", "deepseek_v3", "falcon") for way in ("plain", "compiled")
]


@pytest.mark.parametrize("case", tiers(STEPS, ("mistral", "compiled")))
def test_a_gated_step(case: tuple[str, str], generator: torch.Generator, monkeypatch: Any) -> None:
    name, way = case

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, sees: Visibility, scoring: Scoring, *_: Any
    ) -> Any:
        out, lse = attention_flex.forward(q, k, v, cu, sees, scoring)
        return out, lse.t().contiguous().t()  # as the kernel leaves it on the CPU

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu: Tensor, sees: Visibility,
        scoring: Scoring, *_: Any,
    ) -> Any:  # fmt: skip
        return attention_flex.backward(grad, q, k, v, cu, sees, scoring)

    monkeypatch.setattr(attention_cpu, "forward", forward)
    monkeypatch.setattr(attention_cpu, "backward", backward)
    if way == "compiled":  # in the middle of another compiled graph, as on a device
        kernel = torch.compile(attention_flex.attend, dynamic=True, fullgraph=True, backend="aot_eager")
        monkeypatch.setattr(attention_flex, "_kernel", lambda *_: kernel)
    model = build(name)
    options: dict[str, Any] = (
        {"backend": "inductor"} if way == "compiled" else {"backend": "aot_eager", "bucket": 16}
    )
    gated = regate_fx.compile(model, validate=False, **options)
    for B, side in ((3, "right"), (2, "left")):
        check_step(gated, model, MODELS[name], random_batch(generator, B, 13, padding=side), name)
