"""Gated steps on a CUDA device: what the oracles say, without waiting for the device, without another trace.

Each test compares with the same model in float64 on the CPU, and allows what the untouched model on the device is off.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from comparison import Comparison, check_no_bit_differs, compare
from image_oracle import run_key_masked as run_key_masked_images
from oracles import _run_alone, golden, observe, run_key_masked
from small_models import MODELS, VOCABULARY, Batch, build, random_batch
from small_vlms import VLMS, build_vlm, image_batch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import regate_fx
from regate_fx.ops.attention_kernels import flash_attn_installed
from regate_fx.runtime import DualCycle, ReGate, label_table

pytestmark = pytest.mark.cuda

BF16, FP32 = torch.bfloat16, torch.float32


def moved(value: Any, device: str) -> Any:
    """A batch or an outcome with all its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **changed)
    return value


def check_on_cuda(gated: nn.Module, on_cuda: nn.Module, on_cpu: nn.Module, name: str, batch: Batch) -> None:
    """As `oracles.check_step`, with everything but the golden run on the device."""
    small, there = MODELS[name], moved(batch, "cuda")
    seen = moved(observe(gated, there), "cpu")
    assert seen.token_loss.dtype == torch.float32
    reference = golden(on_cpu, small, batch)
    with torch.device("cuda"):
        baseline = moved(run_key_masked(on_cuda, small, there), "cpu")
    comparison = compare(seen, baseline, reference, batch.active)
    if not comparison.ok:
        with torch.device("cuda"):
            alone = moved(_run_alone(on_cuda, small, there), "cpu")
        own = compare(alone, alone, golden(on_cpu, small, batch, _run_alone), batch.active)
        comparison = comparison.with_rounding_of(own)
    within_a_unit(comparison, next(on_cuda.parameters()).dtype).check(name)


def within_a_unit(comparison: Comparison, dtype: torch.dtype) -> Comparison:
    """Allowing one unit in the last place of `dtype`: a single number of the untouched model may be right by luck."""
    half = torch.finfo(dtype).eps / 2
    return Comparison(
        [replace(found, baseline=max(found.baseline, half * found.size)) for found in comparison.deviations],
        list(comparison.mismatches),
    )


def pair(name: str, dtype: torch.dtype, **overrides: Any) -> tuple[nn.Module, nn.Module]:
    """The same weights on the device and on the CPU."""
    on_cpu = build(name, **overrides).to(dtype)
    return copy.deepcopy(on_cpu).cuda(), on_cpu


NAMES = ["llama", "mistral", "gpt2", "bloom", "gemma2", "gpt_neox", "phi", "qwen3"]


# Experts in float32 have no kernel on a device, and a fallback that older versions of transformers cannot compile.
# Scores of DeepSeek's are so close in bfloat16 that rounding chooses among them.
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in NAMES for dtype in (BF16, FP32)] + [("mixtral", BF16)]
)
def test_a_step_is_that_of_the_oracle(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    on_cuda, on_cpu = pair(name, dtype)
    gated = regate_fx.compile(on_cuda, backend="aot_eager")
    for padding in ("right", "left"):
        check_on_cuda(gated, on_cuda, on_cpu, name, random_batch(generator, 4, 24, padding=padding))
    assert {layer.kind for layer in gated.report.layers} <= {"varlen", "compact"}
    assert gated.report.validation == "validated against the untouched model and the dense reference"


@pytest.mark.parametrize(("name", "dtype"), [("llama", BF16), ("gemma2", BF16), ("gpt2", FP32)])
def test_inductor(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    on_cuda, on_cpu = pair(name, dtype)
    gated = regate_fx.compile(on_cuda, backend="inductor")
    for B, S in ((4, 24), (3, 40)):
        check_on_cuda(gated, on_cuda, on_cpu, name, random_batch(generator, B, S))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_pictures(name: str, generator: torch.Generator) -> None:
    on_cpu = build_vlm(name).to(BF16)
    on_cuda = copy.deepcopy(on_cpu).cuda()
    gated = regate_fx.compile(on_cuda, backend="aot_eager")
    batch = image_batch(name, generator, (1, 2), padding="right", share=0.6, seen=0.6)
    images = {key: v.to(BF16) if v.is_floating_point() else v for key, v in batch.images.items()}
    batch = replace(batch, images=images)
    there = moved(batch, "cuda")
    seen = moved(observe(gated, there), "cpu")
    with torch.device("cuda"):
        baseline = moved(run_key_masked_images(on_cuda, VLMS[name], there), "cpu")
    reference = golden(on_cpu, VLMS[name], batch, run_key_masked_images)
    within_a_unit(compare(seen, baseline, reference, batch.active), BF16).check(name)


def test_llama_goes_by_the_kernel_for_packed_rows(generator: torch.Generator) -> None:
    on_cuda, _ = pair("llama", BF16)
    gated = regate_fx.compile(on_cuda, backend="eager")
    observe(gated, moved(random_batch(generator, 3, 16), "cuda"))
    assert {layer.kind for layer in gated.report.layers} == {"varlen"}


@pytest.mark.parametrize(
    ("attention", "words"),
    [("torch", "torch.nn.attention.varlen"), ("flex", "FlexAttention"), ("model", ""), ("flash_attn", "")],
)
def test_a_preferred_kernel(attention: Any, words: str, generator: torch.Generator) -> None:
    if attention == "flash_attn" and not flash_attn_installed():
        pytest.skip("flash_attn is not installed")
    on_cuda, on_cpu = pair("llama", BF16, head_dim=16)
    gated = regate_fx.compile(on_cuda, backend="aot_eager", attention=attention)
    check_on_cuda(gated, on_cuda, on_cpu, "llama", random_batch(generator, 4, 24))
    assert all(words in layer.attention for layer in gated.report.layers)


def test_autocast(generator: torch.Generator) -> None:
    """float32 weights, bfloat16 products: the attention goes by the kernel, and the step is as exact as the model's."""
    on_cuda, on_cpu = pair("llama", FP32)
    gated = regate_fx.compile(on_cuda, backend="aot_eager")
    with torch.autocast("cuda", BF16):
        batch = random_batch(generator, 4, 24)
        seen = moved(observe(gated, moved(batch, "cuda")), "cpu")
        with torch.device("cuda"):
            baseline = moved(run_key_masked(on_cuda, MODELS["llama"], moved(batch, "cuda")), "cpu")
    within_a_unit(compare(seen, baseline, golden(on_cpu, MODELS["llama"], batch), batch.active), BF16).check()
    assert {layer.kind for layer in gated.report.layers} == {"varlen"}


def test_checkpointing(generator: torch.Generator) -> None:
    on_cuda, on_cpu = pair("llama", BF16)
    on_cuda.gradient_checkpointing_enable()
    gated = regate_fx.compile(on_cuda, backend="aot_eager")
    check_on_cuda(gated, on_cuda, on_cpu, "llama", random_batch(generator, 4, 24))


def test_equal_calls_give_equal_bits(generator: torch.Generator) -> None:
    on_cuda, _ = pair("llama", BF16)
    gated = regate_fx.compile(on_cuda, backend="aot_eager", validate=False)
    batch = moved(random_batch(generator, 8, 64), "cuda")
    with deterministic():
        first, second = (moved(observe(gated, batch), "cpu") for _ in range(2))
    check_no_bit_differs(first, second)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_other_sizes_cost_no_trace(generator: torch.Generator) -> None:
    on_cuda, _ = pair("llama", BF16)
    gated = regate_fx.compile(on_cuda, backend="inductor", validate=False)
    shapes = [(4, 24), (3, 40), (2, 100), (7, 9), (5, 64)]
    batches = [moved(random_batch(generator, B, S), "cuda") for B, S in shapes]
    observe(gated, batches[0])
    observe(gated, batches[1])
    counters.clear()
    for batch in batches[2:]:
        observe(gated, batch)
    assert counters["stats"]["unique_graphs"] == 0


def test_a_step_with_the_runtime_does_not_wait_for_the_device(generator: torch.Generator) -> None:
    """From the collated batch to the optimizer: no copy to the host, no size read from the device."""
    on_cuda, _ = pair("llama", BF16)
    ids = torch.randint(3, VOCABULARY, (12, 24), generator=generator)
    rows = [{"input_ids": row, "labels": row, "sample_id": number} for number, row in enumerate(ids.tolist())]

    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        stacked = {key: torch.tensor([row[key] for row in some]) for key in ("input_ids", "labels")}
        return {**stacked, "attention_mask": torch.ones_like(stacked["input_ids"])}

    rules = {"special_ids": (), "visual_ids": ()}
    table = label_table(rows, collate, **rules)
    sparse = DualCycle(keep=0.5, warmup=0, cycle=1, dense=0)
    gate = ReGate(table, schedule=sparse, policy="loss", collator=collate, **rules)
    gated = regate_fx.compile(on_cuda, backend="aot_eager", gate=gate)
    optimizer = torch.optim.AdamW(gated.parameters(), lr=1e-4, fused=True)
    loader = [gate.collate(rows[begin : begin + 4]) for begin in (0, 4, 8)]
    batches = [{key: value.to("cuda") for key, value in batch.items()} for batch in loader]

    def step(batch: dict[str, Any]) -> Tensor:
        loss: Tensor = gated(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for batch in batches:
        step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
    assert sum(gated.report.batch.active) < 4 * 24
