"""What the benchmarks write for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in (headings, ("---",) * len(headings), *rows)]


def origin(command: str, where: Mapping[str, object]) -> str:
    """Which command, on which machine, with which versions, and when. where: of `machine`."""
    return f"`{command}`: {', '.join(f'{name} {value}' for name, value in where.items())}."
