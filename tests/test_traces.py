"""A new number of samples, positions or active tokens costs no new trace.

Shapes: B samples, S positions, N active positions, L the most active positions of a sample.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from oracles import check_step, observe
from small_models import MODELS, VOCABULARY, Batch, build, random_batch
from tiers import exhaustive, tiers
from torch import nn
from torch._dynamo.utils import counters

import regate_fx

STEPS = 200


def graphs_traced() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    counters.clear()


def no_size_is_one(batch: Batch) -> bool:
    per_sample = batch.active.sum(1)
    return min(*batch.input_ids.shape, int(per_sample.sum()), int(per_sample.max())) > 1


def varied_batches(generator: torch.Generator, steps: int) -> list[Batch]:
    """Batches of at least two samples, positions, active positions, and active positions in some sample."""
    found: list[Batch] = []
    while len(found) < steps:
        B, S = (int(torch.randint(2, high, (), generator=generator)) for high in (7, 33))
        share = float(torch.rand((), generator=generator))
        side = "left" if len(found) % 2 else "right"
        batch = random_batch(generator, B, S, share=share, padding=side)
        if len(found) % 16 == 0:
            batch = replace(batch, token_mask=torch.ones_like(batch.token_mask))
        if no_size_is_one(batch):
            found.append(batch)
    return found


@pytest.mark.parametrize("name", tiers(["llama", "gemma2", "gpt2", "deepseek_v3"], "llama", "deepseek_v3"))
def test_no_retrace_over_varied_steps(name: str, generator: torch.Generator) -> None:
    gated = regate_fx.compile(build(name), backend="eager")
    first, *rest = varied_batches(generator, STEPS + 1)
    observe(gated, first)
    after_first = graphs_traced()
    assert after_first > 0
    sizes = set()
    for batch in rest:
        observe(gated, batch)
        sizes.add((*batch.input_ids.shape, int(batch.active.sum())))
        assert graphs_traced() == after_first, f"a new trace at {batch.input_ids.shape}"
    assert len(sizes) > STEPS // 2


def test_no_retrace_without_labels(generator: torch.Generator) -> None:
    gated = regate_fx.compile(build("llama"), backend="eager")
    first, *rest = varied_batches(generator, 40)
    gated(**first.model_inputs(), token_mask=first.token_mask)
    after_first = graphs_traced()
    for batch in rest:
        gated(**batch.model_inputs(), token_mask=batch.token_mask)
        assert graphs_traced() == after_first


def test_no_retrace_when_the_first_step_is_all_active(generator: torch.Generator) -> None:
    gated = regate_fx.compile(build("llama"), backend="eager")
    dense = random_batch(generator, 3, 8, padding=None)
    ones = torch.ones_like(dense.input_ids)
    dense = replace(dense, attention_mask=ones, token_mask=ones.bool())
    observe(gated, dense)
    after_first = graphs_traced()
    for batch in varied_batches(generator, 40):
        observe(gated, batch)
        assert graphs_traced() == after_first


def unit_sized_batches(generator: torch.Generator, B: int, S: int) -> dict[str, Batch]:
    """One batch per size that is equal to 1, the others as large as they can be."""
    several = random_batch(generator, B, S, padding="right", share=1.0)
    nothing = torch.zeros(B, S, dtype=torch.bool)
    one_each, only_one = nothing.clone(), nothing.clone()
    one_each[:, 0] = True
    only_one[1, 0] = True
    return {
        "B": random_batch(generator, 1, S, padding="right", share=1.0),
        "S": random_batch(generator, B, 1, padding="right", share=1.0),
        "L": replace(several, token_mask=one_each),
        "N": replace(several, token_mask=only_one),
    }


@pytest.mark.parametrize("name", tiers(["llama", "gemma2"], "llama"))
def test_each_size_of_one_costs_at_most_one_trace(name: str, generator: torch.Generator) -> None:
    gated = regate_fx.compile(build(name), backend="eager")
    observe(gated, varied_batches(generator, 1)[0])
    for size, batch in unit_sized_batches(generator, 4, 9).items():
        before = graphs_traced()
        observe(gated, batch)
        assert graphs_traced() - before <= 1, f"{size} = 1"
    settled = graphs_traced()
    for B, S in ((3, 12), (5, 7)):
        for size, batch in unit_sized_batches(generator, B, S).items():
            observe(gated, batch)
            assert graphs_traced() == settled, f"{size} = 1 again, at B {B} and S {S}"
    for batch in varied_batches(generator, 10):
        observe(gated, batch)
        assert graphs_traced() == settled


def test_weights_that_change_cost_no_trace(generator: torch.Generator) -> None:
    model: nn.Module = build("llama")
    gated = regate_fx.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(gated.parameters())
    first, *rest = varied_batches(generator, 10)
    observe(gated, first)
    after_first = graphs_traced()
    for batch in rest:
        observe(gated, batch)
        optimizer.step()
        assert graphs_traced() == after_first


def test_the_first_call_leaves_nothing_behind(generator: torch.Generator) -> None:
    """Some operators are refused and the capture goes on; what was raised must not keep the call's tensors."""
    gated = regate_fx.compile(build("llama"), backend="eager")
    batch = random_batch(generator, 3, 11)
    output = gated(**batch.model_inputs(), labels=batch.labels, token_mask=batch.token_mask)
    loss = weakref.ref(output.loss)
    output.loss.backward()
    del output
    gc.collect()
    assert loss() is None


@exhaustive
def test_embeddings_may_be_resized_after_the_first_call(generator: torch.Generator) -> None:
    small = build("llama")
    gated = regate_fx.compile(small, backend="eager", validate=False)
    for size in (VOCABULARY, VOCABULARY + 8):
        gated.resize_token_embeddings(size, mean_resizing=False)
        seen = check_step(gated, small, MODELS["llama"], random_batch(generator, 3, 11), f"{size} tokens")
        assert seen.gradients["model.embed_tokens.weight"].shape[0] == size
