"""Make a small configuration of any architecture from its default one, without a line for any of them.

Sizes are set by the names that configurations give them (`sizes.toml`). Every combination of kinds of layers that the
default one lists layer by layer is kept, up to `MOST_LAYERS`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 160
PAD = 1
WORDS = range(3, 110)  # ids from 110 on stand for images and other media, or mark where they begin and end
DEPTH = 2
MOST_LAYERS = 6
PATCH = 4
HEAD = 8

_SIZES: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("sizes.toml").read_text())["size"]
_BY_NAME = {name: size["value"] for size in _SIZES for name in size["names"].split()}
_DROPOUT = ("dropout", "pdrop", "layerdrop", "drop_rate", "drop_path", "jitter")
_DEPTHS = next(names for size in _SIZES if "num_hidden_layers" in (names := size["names"].split()))
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


def _small_grids(small: dict[str, Any]) -> None:
    """Sizes of pictures that small patches fit into: windows, grids, and what counts patches."""
    if "spatial_merge_size" in small and "window_size" in small:
        small["window_size"] = 4 * PATCH
    if "num_patches" in small:
        small["num_patches"] = 16
    if small.get("image_grid_pinpoints"):
        small["image_grid_pinpoints"] = [[32, 16], [16, 32]]
    if "projector_patch_to_query_dict" in small:
        small["projector_patch_to_query_dict"] = {16: 4}


def _marked(small: dict[str, Any]) -> None:
    """An id that stands for pictures, where none is given by default."""
    for name in ("image_token_id", "image_token_index"):
        if name in small and small[name] is None:
            small[name] = VOCABULARY - 1
    _small_grids(small)


def _twice(small: dict[str, Any]) -> None:
    """Every kind of layer two times, where weights are shared between layers of a kind."""
    kinds = small.get("layers_block_type")
    if kinds is not None:
        kinds = small["layers_block_type"] = small["layer_types"] = list(kinds) * 2
        small["num_hidden_layers"] = len(kinds)
        small["hybrid_layer_ids"] = [index for index, kind in enumerate(kinds) if kind == "hybrid"]


def _sum_of_parts(small: dict[str, Any]) -> None:
    """One layer in each part of a model whose middle part is run several times."""
    parts = [name for name in ("n_input_layers", "n_recurrent_layers", "n_output_layers") if name in small]
    if parts:
        small.update(dict.fromkeys(parts, 1))
        small["num_hidden_layers"] = len(parts)
        small["layer_types"] = (small["layer_types"] * len(parts))[: len(parts)]


def _rotary(small: dict[str, Any]) -> None:
    """What rotary tables and clipped projections need, where defaults leave it out."""
    if small.get("rope_parameters") == {}:
        kinds = set(small["layer_types"])
        small["rope_parameters"] = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in kinds}
    elif "rope_parameters" not in small:
        small.setdefault("rope_theta", 1e4)
    if small.get("clip_qkv", 0) is None:
        small["clip_qkv"] = 8.0


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
    (_small_grids,),
    (_marked,),
    (_equal_heads, _small_grids),
    (_sections, _small_grids),
    (_equal_heads, _sections, _small_grids),
    (_named, _marked),
    (_twice,),
    (_sum_of_parts,),
    (_rotary,),
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
        and any(w in name for w in ("index", "idx", "layers", "feature_layer"))
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
