"""The examples that a run was trained on, as its loader gave them to the collator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regate_fx.errors import InvalidInput


class Examples:
    """A data set whose samples are found by their ids."""

    def __init__(self, data: Any) -> None:
        """data: a `datasets.Dataset` with a column `sample_id`."""
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
