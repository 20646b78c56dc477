"""Who the teacher is, and what of it, of the tokenizer and of the settings decides a loss."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from regate_fx.errors import InvalidInput

# What a config says that decides no loss of a frozen model in evaluation mode, or is recorded by itself: where it came
# from, what a call returns, how weights were made, what training drops, and the special tokens, which trainers set to
# the tokenizer's.
_DECIDES_NOTHING = re.compile(
    r"transformers_version|_?name_or_path|architectures|auto_map|(torch_)?dtype|use_cache|return_dict|id2label|label2id"
    r"|output_(attentions|hidden_states|router_logits|scores)|problem_type|num_labels|task_specific_params"
    r"|initializer_.*|.*(dropout|pdrop|layerdrop).*|(pad|bos|eos|sep|cls|decoder_start|forced_.*)_token_id"
    r"|_?attn_implementation.*"
)


def check_vocabulary(student: nn.Module, teacher: nn.Module, tokenizer: Any, teacher_tokenizer: Any) -> None:
    sizes = vocabulary_size(student), vocabulary_size(teacher)
    if sizes[0] != sizes[1]:
        raise InvalidInput(
            "teacher",
            f"knows {sizes[1]} tokens, the student {sizes[0]}.",
            "Use a teacher with the student's tokenizer.",
        )
    if tokenizer is None or teacher_tokenizer is None:
        raise InvalidInput(
            "teacher_tokenizer",
            "cannot be compared with the student's.",
            "Pass tokenizer and teacher_tokenizer along with a teacher of its own.",
        )
    if tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        raise InvalidInput(
            "teacher_tokenizer",
            "gives tokens other ids than the student's.",
            "Use a teacher with the student's tokenizer.",
        )


def what_decides(
    teacher: nn.Module,
    tokenizer: Any,
    *,
    special_ids: Iterable[int],
    visual_ids: Iterable[int],
    placeholder: int | None,
    shifted: bool,
    dtype: torch.dtype | None,
    settings: Mapping[str, Any] | None,
    losses: str,
) -> dict[str, Any]:
    """What reference losses are computed with, by name, as JSON writes it: the losses of two passes that differ in one
    of them do not belong together.

    Of truncation, only what the tokenizer and `settings` say is known here; what a collator cuts off shows in the
    hashes of each sample.
    """
    return {
        "teacher": weights_hash(teacher),
        "config": _deciding(_text_config(teacher)),
        "attention": getattr(_text_config(teacher), "_attn_implementation", None),
        "vocabulary": vocabulary_hash(tokenizer),
        "truncation": _truncation(tokenizer),
        "special_ids": sorted(special_ids),
        "visual_ids": sorted(visual_ids),
        "placeholder_id": placeholder,
        "placeholder_is_attended": True,
        "position_ids": "the student's, with pictures",
        "shifted": shifted,
        "dtype": str(next(teacher.parameters()).dtype),
        "autocast": None if dtype is None else str(dtype),
        "settings": dict(settings or {}),
        "losses": losses,
    }


def _truncation(tokenizer: Any) -> dict[str, Any]:
    names = "model_max_length", "truncation_side"
    return {name: getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)}


def config_of(model: Any) -> Any:
    return getattr(model, "config", None)


def _text_config(model: Any) -> Any:
    config = config_of(model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _deciding(config: Any) -> dict[str, Any]:
    """What a config says of the computation, as JSON reads it back: rotary base, windows, soft caps, epsilons, ..."""
    if not hasattr(config, "to_dict"):
        return {}
    read: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return _without_rest(read)


def _without_rest(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_rest(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not _DECIDES_NOTHING.fullmatch(name)
    }


def vocabulary_size(model: Any) -> int | None:
    return getattr(_text_config(model), "vocab_size", None)


def placeholder_of(model: nn.Module, tokenizer: Any) -> int | None:
    for source in (tokenizer, config_of(model), _text_config(model)):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            if value is not None:
                return int(value[0]) if isinstance(value, list | tuple) else int(value)
    return None


def special_ids_of(model: nn.Module, tokenizer: Any) -> set[int]:
    if tokenizer is not None:
        return set(tokenizer.all_special_ids)
    found: set[Any] = set()
    for source in (config_of(model), _text_config(model), getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(source, name, None)
            found.update(value if isinstance(value, list | tuple) else [value])
    return {value for value in found if isinstance(value, int)}


def weights_hash(model: nn.Module) -> str:
    """Of all that the state holds, and of buffers that it leaves out, such as rotary frequencies."""
    digest = hashlib.sha256()
    buffers = {name: buffer for name, buffer in model.named_buffers() if not _is_cache(name)}
    for name, tensor in sorted((buffers | model.state_dict()).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_cache(buffer: str) -> bool:
    """Whether a buffer grows with the longest text seen so far."""
    return "cache" in buffer.rpartition(".")[2]


def vocabulary_hash(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()
