"""Random model shapes and random batches: whatever the numbers, a gated step is what the oracle says.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comparison import check_no_bit_differs
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import check_step, observe
from small_models import FIRST_WORD, MODELS, VOCABULARY, Side, build, random_batch

import regate_fx

BATCHES_PER_MODEL = 4


@st.composite
def llama_like_shapes(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        "head_dim": draw(st.sampled_from([4, 6, 8, 16])),
        "hidden_size": heads * draw(st.sampled_from([4, 6, 10])),
        "intermediate_size": draw(st.sampled_from([8, 28])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def windowed_shapes(draw: st.DrawFn) -> dict[str, Any]:
    return {**draw(llama_like_shapes()), "sliding_window": draw(st.integers(1, 7))}


@st.composite
def gpt2_shapes(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2, 3, 4]))
    return {
        "n_head": heads,
        "n_embd": heads * draw(st.sampled_from([4, 6, 8])),
        "n_layer": draw(st.integers(1, 3)),
        "n_inner": draw(st.sampled_from([None, 20])),
    }


SHARES = [0.1, 0.3, 0.5, 0.8, 0.95, 1.0]
ONE_TOKEN = 0.0


@st.composite
def batches(draw: st.DrawFn, smallest: int = 2, shares: list[float] = SHARES) -> dict[str, Any]:
    """Arguments of `random_batch`."""
    side: Side = draw(st.sampled_from(["left", "right"]))
    return {
        "B": draw(st.integers(smallest, 5)),
        "S": draw(st.integers(smallest, 17)),
        "padding": side,
        "share": draw(st.sampled_from(shares)),
        "holes": draw(st.sampled_from([0.0, 0.4, 0.9])),
    }


def check_batches(
    name: str, shape: dict[str, Any], steps: list[dict[str, Any]], seed: int, keep_logits: bool
) -> None:
    torch._dynamo.reset()
    model = build(name, seed=seed, **shape)
    # The oracle sees what validation would.
    gated = regate_fx.compile(model, backend="eager", validate=False, keep_logits=keep_logits)
    generator = torch.Generator().manual_seed(seed)
    for step in steps:
        batch = random_batch(generator, **step)
        context = f"{name} {shape}, {step}, seed {seed}, keep_logits {keep_logits}"
        seen = check_step(gated, model, MODELS[name], batch, context, with_logits=keep_logits)
        assert (seen.logits is not None) == keep_logits
    # Where every layer is gated, the ids of elided tokens change no bit of the last step.
    assert gated.report.gated == len(gated.report.layers), context
    other = torch.randint(FIRST_WORD, VOCABULARY, batch.input_ids.shape, generator=generator)
    changed = replace(batch, input_ids=torch.where(batch.active, batch.input_ids, other))
    check_no_bit_differs(seen, observe(gated, changed), batch.active)


several_batches = st.lists(batches(), min_size=BATCHES_PER_MODEL, max_size=BATCHES_PER_MODEL)
seeds = st.integers(0, 2**16)

ONE_LAYER = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "hidden_size": 12}
ONE_LAYER |= {"intermediate_size": 8, "num_hidden_layers": 1, "tie_word_embeddings": True}
TOKENS_AND_ONE = [
    {"B": 3, "S": 9, "padding": "left", "share": share, "holes": 0.0} for share in (0.5, ONE_TOKEN, 0.8)
]


@given(
    name=st.sampled_from(["llama", "qwen2", "qwen3"]),
    shape=llama_like_shapes(),
    steps=several_batches,
    seed=seeds,
    keep_logits=st.booleans(),
)
@example(name="llama", shape=ONE_LAYER, steps=TOKENS_AND_ONE, seed=0, keep_logits=True)
def test_llama_like(
    name: str, shape: dict[str, Any], steps: list[dict[str, Any]], seed: int, keep_logits: bool
) -> None:
    check_batches(name, shape, steps, seed, keep_logits)


@given(
    name=st.sampled_from(["mistral", "gemma3"]),
    shape=windowed_shapes(),
    steps=several_batches,
    seed=seeds,
    keep_logits=st.booleans(),
)
def test_windowed(
    name: str, shape: dict[str, Any], steps: list[dict[str, Any]], seed: int, keep_logits: bool
) -> None:
    if name == "gemma3":
        kinds = ("sliding_attention", "full_attention")
        shape = {**shape, "layer_types": [kinds[layer % 2] for layer in range(shape["num_hidden_layers"])]}
    check_batches(name, shape, steps, seed, keep_logits)


@given(shape=gpt2_shapes(), steps=several_batches, seed=seeds, keep_logits=st.booleans())
def test_gpt2_like(shape: dict[str, Any], steps: list[dict[str, Any]], seed: int, keep_logits: bool) -> None:
    check_batches("gpt2", shape, steps, seed, keep_logits)


@given(
    shape=llama_like_shapes(),
    step=batches(1, [ONE_TOKEN, *SHARES]),
    seed=seeds,
    keep_logits=st.booleans(),
)
def test_the_first_batch_may_have_any_size(
    shape: dict[str, Any], step: dict[str, Any], seed: int, keep_logits: bool
) -> None:
    check_batches("llama", shape, [step], seed, keep_logits)
