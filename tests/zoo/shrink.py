"""Make a small configuration of any architecture from its default one, without a line for any of them.

Sizes are set by the names that configurations give them. Every combination of kinds of layers that the default one
lists layer by layer is kept, up to `MOST_LAYERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 160
PAD, BOS, EOS = 1, 0, 2
WORDS = range(3, 110)  # ids from 110 on stand for images and other media, or mark where they begin and end
WINDOW = 4
DEPTH = 2
MOST_LAYERS = 6
PATCH = 4
HEAD = 8

# A decoder 32 wide with 4 heads of 8, and whatever stands beside it. Names are whole ones.
_SIZES: tuple[tuple[int, str], ...] = (
    (VOCABULARY, "vocab_size text_vocab_size decoder_vocab_size unpadded_vocab_size audio_vocab_size mel_vocab_size "
    "vocab_size_per_layer_input encoder_hash_byte_group_vocab"),
    (PAD, "pad_token_id pad_id padding_idx"),
    (BOS, "bos_token_id decoder_start_token_id cls_token_id text_bos_token_id"),
    (EOS, "eos_token_id sep_token_id forced_eos_token_id text_eos_token_id"),
    (DEPTH, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth layers num_decoder_layers "
    "num_encoder_layers vision_layers conf_num_hidden_layers resampler_depth decoder_num_layers num_global_layers "
    "n_recurrent_layers n_input_layers n_output_layers num_layers_per_stack num_blocks num_local_layers "
    "aligner_num_add_layers num_lstm_layers"),
    (64, "mamba_d_ssm attention_hidden_size"),
    (4, "n_mamba_heads num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads conf_num_attention_heads "
    "num_sliding_attention_heads vision_num_attention_heads resampler_n_heads resampler_heads num_query_tokens "
    "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts zero_expert_num mamba_n_heads "
    "mamba_num_heads linear_num_value_heads linear_num_heads index_n_heads index_topk index_topk_blocks "
    "resampler_n_latents resampler_num_latents latent_query_num mm_tokens_per_image num_image_tokens "
    "image_seq_length vision_soft_tokens_per_image window_size laurel_rank d_rel index_block_size "
    "audio_soft_tokens_per_image rotary_dim block_size index_kpool chunk_size mamba_chunk_size"),
    (WINDOW, "sliding_window attention_window sliding_window_size attention_chunk_size local_attention "
    "attention_window_size keep_window_size local_attention_window_len local_attn_chunk_length "
    "lsh_attn_chunk_length"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads kv_n_heads n_kv_heads num_query_groups "
    "num_global_key_value_heads resampler_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k "
    "top_k_experts moe_top_k linear_num_key_heads sliding_window_pattern global_attn_every_n_layers hc_mult hc_count "
    "no_rope_layer_interval altup_num_inputs o_groups layer_group_size depth_multiplier "
    "interleave_moe_layer_step n_layers_per_attn_res_block ngram_size heads_per_ngram num_patches "
    "expert_layer_period attn_layer_period cross_attention_frequency merger_times full_attention_interval "
    "mamba_n_groups n_groups mamba_ngroups"),
    (1, "n_shared_experts num_shared_experts first_k_dense_replace n_group topk_group num_dense_layers moe_num_shared_experts "
    "num_kv_shared_layers num_expert_group moe_layer_start_index cross_layer_interval insert_layer_id "
    "attn_layer_offset expert_layer_offset num_nextn_predict_layers time_step_rank num_mem_blocks max_window_layers"),
    (32, "hidden_size d_model n_embd dim_model model_dim word_embed_proj_dim emb_dim embedding_size embed_dim hidden_dim "
    "projection_dim out_hidden_size text_hidden_size hidden_size_global input_embedding_size output_embedding_size "
    "n_ctx_embd lru_width embedding_dim vision_output_dim projector_input_dim vision_hidden_size "
    "projector_output_dim decoder_hidden_size encoder_hidden_size image_text_hidden_size output_dim backbone_hidden_size "
    "kv_hidden_size patch_embed_hidden_size image_token_embed_dim projection_hidden_size "
    "projector_hidden_size projection_hidden_dim router_hidden_size hidden_size_per_layer_input ple_embed_dim "
    "ngram_vocab_size_base adapter_rank vector_quantization_hidden_dimension codebook_dim max_2d_position_embeddings base_channels num_filters"),
    (48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff n_inner d_ff dff mlp_dim inner_dim d_inner "
    "intermediate_dim ffn_hidden_size feed_forward_size dense_intermediate_size intermediate_size_mlp "
    "shared_intermediate_size projection_intermediate_size decoder_intermediate_size moe_hidden_size"),
    (16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size share_expert_dim q_lora_rank kv_lora_rank o_lora_rank lora_rank hc_lowrank "
    "num_position_embeddings latent_dim image_size crop_size resolution num_embeddings codebook_size rel_extent "
    "mamba_d_state state_size ssm_state_size temporal_embed_size gated_norm_rank min_image_size "
    "latent_channels index_head_dim linear_head_dim mamba_head_dim mamba_d_head mamba_headdim "
    "attention_head_dim qk_head_dim linear_key_head_dim linear_value_head_dim resampler_head_dim resampler_dim_head"),
    (HEAD, "head_dim d_kv dim_head kv_channels swa_head_dim global_head_dim attention_head_size "
    "qk_rope_head_dim qk_nope_head_dim swa_qk_rope_head_dim d_head pos_emb_height pos_emb_width posemb_grid_size "
    "v_head_dim"),
    (128, "max_position_embeddings n_positions max_sequence_length n_ctx context_length model_max_length max_seq_len "
    "max_source_positions max_target_positions floor_scale log_scaling_n_floor seq_len "
    "original_max_position_embeddings"),
    (PATCH, "patch_size"),
)  # fmt: skip
_BY_NAME = {name: value for value, names in _SIZES for name in names.split()}
_DROPOUT = ("dropout", "pdrop", "layerdrop", "drop_rate", "drop_path", "jitter")
_DEPTHS = tuple(next(names for _, names in _SIZES if "num_hidden_layers" in names).split())
_LARGE = 256  # what is larger and has no rule is scaled down


Repair = Callable[[dict[str, Any]], None]


def small_config(model_type: str, repair: Sequence[Repair] = ()) -> PretrainedConfig:
    """The default configuration of a type with small sizes and no dropout, ids of markers and media in range.

    repair: changes to the entries, made in every part of a configuration that consists of several.
    """
    return _shrunk(CONFIG_MAPPING[model_type](), iter(range(WORDS.stop, VOCABULARY)), repair)


def _shrunk(default: PretrainedConfig, media: Iterator[int], repair: Sequence[Repair]) -> PretrainedConfig:
    small = _small(default, media, repair)
    for change in repair:
        change(small)
    return type(default)(**small)


def _equal_heads(small: dict[str, Any]) -> None:
    for name in small:
        if _BY_NAME.get(name) == 2 and name.endswith(("key_value_heads", "kv_heads")):
            small[name] = 4


def _sections(small: dict[str, Any]) -> None:
    """Rotary tables of three kinds of positions."""
    if isinstance(small.get("rope_parameters"), dict):
        small["rope_parameters"]["mrope_section"] = [2, 1, 1]


def _named(small: dict[str, Any]) -> None:
    """Sizes that are left open by default."""
    for name, value in small.items():
        if value is None and name in _BY_NAME and not name.endswith("_id"):
            small[name] = _BY_NAME[name]
        if value is None and name.endswith(("_indices", "_ids")):
            small[name] = [1]
        if value is None and name == "default_language":
            small[name] = small["languages"][0]


def _short_sections(small: dict[str, Any]) -> None:
    if isinstance(small.get("rope_parameters"), dict):
        small["rope_parameters"]["mrope_section"] = [1, 1, 0]


def _one_expert(small: dict[str, Any]) -> None:
    if "num_experts_per_tok" in small:
        small["num_experts_per_tok"] = 1


def _mixed(other: str, attention: str) -> Repair:
    """Both kinds of layers where the default lists none."""

    def repair(small: dict[str, Any]) -> None:
        if "layer_types" in small:
            small["layer_types"] = [other, attention]

    return repair


def _whole_rotary(small: dict[str, Any]) -> None:
    small.get("rope_parameters", {}).pop("partial_rotary_factor", None)


REPAIRS: tuple[tuple[Repair, ...], ...] = (
    (),
    (_equal_heads,),
    (_named,),
    (_sections,),
    (_equal_heads, _named),
    (_equal_heads, _sections),
    (_named, _sections),
    (_sections, _whole_rotary),
    (_equal_heads, _named, _sections, _whole_rotary),
    (_short_sections,),
    (_one_expert,),
    (_mixed("mamba", "attention"),),
    (_mixed("conv", "full_attention"),),
)


def _small(default: PretrainedConfig, media: Iterator[int], repair: Sequence[Repair]) -> dict[str, Any]:
    entries = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    kept = _representatives(entries)
    small: dict[str, Any] = {}
    for name, value in entries.items():
        if name in (
            "transformers_version",
            "architectures",
            "torch_dtype",
            "dtype",
            "ignore_keys_at_rope_validation",
        ):
            continue
        if isinstance(value, PretrainedConfig):
            small[name] = _shrunk(value, media, repair)
        else:
            small[name] = _small_entry(name, value, entries, kept, media)
    return small


def _small_entry(
    name: str, value: Any, entries: Mapping[str, Any], kept: Sequence[int], media: Iterator[int]
) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if name in _DEPTHS and kept:
        return len(kept)
    if name == "num_kv_shared_layers" and value and kept:
        return len(kept) // 2
    if isinstance(value, (list, tuple)):
        return _small_list(name, value, entries, kept)
    if isinstance(value, dict):
        return _small_mapping(value)
    if isinstance(value, float) and any(word in name for word in _DROPOUT):
        return 0.0
    if not isinstance(value, int):
        return value
    if name in _BY_NAME:
        return (
            0
            if value == 0 and _BY_NAME[name] == 1 and name.startswith(("num_", "n_", "first_"))
            else _BY_NAME[name]
        )
    if name.endswith(("_token_id", "_token_index", "_id")) and value >= 0:
        return next(media)
    return max(value // 64, 8) if value > _LARGE else value


def _depth(entries: Mapping[str, Any]) -> int:
    if isinstance(pattern := entries.get("block_types"), (list, tuple)):
        return len(pattern)  # repeated as often as there are layers
    return next((entries[name] for name in _DEPTHS if isinstance(entries.get(name), int)), 0)


def _representatives(entries: Mapping[str, Any]) -> list[int]:
    """Layers of the default model, one for each combination of what is listed layer by layer; in order."""
    depth = _depth(entries)
    lists = [value for value in entries.values() if isinstance(value, (list, tuple)) and len(value) == depth]
    if not depth or not lists:
        return []
    found: dict[tuple[str, ...], int] = {}
    for index in range(depth):
        found.setdefault(tuple(str(values[index]) for values in lists if not _counts(values)), index)
    kept = sorted(found.values())[:MOST_LAYERS]
    kept += [index for index in range(depth) if index not in kept][: max(DEPTH - len(kept), 0)]
    # Layers that share keys and values come last, and each needs one of its kind before them.
    return sorted(kept) * (2 if entries.get("num_kv_shared_layers") else 1)


def _counts(values: Sequence[Any]) -> bool:
    """Whether a list is of numbers of layers rather than of kinds."""
    return all(isinstance(value, int) for value in values) and len(set(values)) > DEPTH


def _small_list(
    name: str, value: Sequence[Any], entries: Mapping[str, Any], kept: Sequence[int]
) -> Sequence[Any]:
    if kept and len(value) == _depth(entries):
        picked = [value[index] for index in kept]
        if _counts(value):
            picked = [min(number, place) for place, number in enumerate(picked)]
        elif (
            all(isinstance(number, int) and not isinstance(number, bool) for number in picked)
            and name in _PER_LAYER
        ):
            picked = [_PER_LAYER[name]] * len(picked)
        return picked
    if (
        value
        and all(type(number) is int for number in value)
        and any(w in name for w in ("index", "idx", "layers"))
    ):
        return type(value)([len(kept) - 1 if kept else DEPTH - 1])
    return value


_PER_LAYER = {"num_attention_heads_per_layer": 4, "intermediate_size": 48}


def _small_mapping(value: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of rotary tables, of one kind or by kind of layer."""
    small: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            small[name] = _small_mapping(entry)
        elif name == "mrope_section":
            small[name] = [2, 1, 1]
        elif name in ("short_factor", "long_factor"):
            small[name] = [1.0] * (HEAD // 2)
        elif name == "original_max_position_embeddings":
            small[name] = 64
        else:
            small[name] = entry
    return small
