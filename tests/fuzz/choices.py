"""What decoders are known to do differently, and how often a program is to do it each way.

The first value of each choice is the simplest.
"""

from __future__ import annotations

from typing import Any

Weights = dict[Any, float]

# What mixes tokens outside attention: a layer that has it must run dense or be refused.
MIXING: Weights = {
    "none": 0, "convolution": 2, "shift_by_padding": 1, "shift_by_joining": 1, "shift_by_index": 1, "differences": 1,
    "running_mean": 1, "linear_attention": 2, "less_mean": 1, "less_real_mean": 1, "roll": 1, "sort": 1, "topk": 1,
    "batch_statistics": 1, "sequence_norm": 1, "sequence_softmax": 1, "layer_norm_over_sequence": 1, "times_length": 1,
    "times_log_length": 1, "plus_last": 1, "plus_first": 1, "plus_largest": 1, "flip": 1, "learned_table": 1,
    "pooling": 1, "fourier": 1, "maximum_pool": 1, "scan": 1, "write_first": 1, "gram": 1, "next_in_batch": 1,
    "router_capacity": 1, "segment_sum": 1, "less_sample_mean": 1, "over_total": 1, "over_number": 1, "uniform": 1,
    "features_as_long": 1, "query_softmax": 1,
}  # fmt: skip

# Unusual, and every token by itself.
ODD: Weights = {
    "none": 40, "by_position": 1, "by_padding": 1, "by_id": 1, "by_sample": 1, "from_position": 1, "set_rows": 1,
    "by_count": 1, "by_row_number": 0.5, "zeroed": 1,
}  # fmt: skip

# What a layer reads of a memory that comes with each sample; the last reads tokens into the memory first.
CROSS: Weights = {
    "none": 40, "sdpa": 1, "sdpa_masked": 1, "scores": 1, "scores_masked": 1, "einsum": 0.6, "mha": 0.6, "mean": 0.6,
    "first": 0.4, "through_memory": 0.8,
}  # fmt: skip

LAYER: dict[str, Weights] = {
    "attend": {"sdpa_bool": 2, "sdpa": 2, "sdpa_causal": 2, "scores": 6, "mha": 1, "mha_weights": 0.6},
    "scores": {
        "matmul": 3, "bmm": 1, "baddbmm": 1, "einsum": 1, "einsum_late": 1, "summed": 0.4, "distance": 0.4,
        "transposed": 0.3,
    },
    "hide": {"add": 3, "masked_fill": 1, "masked_fill_": 0.7, "where": 1, "tril": 1.2},
    "softmax": {"softmax": 5, "by_hand": 1, "logsumexp": 0.7, "none": 0.4, "sigmoid": 0.3, "masked_after": 0.5},
    "qkv": {"separate": 3, "chunk": 1, "split": 1, "view": 1, "view_by_head": 0.7},
    "groups": {"all": 3, "interleave": 1, "expand": 1, "enable_gqa": 1, "single": 0.8},
    "span": {"all": 4, "window": 1.2, "chunk": 0.8, "full": 0.3, "prefix": 0.4, "document": 0.6},
    "cap": {False: 4, True: 1},
    "sinks": {"none": 7, "joined": 1, "denominator": 0.4},
    "minus": {False: 9, True: 1},
    "out_gate": {"none": 6, "elements": 1, "heads": 1},
    "qk_norm": {False: 4, True: 1},
    "values": {"own": 8, "earlier": 1},
    "relative": {"none": 18, "added": 1, "rows": 1},
    "content_bias": {"none": 12, "keys": 1, "queries": 1},
    "temper": {"none": 16, "head": 1, "sample": 1, "position": 1, "length": 0.2},
    "talking": {False: 12, True: 1},
    "twice": {"none": 20, "late": 1, "early": 1},
    "read": {"none": 20, "largest": 1, "squares": 1, "entropy": 1, "logsumexp": 1},
    "memory": {False: 40, True: 1},
    "writes": {False: 6, True: 1},
    "norm": {"none": 0.5, "layer": 2, "rms": 2, "rms_module": 1, "l2": 0.4},
    "place": {"pre": 4, "post": 1, "sandwich": 1, "parallel": 1},
    "mlp": {
        "none": 0.4, "gelu": 2, "swiglu": 2, "addmm": 1, "pointwise": 0.3, "loop_experts": 0.5, "where_experts": 0.5,
        "masked_experts": 0.5, "placed_experts": 0.5, "counted_experts": 0.5, "dense_experts": 0.7, "bmm_experts": 0.7,
        "picked_experts": 0.7, "soft_experts": 0.4, "sorted_experts": 0.7,
    },
    "residual": {"add": 4, "scaled": 1, "learned": 1, "in_place": 1, "mixed": 0.5},
    "dropout": {False: 4, True: 1},
    "odd": ODD,
    "odd_at": {"mlp": 1, "attention": 1, "residual": 1},
    "cross": CROSS,
    "mix": MIXING | {"none": 260},
    "mix_at": {"mlp": 1, "attention": 1, "input": 1, "values": 0.7, "beside": 1},
}  # fmt: skip

DECODER: dict[str, Weights] = {
    "width": {8: 1, 16: 1},
    "heads": {2: 1, 4: 1},
    "positions": {
        "none": 0.7, "learned": 1, "learned_offset": 0.7, "learned_expanded": 0.5, "counted": 1, "rotary_half": 2,
        "rotary_pairs": 1, "rotary_complex": 0.5, "rotary_counted": 0.7, "rotary_scaled": 0.5, "rotary_partial": 0.7,
        "alibi": 1, "alibi_keys": 0.7, "alibi_counted": 0.5, "sinusoidal": 0.5,
    },
    "rotary_made": {"outside": 2, "inside": 1},
    "mask_by": {"compare": 2, "tril": 1, "triu": 1, "buffer": 1},
    "additive_by": {"where": 1, "times": 1, "masked_fill": 1},
    "second": {"some": 12, "one_sample": 2, "one_each": 1, "all": 1, "one": 0.7},
    "labels_are_ids": {False: 9, True: 1},
    "lowest": {"finfo": 3, "1e4": 1},
    "padding": {"right": 3, "none": 1},
    "layout": {"grid": 4, "flat": 1, "sequence_first": 1},
    "streams": {"one": 7, "stacked": 0.8, "two": 0.7},
    "skips": {"none": 12, "first": 1, "mirrored": 1, "joined": 1, "collected": 1},
    "loops": {1: 12, 2: 1},
    "per_layer": {"none": 9, "added": 1, "gated": 0.5},
    "embed_scale": {False: 3, True: 1},
    "embed_norm": {False: 3, True: 1},
    "final_norm": {False: 1, True: 2},
    "tied": {False: 1, True: 1},
    "logit_cap": {False: 4, True: 1},
    "loss": {
        "pad_labels": 4, "cut_logits": 2, "unshifted": 1.2, "join_labels": 0.6, "roll_labels": 0.3, "sum": 0.5,
        "scaled": 0.4, "padding_ignored": 0.2, "with_penalty": 0.3, "classes_second": 0.08, "by_hand": 0.08,
        "two_losses": 0.08, "log_softmax": 0.08, "sum_by_count": 0.1, "sum_by_batch": 0.1, "masked_by_labels": 0.1,
    },
    "memory_by": {"caller": 1, "ids": 1, "encoder": 1},
    "before": MIXING | {"none": 800},
    "after": MIXING | {"none": 800},
    "scope": {"model": 8, "layers": 1},
    "checkpoint": {False: 7, True: 1},
    "float32": {False: 4, True: 1},
    "keep_logits": {False: 4, True: 1},
    "router_loss": {"none": 20, "mean": 0.5, "by_mask": 0.5, "by_position": 0.5, "by_expert": 0.7},
    "bucket": {0: 10, 3: 1, 16: 1},
}  # fmt: skip
