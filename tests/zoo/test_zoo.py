"""A fixed, varied sample of the architectures: each is gated and equal to the oracle. `run.py` checks them all."""

from __future__ import annotations

import pytest
from check import check
from entries import ENTRIES, Entry
from ways import WAYS

# By what is special about them; none is among the models that other tests build by hand.
GATED = (
    "causal:sarvam_mla",  # latent attention, experts
    "causal:cohere2",  # parallel branches, windows
    "causal:llama4_text",  # chunks, complex rotary tables, dense experts
    "causal:granitemoe",  # looped experts
    "causal:ernie4_5_moe",  # interleaved rotary tables, experts
    "causal:diffllama",  # two softmaxes subtracted
    "causal:gpt_neo",  # tril buffers, local layers
    "causal:xglm",  # sinusoidal positions with an offset
    "causal:rembert",  # BERT style, embeddings of another width
    "causal:gpt_oss",  # learned sinks
    "causal:xlm-roberta-xl",  # positions offset by padding
    "causal:ctrl",  # sinusoidal positions, post norm
    "causal:whisper",  # decoder of an encoder-decoder, loss not shifted
    "causal:mllama",  # cross-attention layers without an image
    "causal:phi3",  # fused projections
    "causal:minicpm3",  # residual multipliers
    "causal:modernbert-decoder",  # alternating windows
    "causal:hrm_text",  # layers that run several times
    "image:paligemma",  # prefix attention
    "image:deepseek_vl",
    "image:cosmos3_omni",  # three-dimensional positions
)
PICTURES = (
    "image:llava",
    "image:llava_next",  # pictures in several parts
    "image:aria",  # experts
    "image:instructblip",  # features queried from pictures
    "image:pp_formulanet",  # a decoder that attends to pictures
    "image:blip",  # the same, attention written by hand
)
HYBRID = ("causal:qwen3_next", "causal:lfm3")
WAYS_OF = {
    "checkpointing": "causal:exaone4",
    "bfloat16_autocast": "causal:olmo2",
    "lora": "causal:granite",
    "four_bit": "causal:stablelm",
    "custom_mask": "causal:starcoder2",
    "positions": "causal:gptj",
    "packed": "causal:smollm3",
    "layer_by_layer": "causal:glm4",
}
REFUSED = {
    "causal:deepseek_v32": "aten.topk picks the largest along token positions",
}


def entry(name: str) -> Entry:
    mapping, _, model_type = name.partition(":")
    found = [known for known in ENTRIES if (known.mapping, known.model_type) == (mapping, model_type)]
    return found[0]


@pytest.mark.parametrize("name", GATED)
def test_every_layer_is_gated_and_right(name: str) -> None:
    row = check(entry(name), batches=2)
    assert row.status == "right", row
    assert row.oracle == "masks replaced"
    assert not row.kinds.get("dense"), row


@pytest.mark.parametrize("name", PICTURES)
def test_every_layer_is_gated_with_pictures(name: str) -> None:
    row = check(entry(name), batches=2)
    assert row.pictures == "seen"
    assert row.status == "right", row
    assert row.oracle == "masks replaced"
    assert not row.kinds.get("dense"), row


@pytest.mark.parametrize("way", WAYS_OF)
def test_ways_to_run_a_model(way: str) -> None:
    row = check(entry(WAYS_OF[way]), batches=2, way=list(WAYS).index(way))
    assert row.way == way
    assert row.status == "right", row
    assert row.oracle == "masks replaced"
    assert not row.kinds.get("dense"), row


@pytest.mark.parametrize("name", HYBRID)
def test_layers_with_attention_are_gated_beside_those_that_mix(name: str) -> None:
    row = check(entry(name), batches=1)
    assert row.status == "right", row
    assert row.oracle == "masks replaced, elided states held"
    assert row.kinds["varlen"] and row.kinds["dense"]
    assert "conv1d" in row.reason


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_by_operator(name: str) -> None:
    row = check(entry(name), batches=1)
    assert row.status == "refused", row
    assert REFUSED[name] in row.reason
