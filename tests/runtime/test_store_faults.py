"""What disks, users and killed processes do to a store: each a typed error that names the file, or no harm at all."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stores import ABOUT, assert_same, random_samples, write_store

from regate_fx.errors import StoreDamaged, StoreError, StoreMismatch, StoreUnwritable
from regate_fx.runtime import ReferenceLosses, SampleLosses, store_files
from regate_fx.runtime.store_files import FORMAT, INDEX, LOCKS, MANIFEST, PLAN
from regate_fx.runtime.store_writer import Plan, StoreWriter
from regate_fx.runtime.windows import Windows, fill

SAMPLES = random_samples(10)


def shard(folder: Path, window: int) -> Path:
    (found,) = folder.glob(f"shard-{window:05d}-*.arrow")
    return found


def read_all(folder: Path) -> ReferenceLosses:
    losses = ReferenceLosses.open(folder)
    assert len(losses.losses) == losses.labels
    return losses


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES: dict[str, Callable[[Path], Path]] = {
    "shard": lambda folder: shard(folder, 2),
    "index": lambda folder: folder / INDEX,
    "manifest": lambda folder: folder / MANIFEST,
}


@pytest.mark.parametrize("damage", [flip, truncate, empty, make_folder, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_a_second_pass_repairs_it(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    write_store(tmp_path, SAMPLES)
    path = FILES[file](tmp_path)
    damage(path)
    with pytest.raises(StoreError) as caught:
        read_all(tmp_path)
    no_store = file == "manifest" and not path.is_file()
    assert isinstance(caught.value, StoreMismatch if no_store else StoreDamaged)
    assert caught.value.where == str(tmp_path if no_store else path)
    assert path.name in str(caught.value)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    others = {name: name.stat().st_mtime_ns for name in tmp_path.glob("shard-*")}
    assert_same(write_store(tmp_path, SAMPLES), SAMPLES)
    assert all(name.stat().st_mtime_ns == written for name, written in others.items())


def test_a_damaged_shard_is_found_before_more_are_computed(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, Plan(ABOUT, 10, 3))
    writer.write(0, SAMPLES[:3])
    flip(shard(tmp_path, 0))
    with pytest.raises(StoreDamaged, match=r"shard-00000-.* its bytes are not .* Delete this file"):
        writer.read(0)
    with pytest.raises(StoreDamaged, match="shard-00000"):
        fill(
            writer,
            Windows(SAMPLES, 3),
            lambda examples: pytest.fail("computed"),
            lambda window, examples: writer.read(window),
        )


def test_shards_that_changed_places(tmp_path: Path) -> None:
    """Every byte is right, the digest in each name too; only the window is another."""
    write_store(tmp_path, SAMPLES)
    first, second = shard(tmp_path, 0), shard(tmp_path, 1)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(StoreDamaged, match="its bytes are not those that were written"):
        read_all(tmp_path)
    renamed = tmp_path / second.name.replace("00001", "00000")
    first.unlink()
    second.unlink()
    renamed.write_bytes(contents[1])
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(StoreDamaged, match=renamed.name):
        StoreWriter(tmp_path, Plan(ABOUT, 10, 3)).read(0)


def test_a_shard_of_another_pass(tmp_path: Path) -> None:
    write_store(tmp_path / "here", SAMPLES[:3])
    write_store(tmp_path / "there", SAMPLES[:3], losses="float16")
    foreign = shard(tmp_path / "there", 0)
    shutil.copy(foreign, tmp_path / "here")
    with pytest.raises(StoreMismatch, match=f"{foreign.name}: it does not belong"):
        ReferenceLosses.open(tmp_path / "here")
    (tmp_path / "here" / MANIFEST).unlink()
    with pytest.raises(StoreMismatch, match="the window has another shard, shard-00000"):
        write_store(tmp_path / "here", SAMPLES[:3])
    shard_here = next(name for name in (tmp_path / "here").glob("shard-*") if name.name != foreign.name)
    shard_here.unlink()
    with pytest.raises(StoreDamaged, match=foreign.name):
        write_store(tmp_path / "here", SAMPLES[:3])


def test_a_foreign_file(tmp_path: Path) -> None:
    write_store(tmp_path, SAMPLES)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        StoreMismatch, match=r"notes\.txt: it does not belong to the store .* Move it elsewhere"
    ):
        ReferenceLosses.open(tmp_path)
    (tmp_path / "notes.txt").rename(tmp_path / ".notes")
    assert_same(read_all(tmp_path), SAMPLES)


def test_a_manifest_of_another_version(tmp_path: Path) -> None:
    write_store(tmp_path, SAMPLES)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for version in (1, FORMAT + 1, None):
        (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"format": version}))
        with pytest.raises(
            StoreMismatch, match=rf"manifest\.json: it is of format {version}, .* reads {FORMAT}"
        ):
            ReferenceLosses.open(tmp_path)


def test_a_changed_manifest(tmp_path: Path) -> None:
    write_store(tmp_path, SAMPLES)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["about"]["teacher"] = "another"
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StoreDamaged, match=r"manifest\.json: it is not what was written"):
        ReferenceLosses.open(tmp_path)


def test_a_folder_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreMismatch, match=MANIFEST):
        ReferenceLosses.open(tmp_path)


def stopped_after(count: int) -> Callable[[Iterator[SampleLosses]], list[SampleLosses]]:
    left = iter(range(count))

    def score(examples: Iterator[SampleLosses]) -> list[SampleLosses]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return list(examples)

    return score


def test_a_pass_that_was_stopped_goes_on(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, Plan(ABOUT, 10, 3))
    with pytest.raises(KeyboardInterrupt):
        fill(writer, Windows(SAMPLES, 3), stopped_after(2))
    with pytest.raises(StoreMismatch, match="one that was stopped goes on where it was"):
        ReferenceLosses.open(tmp_path)
    (tmp_path / ".shard-00003.unfinished").write_bytes(b"half a shard")
    writer = StoreWriter(tmp_path, Plan(ABOUT, 10, 3))
    checked: list[int] = []
    count = fill(
        writer,
        Windows(SAMPLES, 3),
        stopped_after(2),
        lambda window, examples: checked.append(window),
    )
    writer.publish(count)
    assert checked == [0, 1]
    assert_same(read_all(tmp_path), SAMPLES)
    assert not list(tmp_path.glob("*.unfinished"))
    assert not list(tmp_path.glob(".*.unfinished"))


def test_a_pass_begun_with_other_settings(tmp_path: Path) -> None:
    StoreWriter(tmp_path, Plan(ABOUT, 10, 3, batches={"batch_size": 8}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreMismatch, match="computed with another teacher"):
        StoreWriter(tmp_path, Plan({"teacher": "u"}, 10, 3, batches={"batch_size": 8}))
    with pytest.raises(
        StoreMismatch, match=r"another samples_per_shard, batches: samples_per_shard 3, now 4; batches .*8"
    ):
        StoreWriter(tmp_path, Plan(ABOUT, 10, 4, batches={"batch_size": 9}))
    with pytest.raises(
        StoreMismatch, match="was over 10 samples, the data set now has 12: it has grown by 2"
    ):
        StoreWriter(tmp_path, Plan(ABOUT, 12, 3, batches={"batch_size": 8}))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_data_set_that_shrank(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, Plan(ABOUT, None, 3))
    fill(writer, Windows(SAMPLES, 3), list)
    with pytest.raises(StoreMismatch, match=r"shard-00003-.* the data set has only 3 windows of 3 samples"):
        writer.publish(3)
    with pytest.raises(StoreDamaged, match="the shard of window 4 is missing"):
        writer.publish(5)


def test_files_are_synced_before_they_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content, then name, then folder: after a power failure there is all of a file or nothing of it."""
    events: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(handle: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        events.append(("sync", "folder" if is_folder else "file"))
        sync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        events.append(("rename", target.name))
        replace(source, target)

    monkeypatch.setattr(store_files.os, "fsync", noted_sync)
    monkeypatch.setattr(store_files.os, "replace", noted_replace)
    write_store(tmp_path, SAMPLES)
    names = [name for event, name in events if event == "rename"]
    expected = [event for name in names for event in (("sync", "file"), ("rename", name), ("sync", "folder"))]
    assert events == expected
    assert names[0] == PLAN
    assert [store_files.window_of(name) for name in names[1:-2]] == [0, 1, 2, 3]
    assert names[-2:] == [INDEX, MANIFEST]


def in_child(work: Callable[[], None]) -> None:
    """Run in a forked process, which may change its own limits and user; its failure is the test's."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stops a write in its middle, as a full disk does."""
    long = [SampleLosses(number, 0, [1.0] * 5000) for number in range(3)]

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(
            StoreUnwritable, match=r"shard-00000-.* cannot be written \(File too large\)\. Make room"
        ):
            write_store(tmp_path, long, 1)

    in_child(write)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCKS, PLAN]
    assert_same(write_store(tmp_path, long, 1), long)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users")
def test_a_read_only_folder() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finished, new = folder / "finished", folder / "new"
        write_store(finished, SAMPLES)
        new.mkdir()
        for path in (finished, new, folder):
            path.chmod(0o555)

        def as_nobody() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            assert_same(read_all(finished), SAMPLES)
            with pytest.raises(StoreUnwritable, match=rf"{new}.* cannot be written \(Permission denied\)"):
                write_store(new, SAMPLES)

        in_child(as_nobody)
        for path in (finished, new, folder):
            path.chmod(0o755)
        assert not list(new.iterdir())


def test_a_read_only_folder_in_mid_pass() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = StoreWriter(folder, Plan(ABOUT, 10, 3))
        (folder / LOCKS).chmod(0o777)
        folder.chmod(0o555)

        def as_nobody() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            with pytest.raises(
                StoreUnwritable, match=r"shard-00000-\w+\.arrow: it cannot be written \(Permission denied\)"
            ):
                writer.write(0, SAMPLES[:3])

        in_child(as_nobody)
        folder.chmod(0o755)
