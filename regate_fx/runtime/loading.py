"""Data sets, processors, collators and policies by the names that a command line gives them."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoProcessor, DataCollatorForSeq2Seq

from regate_fx.errors import InvalidInput

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_processor(name: str) -> Any:
    """A processor, or the tokenizer of a model without one. Raises `InvalidInput` where there is neither."""
    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            "processor", f"cannot be loaded from {name!r} ({error}).", "Name its folder or hub name."
        ) from error


def load_data(name: str, split: str, *, streaming: bool = False, number: bool = False) -> Any:
    """A data set with a `sample_id`. Raises `InvalidInput` where it has none and `number` gives none."""
    data = _load_data(Path(name), name, split, streaming)
    columns = data.column_names
    if number:
        return data.map(_numbered, with_indices=True)
    if columns is not None and "sample_id" not in columns:
        raise InvalidInput(
            "sample_id",
            f"is no column of {name}, which has {sorted(columns)}.",
            "Give every sample its own integer, or number them with --number, here and in training alike.",
        )
    return data


def _load_data(path: Path, name: str, split: str, streaming: bool) -> Any:
    if path.is_file() and path.suffix not in _FORMATS:
        raise InvalidInput("data", f"{name} is none of {sorted(_FORMATS)}.", "Convert it.")
    if not path.exists() and (path.suffix in _FORMATS or name.startswith((".", "/", "~"))):
        # No name of the hub, where looking for it would take a while.
        raise InvalidInput("data", f"{name} is not there.", "Name an existing file or folder, or a hub name.")
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(name)
            data = _split(saved, split) if isinstance(saved, datasets.DatasetDict) else saved
            return data.to_iterable_dataset() if streaming else data
        if path.is_file():
            kind = _FORMATS[path.suffix]
            return datasets.load_dataset(kind, data_files=name, split="train", streaming=streaming)
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except InvalidInput:
        raise
    except Exception as error:  # whatever readers of a dozen formats raise
        raise InvalidInput(
            "data",
            f"{name} cannot be read: {error}",
            f"Give a folder of save_to_disk, a file of {sorted(_FORMATS)}, or a hub name.",
        ) from error


def _split(saved: Any, split: str) -> Any:
    if split not in saved:
        raise InvalidInput("split", f"is {split!r}, the data set has {sorted(saved)}.", "Name one of these.")
    return saved[split]


def _numbered(example: Mapping[str, Any], index: int) -> dict[str, int]:
    return {"sample_id": index}


def named_object(argument: str, name: str) -> Any:
    """What `module:object` names; modules are also looked for in the working folder. Raises `InvalidInput`."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InvalidInput(argument, f"is {name!r}.", "Give module:object, as in my_training:collate.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(argument, f"{name!r} cannot be imported: {error}.", "Check the name.") from error


def load_collator(
    name: str | None, processor: Any, max_length: int | None
) -> Callable[[list[Any]], Mapping[str, Any]]:
    """The collator that `module:function` names, or one for plain text. Raises `InvalidInput`.

    processor: given to a function that takes a second argument; None where nobody named one
    """
    if name is None:
        return TextCollator(getattr(processor, "tokenizer", processor), max_length)
    if max_length is not None:
        raise InvalidInput("max_length", f"is not passed on to {name}.", "Let the collator truncate.")
    found: Callable[..., Mapping[str, Any]] = named_object("collator", name)
    needed = [
        parameter
        for parameter in inspect.signature(found).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(needed) == 1:
        return found
    if processor is None:
        raise InvalidInput("processor", f"is needed by {name}.", "Name its folder or hub name.")
    return functools.partial(_with_processor, found, processor)


def _with_processor(function: Callable[..., Any], processor: Any, examples: list[Any]) -> Mapping[str, Any]:
    collated: Mapping[str, Any] = function(examples, processor)
    return collated


class TextCollator:
    """Batches of a `text` or `input_ids`, every token a label, unless `labels` say which."""

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._pad = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, examples: list[Mapping[str, Any]]) -> Mapping[str, Any]:
        batch: Mapping[str, Any] = self._pad([self._tokenized(example) for example in examples])
        return batch

    def _tokenized(self, example: Mapping[str, Any]) -> dict[str, list[int]]:
        if "input_ids" in example:
            ids = list(example["input_ids"])[: self._max_length]
        elif "text" in example:
            cut = {"truncation": True, "max_length": self._max_length} if self._max_length else {}
            ids = self._tokenizer(example["text"], **cut)["input_ids"]
        else:
            raise InvalidInput(
                "collator",
                f"is needed for examples of {sorted(example)}.",
                "Name one as module:function, or give them a text or input_ids.",
            )
        found = {"input_ids": ids, "labels": list(example.get("labels", ids))[: self._max_length]}
        if "input_ids" in example and "attention_mask" in example:
            found["attention_mask"] = list(example["attention_mask"])[: self._max_length]
        return found
