"""A directory as a source: what is in it, changing it, and following it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from registry_support import PATIENCE_S, eventually
from sources_support import Contents, content

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError, digest_of
from qaa_serve.sources import (
    HISTORY,
    ChangedMeanwhileError,
    DirectoryHistory,
    DirectorySource,
    NoSuchRevisionError,
    ReadOnlyError,
    SourceError,
    check_directory,
    disk,
)
from qaa_serve.sources import directory as directory_module

MAX_BYTES = 1 << 20


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    return Contents(tmp_path / "contents")


@pytest.fixture
def source(tmp_path: Path) -> DirectorySource:
    (tmp_path / "source").mkdir()
    return DirectorySource(tmp_path / "source")


@pytest.fixture
def put(source: DirectorySource, contents: Contents) -> Callable[..., Any]:
    """Put the content of a letter."""
    return lambda name, which, **options: source.put(name, contents.path(which), contents.digest(which), **options)


@pytest.fixture
def history(source: DirectorySource, contents: Contents) -> Callable[[str], str]:
    """The letters of a name's history, each content checked."""
    return lambda name: contents.history(source.root, name, source.revisions(name))


# -------------------------------------------------------------------------------------------------------- reading


def test_what_is_listed(source: DirectorySource, tmp_path: Path) -> None:
    content(source.root / "whole", "a")
    (content(source.root / "half", "b") / CONFIG_FILE).unlink()
    (source.root / "pickled").mkdir()
    (source.root / "pickled" / "adapter_model.bin").write_text("x")
    content(source.root / ".hidden", "c")
    (source.root / "notes").mkdir()
    (source.root / "notes" / "text").write_text("x")
    (source.root / "file").write_text("x")
    (source.root / "linked").symlink_to(content(tmp_path / "elsewhere", "d"))
    (source.root / "dangling").symlink_to("nowhere")
    (source.root / "loop").symlink_to("loop")
    adapters = source.list().adapters
    assert {name: found.complete for name, found in adapters.items()} == {
        "whole": True, "half": False, "pickled": False, "linked": True,
    }  # fmt: skip
    for name, found in adapters.items():
        assert source.look(name) == found
    assert adapters["whole"].nbytes == (source.root / "whole" / WEIGHTS_FILE).stat().st_size
    assert adapters["whole"].changed == (source.root / "whole" / WEIGHTS_FILE).stat().st_mtime
    assert source.look("notes") is None
    assert source.look("nothing") is None
    assert source.look("x" * 400) is None


def test_what_may_not_be_read_is_an_adapter(source: DirectorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    content(source.root / "a", "a")
    content(source.root / "b", "b")
    look = os.stat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(source.root / "a") + "/"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return look(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert {name: found.complete for name, found in source.list().adapters.items()} == {"a": False, "b": True}


def test_a_version_changes_with_each_file_and_the_directory(source: DirectorySource, tmp_path: Path) -> None:
    place = content(source.root / "a", "a")

    def version() -> str:
        found = source.look("a")
        assert found is not None
        return found.version

    seen = {version()}
    assert seen == {version()}
    os.utime(place, (5, 5))
    (place / "notes").write_text("x")
    assert seen == {version()}, "other files do not matter"
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        os.utime(place / file, ns=(7, 7))
        seen.add(version())
        (place / file).write_text("other")
        os.utime(place / file, ns=(7, 7))
        seen.add(version())
        (place / file).rename(place / "aside")
        seen.add(version())
        shutil.copy2(place / "aside", place / file)
        seen.add(version())
    shutil.copytree(place, source.root / ".copy")
    place.rename(tmp_path / "old")
    (source.root / ".copy").rename(place)
    seen.add(version())
    assert len(seen) == 10


def test_an_empty_directory_that_is_not_the_same_one_has_another_identity(
    source: DirectorySource, tmp_path: Path
) -> None:
    before = source.list()
    assert before.adapters == {}
    assert source.list() == before
    (tmp_path / "other").mkdir()
    source.root.rename(tmp_path / "away")
    (tmp_path / "other").rename(source.root)
    assert source.list().identity != before.identity


def test_a_directory_that_is_not_there_is_no_empty_one(source: DirectorySource, put: Callable[..., Any]) -> None:
    source.root.rmdir()
    for read in (source.list, lambda: source.look("a"), source.read_settings, lambda: put("a", "x")):
        with pytest.raises(SourceError, match=str(source.root)):
            read()
    assert not source.root.exists(), "nothing makes it: it may only not be mounted"


def test_many_names_are_listed(source: DirectorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2_000):
        content(source.root / f"a{number}", "a")
    looks = 0
    look = os.stat

    def count(*args: Any, **options: Any) -> os.stat_result:
        nonlocal looks
        looks += 1
        return look(*args, **options)

    monkeypatch.setattr(os, "stat", count)
    assert len(source.list().adapters) == 2_000
    assert looks < 3 * 2_000 + 20


def test_fetch_copies_what_was_asked_for(
    source: DirectorySource, put: Callable[..., Any], contents: Contents, tmp_path: Path
) -> None:
    version = put("a", "x").version
    for number, (asked, limit, error) in enumerate(
        [(version, MAX_BYTES, None), ("other", MAX_BYTES, ChangedMeanwhileError), (version, 3, AdapterError)]
    ):
        target = tmp_path / f"target{number}"
        target.mkdir()
        if error is None:
            source.fetch("a", asked, target, max_bytes=limit)
            assert digest_of(target) == contents.digest("x")
        else:
            with pytest.raises(error):
                source.fetch("a", asked, target, max_bytes=limit)
    with pytest.raises(ChangedMeanwhileError):
        source.fetch("b", version, tmp_path, max_bytes=MAX_BYTES)


@pytest.mark.parametrize("how", ["in place", "replaced", "removed"])
def test_fetch_notices_what_changes_meanwhile(
    how: str, source: DirectorySource, put: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = put("a", "x").version
    copy = directory_module.copy_adapter

    def copy_and_change(place: Path, target: Path, *, max_bytes: int) -> None:
        monkeypatch.undo()
        if how == "in place":
            copy(place, target, max_bytes=max_bytes)
            (source.root / "a" / WEIGHTS_FILE).write_text("other")
        elif how == "replaced":
            put("a", "y")
            copy(place, target, max_bytes=max_bytes)
        else:
            source.remove("a")
            copy(place, target, max_bytes=max_bytes)

    monkeypatch.setattr(directory_module, "copy_adapter", copy_and_change)
    (tmp_path / "target").mkdir()
    with pytest.raises(ChangedMeanwhileError):
        source.fetch("a", version, tmp_path / "target", max_bytes=MAX_BYTES)


# ------------------------------------------------------------------------------------------------------- changing


@pytest.mark.parametrize("exchange", [True, False], ids=["one-step", "two-steps"])
def test_the_order_of_a_history(
    exchange: bool,
    source: DirectorySource,
    put: Callable[..., Any],
    history: Callable[[str], str],
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not exchange:
        monkeypatch.setattr(directory_module, "exchange", lambda one, other: False)
    for which, again, kept in [
        ("x", False, ""), ("y", False, "x"), ("z", False, "xy"), ("z", False, "xy"),
        ("y", True, "xyz"), ("x", True, "xyz"),  # two steps back
        ("w", False, "yzx"), ("y", False, "zxw"),
    ]:  # fmt: skip
        listed = put("a", which, again=again)
        assert contents.at(source.root, "a") == which
        assert history("a") == kept
        assert listed.settled
        assert source.list().adapters["a"].version == listed.version
    source.remove("a")
    assert source.look("a") is None
    assert history("a") == "zxwy"
    source.prune("a", 2, {contents.digest("z")})
    assert history("a") == "zwy"
    source.prune("a", 0)
    assert history("a") == ""
    assert source.list().adapters == {}


def test_a_history_stays_in_order_when_the_clock_is_put_back(
    put: Callable[..., Any], history: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    for number, which in enumerate("vwxyz"):
        monkeypatch.setattr(time, "time_ns", lambda number=number: now - number * 10**9)
        put("a", which)
    assert history("a") == "vwxy"


def test_a_directory_that_another_user_made_goes_to_the_history(
    put: Callable[..., Any], history: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who shares a directory may write there, and may set the times of others' files to now and nothing else."""
    set_times = os.utime

    def refuse(path: Any, *, ns: tuple[int, int] | None = None) -> None:
        if ns is not None:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        set_times(path)

    monkeypatch.setattr(os, "utime", refuse)
    for which in "abc":
        put("x", which)
        time.sleep(0.02)  # what sets no times has no finer ones than the kernel's clock
    assert history("x") == "ab"


def test_history_of_its_own_directory(tmp_path: Path, contents: Contents) -> None:
    kept = DirectoryHistory(tmp_path / "history")
    assert kept.revisions("a") == []
    kept.prune("a", 0)
    for which in "xyzx":
        kept.keep("a", contents.digest(which), contents.path(which))
    assert [contents.which(digest) for digest in kept.revisions("a")] == ["x", "y", "z"]
    (tmp_path / "target").mkdir()
    kept.fetch_revision("a", contents.digest("y"), tmp_path / "target", max_bytes=MAX_BYTES)
    assert digest_of(tmp_path / "target") == contents.digest("y")
    for digest in (contents.digest("w"), "..", ""):
        with pytest.raises(NoSuchRevisionError):
            kept.fetch_revision("a", digest, tmp_path / "target", max_bytes=MAX_BYTES)
    with pytest.raises(AdapterError, match="digest"):
        kept.keep("a", contents.digest("v"), contents.path("w"))
    damaged = tmp_path / "history" / "a" / contents.digest("y")
    (damaged / WEIGHTS_FILE).write_text("damaged")
    with pytest.raises(AdapterError, match="damaged"):
        kept.fetch_revision("a", contents.digest("y"), tmp_path / "target", max_bytes=MAX_BYTES)
    (damaged / WEIGHTS_FILE).unlink()
    assert [contents.which(digest) for digest in kept.revisions("a")] == ["x", "z"]
    kept.keep("a", contents.digest("y"), contents.path("y"))
    assert [contents.which(digest) for digest in kept.revisions("a")] == ["x", "z", "y"]


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(name: str, put: Callable[..., Any]) -> None:
    with pytest.raises(AdapterError, match="cannot be an adapter's name"):
        put(name, "x")


def test_what_must_be_there(source: DirectorySource, put: Callable[..., Any], contents: Contents) -> None:
    first = put("a", "x", expected="")
    for expected in ("", "other"):
        with pytest.raises(ChangedMeanwhileError):
            put("a", "y", expected=expected)
        with pytest.raises(ChangedMeanwhileError):
            source.remove("a", expected=expected)
    assert contents.at(source.root, "a") == "x"
    put("a", "y", expected=first.version)
    with pytest.raises(ChangedMeanwhileError):
        put("a", "x", expected=first.version)
    with pytest.raises(ChangedMeanwhileError):
        put("b", "x", expected=first.version)
    assert contents.at(source.root, "a") == "y"
    found = source.look("a")
    assert found is not None
    source.remove("a", expected=found.version)
    source.remove("a", expected="")
    source.remove("a")


def test_what_is_the_same_stays(source: DirectorySource, put: Callable[..., Any]) -> None:
    version = put("a", "x").version
    assert put("a", "x").version == version
    assert source.revisions("a") == []


def test_what_is_damaged_is_not_put(
    source: DirectorySource, put: Callable[..., Any], contents: Contents, tmp_path: Path
) -> None:
    put("a", "x")
    with pytest.raises(AdapterError, match="digest"):
        source.put("a", contents.path("y"), contents.digest("z"))
    with pytest.raises(AdapterError):
        source.put("a", tmp_path / "nowhere", contents.digest("z"))
    assert contents.at(source.root, "a") == "x"
    assert source.revisions("a") == []
    assert list((source.root / HISTORY / ".changing").iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False], ids=["one-step", "two-steps"])
def test_a_linked_adapter_gives_way_and_what_it_led_to_stays(
    exchange: bool,
    source: DirectorySource,
    put: Callable[..., Any],
    history: Callable[[str], str],
    contents: Contents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not exchange:
        monkeypatch.setattr(directory_module, "exchange", lambda one, other: False)
    for name in "ab":
        (source.root / name).symlink_to(content(tmp_path / "elsewhere", "x"))
    put("a", "y")
    source.remove("b")
    assert not (source.root / "a").is_symlink()
    assert contents.at(source.root, "a") == "y"
    assert not os.path.lexists(source.root / "b")
    assert history("a") == history("b") == "x"
    assert digest_of(tmp_path / "elsewhere") == contents.digest("x")


def test_other_files_of_a_user_stay(
    source: DirectorySource, put: Callable[..., Any], history: Callable[[str], str]
) -> None:
    def mine() -> list[str]:
        return sorted(path.read_text() for path in source.root.rglob("mine"))

    put("a", "x")
    (source.root / "a" / "mine").write_text("1")
    (source.root / "a" / "README.md").write_text("ours")
    put("a", "y")
    assert history("a") == "x"
    put("a", "x")  # whose place in the history is given up
    assert mine() == ["1"]
    (source.root / "a" / "mine").write_text("2")
    source.remove("a")
    source.prune("a", 0)
    assert mine() == ["1", "2"]
    assert not list(source.root.rglob("README.md"))
    (source.root / "notes").mkdir()
    (source.root / "notes" / "mine").write_text("3")
    (source.root / "file").write_text("4")
    source.remove("notes")
    assert (source.root / "notes" / "mine").exists(), "it is no adapter"
    put("notes", "x")
    put("file", "x")
    source.remove("notes", purge=True)
    source.remove("file", purge=True)
    assert mine() == ["1", "2", "3"]
    assert [path.read_text() for path in (source.root / HISTORY / "file").iterdir()] == ["4"]


def test_what_is_incomplete_is_kept_as_the_others_are(source: DirectorySource, put: Callable[..., Any]) -> None:
    for number in range(3):
        (source.root / "a").mkdir()
        (source.root / "a" / WEIGHTS_FILE).write_text(str(number))
        put("a", "x")
        source.remove("a")
    rest = [path.read_text() for path in sorted((source.root / HISTORY / "a").glob(f"other-*/{WEIGHTS_FILE}"))]
    assert rest == ["0", "1", "2"]
    source.prune("a", 1)
    rest = [path.read_text() for path in (source.root / HISTORY / "a").glob(f"other-*/{WEIGHTS_FILE}")]
    assert rest == ["2"]
    source.remove("a", purge=True)
    assert not (source.root / HISTORY / "a").exists()


def test_what_was_put_is_on_the_disk(
    source: DirectorySource, put: Callable[..., Any], contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, str] = {}  # inode -> what the name had when the disk was told to hold it

    def note(descriptor: int) -> None:
        synced[os.fstat(descriptor).st_ino] = contents.at(source.root, "a")

    put("b", "x")
    monkeypatch.setattr(os, "fsync", note)
    for before, which in (("", "x"), ("x", "y")):
        synced.clear()
        put("a", which)
        place = source.root / "a"
        for path in (place, place / CONFIG_FILE, place / WEIGHTS_FILE):
            assert synced[path.stat().st_ino] == before, "before it is to be seen"
        assert synced[source.root.stat().st_ino] == which
    assert (source.root / HISTORY / "a").stat().st_ino in synced


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EROFS, ReadOnlyError), (errno.EACCES, ReadOnlyError), (errno.EPERM, ReadOnlyError),
        (errno.ENOSPC, SourceError), (errno.EDQUOT, SourceError), (errno.EIO, SourceError),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_said(
    number: int,
    error: type[AdapterError],
    source: DirectorySource,
    put: Callable[..., Any],
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put("a", "x")
    listing = source.list()
    really_open = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY and str(path).startswith(str(source.root)):
            raise OSError(number, os.strerror(number))
        return really_open(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    calls: list[Callable[[], Any]] = [
        lambda: put("a", "y"), lambda: source.remove("a"), lambda: source.write_settings(b"", None),
        lambda: source.keep("a", contents.digest("y"), contents.path("y")),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(error, match=rf"{source.root}.*({os.strerror(number)})"):
            call()
    assert source.list() == listing, "it can still be read"
    assert source.look("b") is None


def test_a_full_disk_keeps_what_is_there(
    source: DirectorySource, put: Callable[..., Any], contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("a", "x")

    def fill(place: Path, target: Path, *, max_bytes: int) -> None:
        (target / CONFIG_FILE).write_text("begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qaa_serve.sources.history.copy_adapter", fill)
    with pytest.raises(SourceError, match="free some space"):
        put("a", "y")
    assert contents.at(source.root, "a") == "x"
    assert list((source.root / HISTORY / ".changing").iterdir()) == []


# -------------------------------------------------------------------------------------------------------- together


def test_a_lock_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    with disk.locked(tmp_path / "lock", 0.0, "it"), pytest.raises(SourceError, match="it is being changed"):  # noqa: SIM117
        with disk.locked(tmp_path / "lock", 0.1, "it"):
            pass
    released = threading.Event()

    def hold() -> None:
        with disk.locked(tmp_path / "lock", 0.0, "it"):
            held.set()
            time.sleep(0.2)
            released.set()

    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(PATIENCE_S)
    with disk.locked(tmp_path / "lock", PATIENCE_S, "it"):
        assert released.is_set()
    thread.join()


def test_a_name_between_two_steps_is_still_there(
    source: DirectorySource,
    put: Callable[..., Any],
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    version = put("a", "x").version
    monkeypatch.setattr(directory_module, "exchange", lambda one, other: False)
    rename, seen = Path.rename, []

    def look_between(path: Path, target: Path) -> Path:
        result = rename(path, target)
        if path == source.root / "a":
            other = DirectorySource(source.root)
            assert not path.exists()
            assert other.list().adapters["a"].version == version
            with pytest.raises(SourceError, match="being changed"):
                other.look("a")
            with pytest.raises(SourceError, match="being changed"):
                other.fetch("a", version, tmp_path, max_bytes=MAX_BYTES)
            seen.append(path)
        return result

    monkeypatch.setattr(Path, "rename", look_between)
    put("a", "y")
    assert seen
    assert contents.at(source.root, "a") == "y"


def test_a_second_step_that_fails_is_undone(
    source: DirectorySource, put: Callable[..., Any], contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("a", "x")
    monkeypatch.setattr(directory_module, "exchange", lambda one, other: False)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.startswith("swap.") and target.name == "a":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(SourceError):
        put("a", "y")
    assert contents.at(source.root, "a") == "x"
    monkeypatch.setattr(Path, "rename", rename)
    put("a", "z")
    assert source.revisions("a") == [contents.digest("x")]


def test_a_file_system_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = content(tmp_path / "one", "x"), content(tmp_path / "other", "y")

    class Libc:
        def __init__(self, error: int):
            self.error = error

        @property
        def renameat2(self) -> Callable[..., int]:
            def refuse(*args: Any) -> int:
                disk.ctypes.set_errno(self.error)
                return -1

            return refuse

    if disk.exchange(one, other):
        assert "x" in (other / CONFIG_FILE).read_text()
    before = digest_of(one)
    for error in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        monkeypatch.setattr(disk.ctypes, "CDLL", lambda *args, error=error, **options: Libc(error))
        assert not disk.exchange(one, other)
    monkeypatch.setattr(
        disk.ctypes, "CDLL", lambda *args, **options: object()
    )  # a C library that has not heard of it
    assert not disk.exchange(one, other)
    monkeypatch.setattr(disk.ctypes, "CDLL", lambda *args, **options: Libc(errno.EBUSY))
    with pytest.raises(OSError, match="busy"):
        disk.exchange(one, other)
    assert digest_of(one) == before


PUT_OFTEN = """
import sys
from pathlib import Path
from qaa_serve.sources import DirectorySource, directory
root, place, digest, exchange = sys.argv[1:]
if exchange == "False":
    directory.exchange = lambda one, other: False
source = DirectorySource(Path(root), lock_s=60.0)
for _ in range(50):
    source.put("a", Path(place), digest)
    assert source.list().adapters["a"].complete
"""


@pytest.mark.parametrize("exchange", [True, False], ids=["one-step", "two-steps"])
def test_two_processes_put_the_same_name(exchange: bool, source: DirectorySource, contents: Contents) -> None:
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PUT_OFTEN,
                source.root,
                contents.path(which),
                contents.digest(which),
                str(exchange),
            ]
        )
        for which in "xy"
    ]
    while any(process.poll() is None for process in processes):
        if (found := source.list().adapters.get("a")) is not None:
            assert found.complete
        time.sleep(0.01)
    assert [process.returncode for process in processes] == [0, 0]
    assert contents.at(source.root, "a") in ("x", "y")
    kept = contents.history(source.root, "a", source.revisions("a"))
    assert sorted(contents.at(source.root, "a") + kept) == ["x", "y"]


def test_threads_keep_and_put_at_once(source: DirectorySource, contents: Contents) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda which: source.keep("a", contents.digest(which), contents.path(which)), "xyxyxyxy"))
        list(pool.map(lambda n: source.put(f"b{n}", contents.path("x"), contents.digest("x")), range(20)))
    assert sorted(contents.history(source.root, "a", source.revisions("a"))) == ["x", "y"]
    assert len(source.list().adapters) == 20


# -------------------------------------------------------------------------------------------------------- settings


def test_settings_are_replaced_if_nobody_else_did(source: DirectorySource) -> None:
    assert source.read_settings() == (b"", None)
    assert source.list().settings is None
    first = source.write_settings(b"1", None)
    assert source.read_settings() == (b"1", first)
    assert source.list().settings == first
    second = source.write_settings(b"2", first)
    assert second != first
    for expected in (first, None):
        with pytest.raises(ChangedMeanwhileError):
            source.write_settings(b"3", expected)
    assert source.read_settings() == (b"2", second)
    assert source.list().adapters == {}


# ------------------------------------------------------------------------------------------------- check_directory


def test_a_directory_is_checked(tmp_path: Path) -> None:
    check_directory(tmp_path)
    with pytest.raises(AdapterError, match="not a directory"):
        check_directory(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="itself an adapter"):
        check_directory(content(tmp_path / "a", "a"))


# ------------------------------------------------------------------------------------------------------- following


class Followed:
    """What a source says while it is followed.

    Attributes:
        told: everything, in order.
    """

    def __init__(self) -> None:
        self.told: list[Mapping[str, bool] | None] = []

    def everything(self) -> int:
        """How often everything was to be looked at."""
        return self.told.count(None)

    def names(self) -> dict[str, bool]:
        """All names, with what was said of each last."""
        return {name: whole for changed in self.told if changed for name, whole in changed.items()}

    async def until(self, name: str) -> bool:
        """Whether a name came in one step, when it comes."""
        await eventually(lambda: name in self.names(), f"{name} is told of")
        return self.names()[name]


@asynccontextmanager
async def following(source: DirectorySource) -> AsyncIterator[Followed]:
    followed = Followed()

    async def follow() -> None:
        async for changed in source.changes():
            followed.told.append(changed)

    task = asyncio.create_task(follow())
    await eventually(lambda: followed.told, "everything is to be looked at when it begins")
    assert followed.told[0] is None
    try:
        yield followed
        assert not task.done(), task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def still(source: DirectorySource) -> DirectorySource:
    """A source that is not looked through again while a test runs."""
    return DirectorySource(source.root, rescan_s=600.0)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await body()

    asyncio.run(main())


def test_what_changes_is_told(still: DirectorySource, contents: Contents, tmp_path: Path) -> None:
    async def body() -> None:
        async with following(still) as followed:
            content(tmp_path / "new", "x").rename(still.root / "moved")
            assert await followed.until("moved")
            for name in ("put", "put"):
                which = "y" if (still.root / name).exists() else "x"
                followed.told.clear()
                await asyncio.to_thread(still.put, name, contents.path(which), contents.digest(which))
                assert await followed.until(name), "it came in one step"
            followed.told.clear()
            (still.root / "put" / WEIGHTS_FILE).write_text("other")
            assert not await followed.until("put"), "it is being written"
            followed.told.clear()
            await asyncio.to_thread(still.remove, "put")
            await followed.until("put")
            assert all(not name.startswith(".") for name in followed.names())
            assert followed.everything() == 0

    run(body)


def test_settings_are_told_of_and_other_hidden_names_are_not(still: DirectorySource) -> None:
    async def body() -> None:
        async with following(still) as followed:
            content(still.root / ".new", "x")
            still.keep("a", digest_of(still.root / ".new"), still.root / ".new")
            await asyncio.to_thread(still.write_settings, b"{}", None)
            await eventually(lambda: {} in followed.told, "the settings are told of")
            assert followed.names() == {}
            assert followed.everything() == 1

    run(body)


def test_a_link_that_is_turned_is_noticed_and_followed(tmp_path: Path) -> None:
    async def body() -> None:
        for version in ("v1", "v2"):
            content(tmp_path / version / f"only-in-{version}", version)
        current = tmp_path / "current"
        current.symlink_to("v1")
        source = DirectorySource(current, rescan_s=600.0)
        async with following(source) as followed:
            assert list(source.list().adapters) == ["only-in-v1"]
            (tmp_path / "link").symlink_to("v2")
            (tmp_path / "link").rename(current)
            await eventually(lambda: followed.everything() > 1, "everything is to be looked at")
            assert list(source.list().adapters) == ["only-in-v2"]
            content(tmp_path / "new", "x").rename(tmp_path / "v2" / "new")
            await followed.until("new")
            source.put("put", tmp_path / "v2" / "new", digest_of(tmp_path / "v2" / "new"))
            assert (tmp_path / "v2" / "put").is_dir()

    run(body)


def test_a_volume_that_turns_its_data_is_looked_through(still: DirectorySource) -> None:
    """As Kubernetes does: NAME -> ..data/NAME, ..data -> ..2026."""

    async def body() -> None:
        for which in "12":
            content(still.root / f"..{which}" / "a", which)
        (still.root / "..data").symlink_to("..1")
        (still.root / "a").symlink_to("..data/a")
        async with following(still) as followed:
            (still.root / "..data_tmp").symlink_to("..2")
            (still.root / "..data_tmp").rename(still.root / "..data")
            await eventually(lambda: followed.everything() > 1, "everything is to be looked at")

    run(body)


def test_everything_is_looked_at_now_and_then(source: DirectorySource) -> None:
    async def body() -> None:
        async with following(DirectorySource(source.root, rescan_s=0.2)) as followed:
            await eventually(lambda: followed.everything() > 3, "again and again")

    run(body)


@pytest.mark.parametrize("trouble", ["no watches left", "no such directory"])
def test_what_cannot_be_watched_is_looked_at(
    trouble: str,
    source: DirectorySource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(directory: str) -> None:
        raise OSError(errno.ENOSPC, "OS file watch limit reached")

    tries = 0
    sleep = asyncio.sleep

    async def count(seconds: float) -> None:
        nonlocal tries
        tries += seconds == 0.25
        await sleep(seconds)

    async def body() -> None:
        monkeypatch.setattr(asyncio, "sleep", count)
        if trouble == "no watches left":
            monkeypatch.setattr("qaa_serve.sources.watch.start_watcher", fail)
        else:
            source.root.rename(tmp_path / "away")
        async with following(DirectorySource(source.root, rescan_s=0.25)) as followed:
            await eventually(lambda: followed.everything() > 2, "again and again")
            assert followed.everything() <= tries + 1, "and no more often than it should"
            if trouble == "no watches left":
                monkeypatch.undo()
            else:
                (tmp_path / "away").rename(source.root)
            await eventually(
                lambda: content(source.root / "b", "b") and "b" in followed.names(), "it is watched again"
            )

    with caplog.at_level(logging.WARNING):
        run(body)
    assert len([record for record in caplog.records if "Watching" in record.message]) == 1


def test_looking_does_not_block_the_loop(still: DirectorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that hangs."""
    main, asked = threading.get_ident(), []
    realpath = os.path.realpath

    def note(path: Any, **options: Any) -> str:
        asked.append(threading.get_ident())
        return realpath(path, **options)

    monkeypatch.setattr(os.path, "realpath", note)

    async def body() -> None:
        async with following(still):
            await eventually(lambda: len(asked) > 2, "it looks")

    run(body)
    assert main not in asked
