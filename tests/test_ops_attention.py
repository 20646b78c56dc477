"""`regate_fx::varlen_attention` against an explicit softmax over all N x N pairs of rows.

Shapes: N packed rows, S positions, Hq query heads, Hk key heads, d width of a query and key, dv of a value.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from explicit_attention import SCALE, Batch, Case, S, assert_as_good_as
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import attention

from regate_fx.errors import InvalidInput, Unsupported
from regate_fx.ops import attention_explicit, attention_flash_cpu, attention_kernels
from regate_fx.ops.attention import supported, varlen_attention, varlen_attention_backward
from regate_fx.ops.attention_kernels import choose_kernel, kernel_name

MASKS = [
    Case(causal=False, mask=kind, mask_shape=(per_sample, per_head))
    for kind in ("bool", "float")
    for per_sample in (False, True)
    for per_head in (False, True)
]
SCORED = [
    Case(softcap=0.5),
    Case(sinks=True),
    Case(sinks=True, window=4, heads=(4, 4)),
    Case(sinks=True, widths=(8, 5), causal=False, heads=(4, 1)),
    replace(MASKS[3], sinks=True),
    replace(MASKS[7], softcap=0.5, sinks=True),
]
CASES = [
    Case(),
    Case(causal=False),
    Case(lengths=(S, S, S)),
    Case(lengths=(1,)),
    Case(lengths=(3, 3, 0, 3, 5, 5)),
    Case(heads=(4, 4)),
    Case(heads=(4, 1)),
    Case(widths=(8, 5)),
    Case(widths=(6, 16), causal=False),
    Case(window=1),
    Case(window=4),
    Case(window=4, causal=False, heads=(3, 3)),
    Case(window=5, widths=(12, 8)),
    *MASKS,
    *SCORED,
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_exact_as_the_plain_computation(case: Case, dtype: torch.dtype) -> None:
    batch = Batch(case, dtype)
    assert_as_good_as(batch.op(), batch.explicit(dtype), batch.explicit(torch.float64))


@pytest.mark.parametrize("case", [case for case in CASES if case.heads[0] != case.heads[1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_whose_kernel_does_not_group_heads(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_flash_cpu, "torch_version", lambda: (2, 11))
    test_is_as_exact_as_the_plain_computation(case, dtype)


@given(
    lengths=st.lists(st.integers(0, S), min_size=1, max_size=5).filter(any),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (3, 1)]),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    pairs=st.one_of(
        st.tuples(st.booleans(), st.integers(0, S + 1), st.none()),
        st.tuples(st.just(False), st.just(0), st.sampled_from(["bool", "float"])),
    ),
    mask_shape=st.tuples(st.booleans(), st.booleans()),
    scoring=st.tuples(st.sampled_from([0.0, 0.7]), st.booleans()),
    seed=st.integers(0, 999),
)
@settings(max_examples=80)
def test_float64_is_exact_for_random_batches(
    lengths, heads, widths, pairs, mask_shape, scoring, seed
) -> None:
    batch = Batch(Case(tuple(lengths), heads, widths, *pairs, mask_shape, *scoring), torch.float64, seed)
    for ours, exact in zip(batch.op(), batch.explicit(torch.float64), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case", [Case(), Case(window=3), Case(widths=(4, 3)), MASKS[3], MASKS[7], *SCORED], ids=str
)
def test_gradcheck(case: Case) -> None:
    batch = Batch(replace(case, lengths=(3, 0, 5)), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: varlen_attention(*batch.arguments(leaves))[0], batch.leaves()
    )


@pytest.mark.parametrize("case", [Case(), Case(window=3), MASKS[0]], ids=str)
def test_any_strides(case: Case) -> None:
    batch = Batch(case, torch.float32)
    expected = batch.op()
    plain = batch.qkv
    for layout in (
        lambda t: t.contiguous(),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.stack([t, -t], -1)[..., 0],
        lambda t: torch.cat([t, t], 2)[:, :, t.shape[2] :],
    ):
        batch.qkv = [layout(t) for t in plain]
        for ours, same in zip(batch.op(), expected, strict=True):
            torch.testing.assert_close(ours, same, rtol=0, atol=0)
            assert ours.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_mask_beside_narrower_queries(dtype: torch.dtype) -> None:
    batch = Batch(MASKS[-1], dtype)
    batch.mask = batch.mask.float()
    assert_as_good_as(batch.op(), batch.explicit(dtype), batch.explicit(torch.float64))


@pytest.mark.parametrize("value", [-1e4, 1e4])
@pytest.mark.parametrize("sinks", [False, True])
def test_masks_far_from_zero(value: float, sinks: bool) -> None:
    """They cancel out in the weights, which a backward from rounded logsumexps would not find."""
    batch = Batch(replace(MASKS[4], sinks=sinks), torch.float32)
    batch.mask += value
    found, plain, exact = batch.op(), batch.explicit(torch.float32), batch.explicit(torch.float64)
    assert_as_good_as(found, plain, exact)


@pytest.mark.parametrize("number", [torch.finfo(torch.float32).min, float("-inf")])
def test_query_masked_everywhere_gives_all_to_its_sink(number: float) -> None:
    batch = Batch(Case(causal=False, mask="float", sinks=True), torch.float32)
    batch.mask[..., batch.positions[2], :] = number
    ours, plain = batch.op(), batch.explicit(torch.float32)
    torch.testing.assert_close(ours, plain)
    assert ours[0][0, :, 2].count_nonzero() == 0


@pytest.mark.parametrize("softcap", [0.0, 0.5])
def test_query_that_sees_neither_key_nor_sink_gets_nothing(softcap: float) -> None:
    batch = Batch(Case(causal=False, mask="float", sinks=True, softcap=softcap), torch.float32)
    batch.mask[..., batch.positions[2], :] = batch.sinks[1] = float("-inf")
    out, *gradients = batch.op()
    assert out[0, 1, 2].count_nonzero() == 0
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[3][1] == 0


def test_query_masked_everywhere_by_a_finite_number_averages_its_keys() -> None:
    batch = Batch(Case(causal=False, mask="float"), torch.float32)
    batch.mask[..., batch.positions[2], :] = torch.finfo(torch.float32).min
    ours, plain = batch.op(), batch.explicit(torch.float32)
    torch.testing.assert_close(ours, plain)
    batch.mask[..., batch.positions[2], :] = float("-inf")
    for dropout in ({}, {"dropout_p": 0.5, "seed": 1}):
        out, *gradients = batch.op(**dropout)
        assert out[0, :, 2].count_nonzero() == 0
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_window_is_measured_in_original_positions() -> None:
    batch = Batch(Case(lengths=(5,)), torch.float32)
    span = int(batch.positions[-1] - batch.positions[0])
    void, shortest = (replace(batch.case, window=w) for w in (span + 1, span))
    unlimited = batch.op()
    batch.case = void
    assert all(torch.equal(a, b) for a, b in zip(batch.op(), unlimited, strict=True))
    batch.case = shortest
    assert not torch.equal(batch.op()[0], unlimited[0])


@pytest.mark.parametrize("case", [Case(), Case(sinks=True)], ids=str)
def test_logsumexp_is_given_and_has_no_gradient(case: Case) -> None:
    batch = Batch(case, torch.float64)
    leaves = batch.leaves()
    _, lse = varlen_attention(*batch.arguments(leaves))
    wanted = batch.scores(*leaves[:2]).logsumexp(-1)
    if case.sinks:
        wanted = torch.logaddexp(wanted, leaves[3][:, None])
    torch.testing.assert_close(lse, wanted.detach())
    assert not lse.requires_grad


def drawn_factors(batch: Batch, **dropout: float) -> Tensor:
    """Read what dropout multiplied the weights by: with one-hot values the output is the dropped weights."""
    q, k, _ = batch.qkv
    values = torch.eye(q.shape[2], dtype=q.dtype).expand(1, k.shape[1], -1, -1)
    sinks = [] if batch.sinks is None else [batch.sinks]
    dropped = varlen_attention(*batch.arguments([q, k, values, *sinks], **dropout))[0][0]
    weights = batch.weights(q, k, *sinks)
    return torch.where(weights > 0, dropped / weights, 0.0)


@pytest.mark.parametrize("scores_at_once", [1 << 22, 40])
@pytest.mark.parametrize(
    "case", [Case(), Case(window=4), Case(widths=(8, 5)), MASKS[3], Case(softcap=0.5, sinks=True)], ids=str
)
def test_dropout_gradient_is_that_of_the_weights_that_were_drawn(
    case: Case, scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_explicit, "_CHUNK_SCORES", scores_at_once)
    batch = Batch(case, torch.float64)
    if case.mask:
        batch.mask |= torch.eye(S, dtype=torch.bool)
    factors = drawn_factors(batch, dropout_p=0.3, seed=5)
    drawn = batch.op(dropout_p=0.3, seed=5)
    for ours, exact in zip(drawn, batch.explicit(torch.float64, factors), strict=True):
        torch.testing.assert_close(ours, exact)
    assert all(torch.equal(a, b) for a, b in zip(batch.op(dropout_p=0.3, seed=5), drawn, strict=True))
    assert not torch.equal(batch.op(dropout_p=0.3, seed=6)[0], drawn[0])


def test_dropout_keeps_its_share_of_the_weights() -> None:
    batch = Batch(Case(lengths=(S,) * 20, causal=False), torch.float64)
    p, pairs = 0.3, 20 * S * S * 4
    factors = drawn_factors(batch, dropout_p=p, seed=1)
    kept = factors > 0
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - p)))
    deviation = (pairs * p * (1 - p)) ** 0.5
    assert abs(int(kept.sum()) - pairs * (1 - p)) < 5 * deviation
    of_head = kept.sum((1, 2))
    assert ((of_head - pairs / 4 * (1 - p)).abs() < 5 * deviation / 2).all()
    assert batch.op(dropout_p=1.0, seed=1)[0].count_nonzero() == 0


def test_dropout_does_not_touch_the_global_generator() -> None:
    batch = Batch(Case(), torch.float32)
    state = torch.get_rng_state()
    batch.op(dropout_p=0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


OPCHECKED = [
    Case(),
    Case(lengths=(S,)),
    Case(window=4, widths=(8, 5)),
    Case(lengths=(0, 0)),
    MASKS[0],
    MASKS[7],
    SCORED[1],
    SCORED[-1],
]


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(case: Case, dtype: torch.dtype) -> None:
    batch = Batch(case, dtype)
    torch.library.opcheck(varlen_attention, batch.arguments(batch.leaves()))
    plain = [leaf.detach() for leaf in batch.leaves()]
    torch.library.opcheck(varlen_attention, batch.arguments(plain, dropout_p=0.2, seed=3))


@pytest.mark.parametrize(
    "case", [Case(lengths=(0, 3, S)), Case(window=4, widths=(8, 5)), MASKS[7], SCORED[-1]], ids=str
)
@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.2, "seed": 3}], ids=["kept", "dropped"])
def test_opcheck_of_the_backward(case: Case, dropout: dict[str, float]) -> None:
    batch = Batch(case, torch.float32)
    arguments = batch.arguments([leaf.detach() for leaf in batch.leaves()], **dropout)
    results = varlen_attention(*arguments)
    given = (batch.grad_out, *arguments[:3], *results, *arguments[3:])
    torch.library.opcheck(varlen_attention_backward, given)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", [Case(), MASKS[2], SCORED[1]], ids=str)
def test_compiles_once_for_every_number_of_rows(backend: str, case: Case) -> None:
    def step(q, k, v, *rest):
        *sinks, cu_seqlens, slots, positions, mask = rest
        limits = (case.causal, case.window, SCALE, 0.0, None, "auto", case.softcap, *sinks)
        out, _ = varlen_attention(q * 2, k + 1, v, cu_seqlens, slots.shape[0], positions, mask, *limits)
        return out.transpose(1, 2).flatten(2) * 3

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for lengths in ((4, 0, 3), (2, 5), (S, S, S, S), (9, 2, 2, 0, 6)):
        batch = Batch(replace(case, lengths=lengths), torch.float32)
        leaves, slots = batch.leaves(), torch.zeros(max(lengths))
        for leaf in leaves[:3]:
            torch._dynamo.mark_dynamic(leaf, 2)
        for tensor in (batch.cu_seqlens, slots, batch.positions):
            torch._dynamo.mark_dynamic(tensor, 0)
        if batch.mask is not None:
            torch._dynamo.mark_dynamic(batch.mask, 0)
        operands = (*leaves, batch.cu_seqlens, slots, batch.positions, batch.mask)
        results = []
        for run in (compiled, step):
            out = run(*operands)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


def test_a_second_derivative_is_refused() -> None:
    batch = Batch(Case(), torch.float32)
    leaves = batch.leaves()
    out, _ = varlen_attention(*batch.arguments(leaves))
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_refuses_what_it_cannot_mean() -> None:
    batch = Batch(Case(heads=(4, 3)), torch.float32)
    with pytest.raises(InvalidInput, match="4 query heads"):
        batch.op()
    batch = Batch(Case(sinks=True), torch.float32)
    batch.sinks = batch.sinks[:3]
    with pytest.raises(InvalidInput, match=r"sinks.*\[3\].*4 query heads"):
        batch.op()
    batch = Batch(MASKS[4], torch.float32)
    batch.mask.requires_grad_()
    with pytest.raises(Unsupported, match="mask"):
        batch.op()
    batch = Batch(replace(MASKS[0], causal=True), torch.float32)
    with pytest.raises(InvalidInput, match="mask"):
        batch.op()
    with pytest.raises(InvalidInput, match="seed"):
        Batch(Case(), torch.float32).op(dropout_p=0.1)


PLAIN = {"causal": True, "window": 0, "mask": None, "dropout_p": 0.0, "d": 64, "dv": 64}


@pytest.mark.parametrize(
    ("device", "dtype", "change", "words"),
    [
        ("cuda", torch.bfloat16, {}, None),
        ("cuda", torch.float16, {"causal": False, "d": 256, "dv": 256}, None),
        ("cuda", torch.float32, {}, None),
        ("cuda", torch.float64, {}, "float64"),
        ("cuda", torch.bfloat16, {"window": 4}, None),
        ("cuda", torch.bfloat16, {"mask": True}, None),
        ("cuda", torch.bfloat16, {"dropout_p": 0.1}, "dropout"),
        ("cuda", torch.bfloat16, {"dv": 32}, None),
        ("cuda", torch.bfloat16, {"d": 264, "dv": 264}, "264"),
        ("cuda", torch.bfloat16, {"d": 20, "dv": 20}, None),
        ("cuda", torch.bfloat16, {"d": 8, "dv": 24}, "8 and 24"),
        ("cuda", torch.bfloat16, {"capability": (7, 5)}, "7.5"),
        ("cpu", torch.float64, {"window": 4, "mask": True, "dropout_p": 0.1, "dv": 20}, None),
        ("cpu", torch.int64, {}, "int64"),
        ("mps", torch.float32, {}, "mps"),
    ],
)
def test_supported_says_why_not(device: str, dtype: torch.dtype, change: dict, words: str | None) -> None:
    reason = supported(device, dtype, **{"capability": (9, 0), **PLAIN, **change})
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    ("dtype", "change", "name"),
    [
        (torch.bfloat16, {}, "torch.nn.attention.varlen"),
        (torch.float32, {}, "FlexAttention"),
        (torch.bfloat16, {"window": 4}, "FlexAttention"),
        (torch.bfloat16, {"mask": True}, "FlexAttention"),
        (torch.bfloat16, {"d": 192}, "FlexAttention"),
        (torch.bfloat16, {"softcap": 50.0}, "FlexAttention"),
    ],
)
def test_names_the_cuda_kernel(
    dtype: torch.dtype, change: dict, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "flash_attn_installed", lambda: False)
    facts = {"window": 0, "mask": None, "d": 64, "dv": 64} | change
    assert kernel_name("auto", dtype, **facts) == name


@pytest.mark.parametrize(
    ("prefer", "installed", "change", "kernel"),
    [
        ("auto", True, {}, "flash_attn"),
        ("flash_attn", True, {}, "flash_attn"),
        ("torch", True, {}, "torch"),
        ("flex", True, {}, "flex"),
        ("flex", True, {"d": 8, "dv": 8}, "flash_attn"),
        ("auto", False, {}, "torch"),
        ("flex", False, {}, "flex"),
        ("torch", True, {"window": 4}, "flex"),
        ("auto", True, {"softcap": 50.0}, "flash_attn"),
        ("torch", True, {"softcap": 50.0}, "flash_attn"),
        ("torch", False, {"softcap": 50.0}, "flex"),
        ("flex", True, {"softcap": 50.0}, "flex"),
        ("flash_attn", True, {"dtype": torch.float32}, "flex"),
        ("auto", True, {"dtype": torch.float64}, None),
    ],
)
def test_prefers_a_cuda_kernel_where_it_can_compute(
    prefer: str, installed: bool, change: dict, kernel: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "flash_attn_installed", lambda: installed)
    facts = {"dtype": torch.bfloat16, "window": 0, "mask": None, "d": 64, "dv": 64} | change
    assert choose_kernel(prefer, **facts) == kernel


@pytest.fixture
def activated() -> Iterator[None]:
    """Another flash attention in the place of torch's."""
    attention.register_flash_attention_impl("Other", register_fn=mock.Mock)
    attention.activate_flash_attention_impl("Other")
    yield
    attention.restore_flash_attention_impl()


@pytest.mark.usefixtures("activated")
@pytest.mark.parametrize(
    ("prefer", "change", "name"),
    [
        ("auto", {}, "torch.nn.attention.varlen (Other)"),
        ("torch", {}, "torch.nn.attention.varlen (Other)"),
        ("flash_attn", {}, "flash_attn"),
        ("auto", {"softcap": 50.0}, "flash_attn"),
        ("auto", {"window": 4}, "FlexAttention"),
    ],
)
def test_takes_the_flash_attention_that_was_activated_in_torch(
    prefer: str, change: dict, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "flash_attn_installed", lambda: True)
    facts = {"dtype": torch.bfloat16, "window": 0, "mask": None, "d": 64, "dv": 64} | change
    assert kernel_name(prefer, **facts) == name


@pytest.mark.parametrize(
    ("module", "found"), [("flash_attn_interface.py", True), ("cute/interface.py", False), (None, False)]
)
def test_finds_flash_attn_by_the_interface_that_it_needs(
    module: str | None, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 4 installs nothing but `flash_attn.cute`."""
    if module is not None:
        (tmp_path / "flash_attn" / module).parent.mkdir(parents=True)
        (tmp_path / "flash_attn" / module).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path] if module else [])
    assert attention_kernels.flash_attn_installed.__wrapped__() == found


@pytest.mark.cuda
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("scoring", [{}, {"sinks": True}, {"softcap": 0.5}], ids=str)
def test_cuda_is_as_exact_as_cpu(causal: bool, heads: tuple[int, int], scoring: dict) -> None:
    batch = Batch(Case(causal=causal, heads=heads, widths=(64, 64), **scoring), torch.bfloat16)
    on_cpu, golden = batch.op(), batch.explicit(torch.float64)
    assert_as_good_as([t.cpu() for t in batch.to("cuda").op()], on_cpu, golden)


@pytest.mark.cuda
@pytest.mark.parametrize("lengths", [(1, 0, 1), (1, 1)])
def test_single_rows_on_cuda(lengths: tuple[int, ...]) -> None:
    batch = Batch(Case(lengths=lengths, widths=(64, 64)), torch.bfloat16)
    on_cpu, golden = batch.op(), batch.explicit(torch.float64)
    assert_as_good_as([t.cpu() for t in batch.to("cuda").op()], on_cpu, golden)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "case",
    [
        *(case for case in CASES if min(case.widths) > 4),
        *(Case(window=4, heads=(heads, 2), lengths=(S,) * samples) for heads in (6, 8) for samples in (4, 6)),
    ],
    ids=str,
)
def test_flex_on_cuda_is_as_exact_as_the_plain_computation(case: Case) -> None:
    batch = Batch(replace(case, widths=tuple(4 * width for width in case.widths)), torch.float32)
    plain, golden = batch.explicit(torch.float32), batch.explicit(torch.float64)
    assert_as_good_as([t.cpu() for t in batch.to("cuda").op()], plain, golden)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("name", "module"), [("FA3", "flash_attn_interface"), ("FA4", "flash_attn.cute.interface")]
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_an_activated_flash_attention_is_as_exact_as_cpu(
    name: str, module: str, heads: tuple[int, int]
) -> None:
    pytest.importorskip(module)
    batch = Batch(Case(heads=heads, widths=(64, 64)), torch.bfloat16)
    on_cpu, golden = batch.op(), batch.explicit(torch.float64)
    attention.activate_flash_attention_impl(name)
    try:
        found = [t.cpu() for t in batch.to("cuda").op()]
    finally:
        attention.restore_flash_attention_impl()
    assert_as_good_as(found, on_cpu, golden)
