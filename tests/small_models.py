"""Causal language models small enough to run hundreds of times, and random batches for them.

Shapes: B samples, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
PAD = 1
FIRST_WORD = 3  # ids below it are the padding, beginning and end markers
WINDOW = 4

Positions = Literal["index", "unpadded"]


@dataclass(frozen=True)
class SmallModel:
    """One architecture and the facts of it that an oracle has to know.

    positions: "index" when the model numbers a sample's tokens by tensor index, "unpadded" when it
    counts the tokens that `attention_mask` keeps.
    shifted: logits row t - 1 is paired with label t; otherwise row t with label t.
    windowed: some layer looks back by tensor index, so that running a subsequence means something else.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    positions: Positions = "index"
    shifted: bool = True
    windowed: bool = False


_COMMON = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_HALF = {key: value for key, value in _LLAMA_LIKE.items() if key not in ("num_key_value_heads", "head_dim")}
_SHORT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}

REQUIRED: dict[str, SmallModel] = {
    "llama": SmallModel("llama", _LLAMA_LIKE),
    "mistral": SmallModel("mistral", {**_LLAMA_LIKE, "sliding_window": WINDOW}, windowed=True),
    "qwen2": SmallModel("qwen2", _LLAMA_LIKE),
    "qwen3": SmallModel("qwen3", _LLAMA_LIKE),
    "gemma2": SmallModel(
        "gemma2",
        {
            **_LLAMA_LIKE,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        windowed=True,
    ),
    "gemma3": SmallModel(
        "gemma3_text",
        {
            **_LLAMA_LIKE,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        windowed=True,
    ),
    "gpt2": SmallModel("gpt2", _SHORT),
    "gpt_neox": SmallModel("gpt_neox", _HALF),
    "bloom": SmallModel("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, positions="unpadded"),
    "opt": SmallModel(
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
        positions="unpadded",
    ),
    "bart": SmallModel(
        "bart",
        {
            "d_model": 32,
            "decoder_layers": 2,
            "encoder_layers": 2,  # what its config calls num_hidden_layers
            "decoder_ffn_dim": 48,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 128,
            "is_decoder": True,
            "is_encoder_decoder": False,
        },
        shifted=False,
    ),
    "deepseek_v3": SmallModel(
        "deepseek_v3",
        {
            **_HALF,
            **_EXPERTS,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "mixtral": SmallModel("mixtral", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Architectures the project promises to gate."""

UNPREPARED: dict[str, SmallModel] = {
    "phi": SmallModel("phi", _HALF),
    "stablelm": SmallModel("stablelm", {**_LLAMA_LIKE, "use_parallel_residual": True}),
    "falcon": SmallModel("falcon", {**_HALF, "new_decoder_architecture": False, "multi_query": True}),
    "qwen2_moe": SmallModel(
        "qwen2_moe",
        {
            **_LLAMA_LIKE,
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "norm_topk_prob": True,
        },
    ),
    "olmo2": SmallModel("olmo2", _LLAMA_LIKE),
    "cohere": SmallModel("cohere", _LLAMA_LIKE),
    "glm4": SmallModel("glm4", _LLAMA_LIKE),
    "granite": SmallModel(
        "granite", {**_LLAMA_LIKE, "residual_multiplier": 0.7, "attention_multiplier": 0.2}
    ),
    "gptj": SmallModel("gptj", {**_SHORT, "rotary_dim": 4}),
}
"""Architectures nobody wrote the project for; what works for the ones above should carry over."""

MODELS: dict[str, SmallModel] = {**REQUIRED, **UNPREPARED}

_DROPOUT_WORDS = ("dropout", "pdrop", "layerdrop")


def build(name: str, *, seed: int = 0, dropout: float = 0.0, **overrides: Any) -> PreTrainedModel:
    """A float32 model in training mode with random weights far enough from zero for errors to show.

    dropout: value of every dropout probability of the config but layer drop, which stays 0.
    overrides: config entries that replace those of `MODELS[name]`, and these defaults.
    """
    small = MODELS[name]
    config = AutoConfig.for_model(small.model_type, **{**_COMMON, **small.config, **overrides})
    for entry, value in vars(config).items():
        is_dropout = isinstance(value, float) and any(word in entry for word in _DROPOUT_WORDS)
        if is_dropout and entry not in overrides:
            setattr(config, entry, 0.0 if "layerdrop" in entry else dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _spread_weights(model)
    return model.train()


def _spread_weights(model: nn.Module) -> None:
    # Default initialisation gives near-uniform attention, under which a wrong mask costs almost nothing.
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                std = 0.5 if id(parameter) in embeddings else 0.25
                parameter.copy_(torch.randn_like(parameter) * std)


@dataclass(frozen=True)
class Batch:
    """One batch of a gated call.

    input_ids:      int64 [B, S]
    attention_mask: int64 [B, S], 0 at padding, or None for no padding
    labels:         int64 [B, S], -100 where there is none
    token_mask:     bool  [B, S]
    position_ids:   int64 [B, S], or None to leave the numbering to the model
    inputs_embeds:  float [B, S, D] to be read in place of the ids, or None
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    token_mask: Tensor
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """bool [B, S]: the positions that are no padding."""
        if self.attention_mask is None:
            return torch.ones_like(self.token_mask)
        return self.attention_mask != 0

    @property
    def active(self) -> Tensor:
        """bool [B, S]: the positions the decoder computes."""
        return self.token_mask & self.real

    def model_inputs(self) -> dict[str, Tensor]:
        """What the model itself is called with: everything but the labels and the token mask."""
        inputs: dict[str, Tensor | None] = {
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "inputs_embeds": self.inputs_embeds,
            "input_ids": self.input_ids if self.inputs_embeds is None else None,
        }
        return {name: value for name, value in inputs.items() if value is not None}


Side = Literal["left", "right"] | None


def random_batch(
    generator: torch.Generator,
    B: int,
    S: int,
    *,
    padding: Side = "right",
    share: float = 0.5,
    holes: float = 0.3,
) -> Batch:
    """Random ids, lengths, mask and labels; at least one position is active.

    padding: the side on which samples shorter than S are filled up, None for samples of full length.
    share: probability of a position to be active; holes: probability of a label to be missing.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    index = torch.arange(S).expand(B, S)
    lengths = torch.randint(max(1, S // 2), S + 1, (B, 1), generator=generator)
    lengths[int(torch.randint(B, (), generator=generator))] = S
    real = index < lengths if padding == "right" else index >= S - lengths
    if padding is None:
        real = torch.ones(B, S, dtype=torch.bool)
    ids = torch.randint(FIRST_WORD, VOCABULARY, (B, S), generator=generator)
    labels = torch.randint(FIRST_WORD, VOCABULARY, (B, S), generator=generator)
    labels = labels.masked_fill((uniform(B, S) < holes) | ~real, -100)
    token_mask = uniform(B, S) < share
    if not (token_mask & real).any():
        choices = real.flatten().nonzero().flatten()
        token_mask.view(-1)[choices[int(torch.randint(len(choices), (), generator=generator))]] = True
    return Batch(
        input_ids=ids.masked_fill(~real, PAD),
        attention_mask=None if padding is None else real.long(),
        labels=labels,
        token_mask=token_mask,
    )
