"""The teacher pass: one look of the frozen, text-only model at every sample, before training (ReGATE, Eq. 1).

Shapes: B rows, S positions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import default_data_collator

from regate_fx.errors import InvalidInput, StoreMismatch
from regate_fx.runtime.collate import separate_ids
from regate_fx.runtime.rules import NO_LABEL, documents
from regate_fx.runtime.samples import label_hash
from regate_fx.runtime.store import MANIFEST, ReferenceLosses, SampleLosses, StoreWriter, read_manifest
from regate_fx.runtime.text_only import TextOnly, visual_token_ids


def teacher_losses(
    model: nn.Module,
    data: Dataset[Any] | Sequence[Any],
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    teacher: nn.Module | None = None,
    teacher_tokenizer: Any = None,
    special_ids: Sequence[int] | None = None,
    visual_ids: Sequence[int] | None = None,
    placeholder_id: int | None = None,
    shifted: bool = True,
    batch_size: int = 8,
    progress: bool = True,
) -> ReferenceLosses:
    """The teacher's loss on every label of `data`, read from `folder` or computed and stored there.

    model:        the student as it will be trained; without `teacher` its own backbone, frozen as it is now, is the
                  teacher: the same sequence and positions, visual tokens replaced by the placeholder
    data:         examples, each a mapping with its own `sample_id`
    tokenizer:    tells special ids and the placeholder (padding, else end of sequence); else the config does
    collator:     makes a batch of a list of examples without `sample_id`; by default transformers' own
    teacher:      another causal model, with `teacher_tokenizer`, of the student's vocabulary
    special_ids:  labels that are always counted; visual_ids: input ids that stand for pictures; both recorded
    shifted:      the teacher predicts label t at position t - 1

    Raises `InvalidInput` for samples without id or with an id that came before, and for a teacher of another
    vocabulary; `StoreMismatch` where the folder holds losses of another teacher or other settings.
    """
    if teacher is not None:
        _check_vocabulary(model, teacher, tokenizer, teacher_tokenizer)
    chosen = model if teacher is None else teacher
    visual = tuple(visual_token_ids(_config(model)) if visual_ids is None else visual_ids)
    placeholder = _placeholder(model, tokenizer) if placeholder_id is None else placeholder_id
    about = {
        "teacher": _weights_hash(chosen),
        "vocabulary": _vocabulary_hash(tokenizer),
        "special_ids": sorted(_special_ids(model, tokenizer) if special_ids is None else special_ids),
        "visual_ids": sorted(visual),
        "placeholder_id": placeholder,
        "placeholder_is_attended": True,
        "position_ids": "the student's, with pictures",
        "shifted": shifted,
        "dtype": str(next(chosen.parameters()).dtype),
    }
    if (Path(folder) / MANIFEST).exists():
        _check_same(folder, about)
        return ReferenceLosses.open(folder)
    text_only = TextOnly(chosen, model, visual, placeholder)
    loader: DataLoader[Any] = DataLoader(data, batch_size=batch_size, collate_fn=_Separate(collator))
    seen: set[int] = set()
    with StoreWriter(folder, about) as writer:
        for ids, batch in _watched(loader, progress):
            for sample in _score(text_only, chosen, ids, batch, shifted):
                if sample.sample_id in seen:
                    raise InvalidInput(
                        "sample_id",
                        f"{sample.sample_id} comes more than once.",
                        "Give every sample its own id.",
                    )
                seen.add(sample.sample_id)
                writer.write(sample)
    return ReferenceLosses.open(folder)


class _Separate:
    """Collates examples, their ids apart."""

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]] | None) -> None:
        self._collator = collator or default_data_collator

    def __call__(self, examples: list[Mapping[str, Any]]) -> tuple[Tensor, dict[str, Any]]:
        ids, rest = separate_ids(examples)
        return ids, dict(self._collator(rest))


def _watched(loader: DataLoader[Any], progress: bool) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    columns = TextColumn("teacher pass"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress) as bar:
        yield from bar.track(loader)


def _score(
    text_only: TextOnly, teacher: nn.Module, ids: Tensor, batch: dict[str, Any], shifted: bool
) -> Iterator[SampleLosses]:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise InvalidInput("labels", "the collator made no labels [B, S].", "Collate them with the rest.")
    device = next(teacher.parameters()).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    losses = text_only.token_loss(moved, shifted).cpu()
    label = _labels_of(batch, labels)
    hashes = label_hash(documents(ids, (labels.shape[0], labels.shape[1])), label, labels)
    for row, sample_id in enumerate(ids.tolist()):
        yield SampleLosses(sample_id, int(hashes[row]), losses[row, label[row]].numpy())


def _labels_of(batch: Mapping[str, Any], labels: Tensor) -> Tensor:
    """bool [B, S]: the labels that exist, as selection sees them."""
    mask = batch.get("attention_mask")
    label = labels != NO_LABEL
    return label & (mask != 0) if isinstance(mask, Tensor) and mask.shape == labels.shape else label


def _check_same(folder: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
    stored = read_manifest(folder)["about"]
    differing = sorted(name for name in about.keys() | stored.keys() if about.get(name) != stored.get(name))
    if differing:
        raise StoreMismatch(
            str(folder),
            f"its losses were computed with another {', '.join(differing)}.",
            "Choose another folder, or open it with ReferenceLosses.open if the model has been trained since.",
        )


def _check_vocabulary(student: nn.Module, teacher: nn.Module, tokenizer: Any, teacher_tokenizer: Any) -> None:
    sizes = _vocabulary_size(student), _vocabulary_size(teacher)
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


def _config(model: Any) -> Any:
    return getattr(model, "config", None)


def _text_config(model: Any) -> Any:
    config = _config(model)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _vocabulary_size(model: Any) -> int | None:
    return getattr(_text_config(model), "vocab_size", None)


def _placeholder(model: nn.Module, tokenizer: Any) -> int | None:
    for source in (tokenizer, _config(model), _text_config(model)):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            if value is not None:
                return int(value[0]) if isinstance(value, list | tuple) else int(value)
    return None


def _special_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    if tokenizer is not None:
        return set(tokenizer.all_special_ids)
    found: set[Any] = set()
    for source in (_config(model), _text_config(model), getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(source, name, None)
            found.update(value if isinstance(value, list | tuple) else [value])
    return {value for value in found if isinstance(value, int)}


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _vocabulary_hash(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()
