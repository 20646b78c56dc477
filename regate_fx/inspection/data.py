"""The examples that a run was trained on, as its loader gave them to the collator."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from regate_fx.errors import InvalidInput

_READERS = {
    ".json": datasets.Dataset.from_json,
    ".jsonl": datasets.Dataset.from_json,
    ".parquet": datasets.Dataset.from_parquet,
}


class Examples:
    """A data set whose samples are found by their ids."""

    def __init__(self, data: Any) -> None:
        """data: a `datasets.Dataset` with a column `sample_id`. Raises `InvalidInput` where it has none."""
        if "sample_id" not in data.column_names:
            raise InvalidInput(
                "data",
                f"has columns {data.column_names} and no sample_id.",
                "Save it with the ids that the teacher pass saw.",
            )
        self._data = data
        self._ids = list(map(int, data["sample_id"]))
        self._places = {sample_id: place for place, sample_id in enumerate(self._ids)}

    @property
    def ids(self) -> list[int]:
        """Sample ids, in the order of the data."""
        return self._ids

    def of(self, sample_id: int) -> Mapping[str, Any]:
        """The example with an id. Raises `InvalidInput`."""
        place = self._places.get(sample_id)
        if place is None:
            raise InvalidInput(
                "sample", f"{sample_id} is not in the data.", "Name a sample id of this data set."
            )
        example: Mapping[str, Any] = self._data[place]
        return example


def open_examples(path: str | os.PathLike[str]) -> Examples:
    """Read what `Dataset.save_to_disk` wrote, or a json, jsonl or parquet file. Raises `InvalidInput`."""
    path = Path(path)
    reader = datasets.load_from_disk if path.is_dir() else _READERS.get(path.suffix)
    if reader is None or not path.exists():
        raise InvalidInput(
            "data",
            f"{path} is {'no json, jsonl or parquet file' if path.exists() else 'not there'}.",
            "Give such a file, or a folder written by Dataset.save_to_disk.",
        )
    try:
        data = reader(str(path))
    except Exception as error:
        raise InvalidInput("data", f"{path} cannot be read: {error}", "Save it anew.") from error
    if isinstance(data, datasets.DatasetDict):
        raise InvalidInput("data", f"{path} holds {sorted(data)}.", f"Name one of them, as in {path}/train.")
    return Examples(data)


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


class TokenTexts:
    """How tokens are shown: by their text where there is a tokenizer, else by their number; -1 is no token."""

    def __init__(self, tokenizer: Any = None) -> None:
        self._tokenizer = tokenizer

    def __call__(self, token: int) -> str:
        """One token by itself."""
        if token < 0:
            return "[no id]"
        return f"#{token}" if self._tokenizer is None else str(self._tokenizer.decode([token]))

    def of_sequence(self, tokens: Sequence[int]) -> list[str]:
        """Tokens in a row, each with the space that it begins with after the one before."""
        if self._tokenizer is None:
            return [f"{self(token)} " for token in tokens]
        return [self._after(*pair) for pair in zip([-1, *tokens], tokens, strict=False)]

    def _after(self, before: int, token: int) -> str:
        alone = self(token)
        if min(before, token) < 0:
            return alone
        first, both = self(before), str(self._tokenizer.decode([before, token]))
        return both[len(first) :] if both.startswith(first) and len(both) > len(first) else alone


def open_tokenizer(path: str | None) -> TokenTexts:
    """The tokenizer, or that of the processor, which was saved to a folder. Raises `InvalidInput`."""
    if path is None:
        return TokenTexts()
    from transformers import AutoTokenizer

    try:
        return TokenTexts(AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            "tokenizer", f"none could be loaded from {path!r}: {error}", "Give a folder it was saved to."
        ) from error
