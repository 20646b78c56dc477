"""A disk that is full at each moment of a teacher pass in turn: a typed error that names the file, and no harm."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stores import assert_same, random_samples, write_store

from regate_fx.errors import StoreMismatch, StoreUnwritable
from regate_fx.runtime import ReferenceLosses, store_files
from regate_fx.runtime.store_files import INDEX, MANIFEST, PLAN

SAMPLES = random_samples(7)


class FullDisk:
    """Has no space left from one of the calls on that write, counted from 0.

    calls: names of those that were made
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full_at: int) -> None:
        self.calls: list[str] = []
        self._full_at = full_at
        for name in ("mkdir", "open", "fsync", "replace"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        create = self._watched("create", lambda path, mode: File(path, self))
        monkeypatch.setattr(store_files, "open", create, raising=False)

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            self.count(name)
            return call(*args, **options)

        return watched

    def count(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) > self._full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class File:
    """A new file on it, of which half may be written."""

    def __init__(self, path: Path, disk: FullDisk) -> None:
        self._file = path.open("wb", buffering=0)
        self._disk = disk

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: Any) -> None:
        content = memoryview(content)
        half = len(content) // 2
        self._file.write(content[:half])
        self._disk.count("write")
        self._file.write(content[half:])

    def flush(self) -> None:
        self._disk.count("flush")

    def fileno(self) -> int:
        return self._file.fileno()


def test_each_call_of_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: set[str] = set()
    for full_at in itertools.count():
        folder = tmp_path / str(full_at)
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, full_at)
            if pass_refused(folder, refused) is None:
                break
        if (folder / MANIFEST).exists():
            assert_same(ReferenceLosses.open(folder), SAMPLES)
        else:
            with pytest.raises(StoreMismatch):
                ReferenceLosses.open(folder)
        assert not list(folder.glob(".*unfinished"))
        assert_same(write_store(folder, SAMPLES), SAMPLES)
    assert set(disk.calls) == {"mkdir", "open", "create", "write", "flush", "fsync", "replace"}
    assert refused >= {PLAN, INDEX, MANIFEST, "plan.lock", "00002.lock", "manifest.lock"}
    assert {store_files.window_of(name) for name in refused} == {None, 0, 1, 2}


def pass_refused(folder: Path, refused: set[str]) -> str | None:
    """The name of the file that could not be written, which is added to `refused`; None where all could."""
    try:
        write_store(folder, SAMPLES)
    except StoreUnwritable as error:
        problem, where = str(error), Path(error.where)
    else:
        return None
    assert "cannot be written (No space left on device). Make room" in problem
    assert where.is_relative_to(folder)
    refused.add(where.name)
    return where.name
