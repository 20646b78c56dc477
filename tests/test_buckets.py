"""Rows rounded up to a bucket: few sizes for all masks, and the same step.

Shapes: B samples, S positions, N active positions, L the most active positions of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import check_step, observe
from small_models import MODELS, build, random_batch
from test_properties import batches
from test_traces import graphs_traced
from tiers import tiers
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend

import regate_fx
from regate_fx.errors import InvalidInput, NotGateable
from regate_fx.plan import make_plan

KINDS = tiers(sorted(MODELS), "llama", "gemma2", "bloom", "deepseek_v3")


@given(
    active=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5),
    multiple=st.integers(2, 40),
)
def test_bucket_of_a_plan(active: list[list[bool]], multiple: int) -> None:
    mask = torch.tensor(active)
    mask[0, 0] = True
    plan = make_plan(mask)
    bucket = plan.in_bucket(multiple)
    N, (B, L) = plan.active, plan.slot_rows.shape
    filling = bucket.active - N
    assert bucket.active % multiple == 0 and 0 <= filling < multiple
    assert bucket.slot_rows.shape[1] % multiple == 0 and 0 <= bucket.slot_rows.shape[1] - L < multiple
    assert torch.equal(bucket.rows[:N], plan.rows) and bool((bucket.rows[N:] == -1).all())
    assert torch.equal(bucket.row_of, plan.row_of)
    assert torch.equal(bucket.slot_rows[:, :L], plan.slot_rows) and bool(
        (bucket.slot_rows[:, L:] == -1).all()
    )
    # The two maps between rows and slots are still each other's inverse.
    assert torch.equal(bucket.slot_rows.flatten()[bucket.row_slots[:N]], torch.arange(N))
    assert bool((bucket.row_slots[N:] == -1).all())
    # What fills it is a sample of its own, of a length that the kernels are told to expect.
    assert torch.equal(bucket.cu_seqlens[: B + 1], plan.cu_seqlens)
    assert int(bucket.cu_seqlens.diff()[-1]) == filling < bucket.slot_rows.shape[1]


@pytest.mark.parametrize("name", KINDS)
def test_step_is_the_same(name: str, generator: torch.Generator) -> None:
    model = build(name)
    gated = regate_fx.compile(model, backend="eager", bucket=16)
    for B, S, share in ((3, 11, 0.5), (2, 17, 0.1), (4, 9, 1.0)):
        batch = random_batch(generator, B, S, share=share, padding="right" if B % 2 else "left")
        check_step(gated, model, MODELS[name], batch, f"{name} {B} x {S}")


@given(steps=st.lists(batches(), min_size=3, max_size=3), bucket=st.integers(2, 33), seed=st.integers(0, 9))
def test_any_bucket(steps: list[dict[str, Any]], bucket: int, seed: int) -> None:
    torch._dynamo.reset()
    model = build("gemma2", seed=seed)
    gated = regate_fx.compile(model, backend="eager", validate=False, bucket=bucket, keep_logits=True)
    generator = torch.Generator().manual_seed(seed)
    for step in steps:
        batch = random_batch(generator, **step)
        check_step(gated, model, MODELS["gemma2"], batch, f"{step}, bucket {bucket}", with_logits=True)


@pytest.mark.parametrize(
    "options", [{"scope": "layers"}, {"fused_loss": True}, {"backend": "inductor"}], ids=str
)
def test_ways_to_compile(options: dict[str, Any], generator: torch.Generator) -> None:
    model = build("llama")
    gated = regate_fx.compile(model, **{"backend": "aot_eager"} | options, bucket=8)
    for B, S in ((3, 11), (2, 17)):
        check_step(gated, model, MODELS["llama"], random_batch(generator, B, S, share=0.4), f"{options}")


def test_checkpointed_step_is_the_same(generator: torch.Generator) -> None:
    model = build("llama")
    model.gradient_checkpointing_enable()
    gated = regate_fx.compile(model, backend="aot_eager", bucket=8)
    check_step(gated, model, MODELS["llama"], random_batch(generator, 3, 11))


def _noting(shapes: set[tuple[int, ...]]) -> Callable[..., Any]:
    """A backend that notes the shapes that a graph was called with."""

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        compiled = lookup_backend("eager")(gm, example_inputs)

        def run(*args: Any) -> Any:
            shapes.add(tuple(size for arg in args if isinstance(arg, Tensor) for size in arg.shape))
            return compiled(*args)

        return run

    return backend


def test_few_sizes_serve_all_masks(generator: torch.Generator) -> None:
    rows, bucketed = set[tuple[int, ...]](), set[tuple[int, ...]]()
    plain = regate_fx.compile(build("llama"), backend=_noting(rows), validate=False)
    gated = regate_fx.compile(build("llama"), backend=_noting(bucketed), validate=False, bucket=16)
    drawn = [random_batch(generator, 4, 24, share=0.2 + 0.02 * step, padding=None) for step in range(30)]
    for batch in drawn:
        observe(plain, batch)
        observe(gated, batch)
    assert len(rows) > 20
    assert len(bucketed) <= 8  # of 96 rows and 24 of a sample, in steps of 16: at most 6 times 2


def test_no_retrace(generator: torch.Generator) -> None:
    gated = regate_fx.compile(build("llama"), backend="eager", bucket=8)
    observe(gated, random_batch(generator, 3, 12))
    after_first = graphs_traced()
    for B, S in ((2, 9), (5, 30), (3, 17), (4, 8)):
        observe(gated, random_batch(generator, B, S, share=0.6))
    assert graphs_traced() == after_first


def test_sum_over_rows_is_refused(generator: torch.Generator) -> None:
    """A router's auxiliary loss would take the rows that fill the bucket for tokens."""
    gated = regate_fx.compile(build("mixtral", output_router_logits=True), backend="eager", bucket=8)
    with pytest.raises(
        NotGateable, match=r"counts rows, some of which are no token's but fill a bucket \(bucket="
    ):
        observe(gated, random_batch(generator, 3, 11, padding=None))


def test_report_says_what_it_costs(generator: torch.Generator) -> None:
    gated = regate_fx.compile(build("llama"), backend="eager", bucket=16, validate=False)
    batch = random_batch(generator, 3, 11)
    observe(gated, batch)
    N = int(batch.active.sum())
    filling = -N % 16
    report = gated.report.to_dict()["bucket"]
    assert report == {"multiple": 16, "active": N, "filling": filling, "share": filling / (N + filling)}
    printed = " ".join(str(gated.report).split())
    assert (
        f"multiples of 16: {filling / (N + filling):.1%} of the rows computed so far are no token's"
        in printed
    )


@pytest.mark.parametrize("bucket", [0, 1, -8, 2.5, True, "128"])
def test_wrong_bucket(bucket: Any) -> None:
    with pytest.raises(InvalidInput, match=r"bucket.*from 2 on"):
        regate_fx.compile(build("llama"), bucket=bucket)
