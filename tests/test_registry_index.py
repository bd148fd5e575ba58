"""The index of a state directory: it may be damaged in any way, and then knows less."""

from __future__ import annotations

import logging
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qaa_serve.registry import index as index_module
from qaa_serve.registry.index import Index, Verdict, base_fingerprint
from qaa_serve.sources import Listed, Listing

BASE = "f" * 64
VALID = Verdict("d1", "QAA", 4, 100, "org/base", {"layers": 2, "target_modules": ["q_proj"]}, None, None)
REFUSED = Verdict("d2", None, 0, 100, "", {}, "it has rank 4096; give it fewer heads", "invalid")


def listing(version: str = "v1", count: int = 5, identity: str = "here") -> Listing:
    adapters = {f"a{i:06}": Listed(version, 1e9 + i / 8, 1000 + i, settled=i % 2 == 0) for i in range(count)}
    return Listing(adapters, identity)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


@pytest.fixture
def restart(path: Path) -> Iterator[Callable[..., Index]]:
    """Open the index as a server's next start does."""
    opened: list[Index] = []

    def start(base: str = BASE) -> Index:
        for index in opened:
            index.close()
        opened.append(Index(path, base))
        return opened[-1]

    yield start
    for index in opened:
        index.close()


@pytest.fixture
def index(restart: Callable[..., Index]) -> Index:
    return restart()


def filled(path: Path, count: int = 500) -> None:
    """An index that knows something, as a server that has ended leaves it."""
    index = Index(path, BASE)
    index.note_listing(listing(count=count))
    for i, (name, listed) in enumerate(listing(count=count).adapters.items()):
        index.note(name, listed, f"d{i}")
        index.note_verdict(replace(VALID, digest=f"d{i}"))
    index.note_settings(b"{}")
    index.close()


def knows_nothing(index: Index) -> bool:
    return (index.listed(), list(index.known()), index.verdict("d1"), index.digest_of("a000001", "v1")) == (
        ({}, None), [], None, None
    ) and index.settings() is None  # fmt: skip


def works(index: Index) -> bool:
    """What it is told now, it knows."""
    index.note_listing(listing())
    index.note("a000001", listing().adapters["a000001"], "d1")
    index.note_verdict(VALID)
    index.note_settings(b"s")
    found = index.listed() == (listing().adapters, "here") and list(index.known()) == [("a000001", "v1", VALID)]
    return found and index.verdict("d1") == VALID and index.settings() == b"s"


# ------------------------------------------------------------------------------------------ what is known


def test_at_first_nothing_is_known(index: Index) -> None:
    assert knows_nothing(index)


def test_what_was_noted_is_known_after_a_restart(index: Index, restart: Callable[..., Index]) -> None:
    index.note_listing(listing())
    index.note_verdict(VALID)
    index.note_verdict(REFUSED)
    index.note("a000001", listing().adapters["a000001"], "d1")
    index.note("a000003", listing().adapters["a000003"], "d2")
    index.note("late", Listed("v9", 5.0, 7, complete=False), None)
    index.note_settings(b'{"pins": []}\xff')
    index = restart()
    assert index.listed() == ({**listing().adapters, "late": Listed("v9", 5.0, 7, complete=False)}, "here")
    assert list(index.known()) == [("a000001", "v1", VALID), ("a000003", "v1", REFUSED)]
    assert index.verdict("d2") == REFUSED
    assert index.settings() == b'{"pins": []}\xff'


def test_a_digest_is_known_of_the_version_it_was_noted_with(index: Index) -> None:
    listed = listing().adapters["a000001"]
    index.note_listing(listing())
    assert index.digest_of("a000001", "v1") is None
    index.note("a000001", listed, "d1")
    assert index.digest_of("a000001", "v1") == "d1"
    index.note_listing(listing())
    index.note("a000001", replace(listed, changed=3.0), None)  # the same, written again
    assert index.digest_of("a000001", "v1") == "d1"
    assert index.listed()[0]["a000001"].changed == 3.0
    assert index.digest_of("a000001", "v2") is None
    index.note_listing(listing("v2"))
    assert index.digest_of("a000001", "v1") is None
    assert index.digest_of("a000001", "v2") is None
    index.note_listing(listing("v1"))  # a version that comes back says nothing of what is there now
    assert index.digest_of("a000001", "v1") is None


def test_a_listing_takes_the_place_of_the_last(index: Index) -> None:
    index.note_listing(listing(count=5))
    index.note_listing(listing(count=3, identity="there"))
    assert index.listed() == (listing(count=3).adapters, "there")
    index.forget("a000000")
    index.forget("never there")
    assert sorted(index.listed()[0]) == ["a000001", "a000002"]
    index.note_listing(Listing({}, "there"))
    assert index.listed() == ({}, "there")


def test_verdicts_for_another_base_are_not_seen_and_not_lost(index: Index, restart: Callable[..., Index]) -> None:
    index.note_listing(listing())
    index.note("a000001", listing().adapters["a000001"], "d1")
    index.note_verdict(VALID)
    other = restart("0" * 64)
    assert other.verdict("d1") is None
    assert not list(other.known())
    other.note_verdict(replace(VALID, reason="it does not fit", error="invalid"))
    index = restart()
    assert index.verdict("d1") == VALID
    assert [verdict for *_, verdict in index.known()] == [VALID]


def test_a_verdict_is_replaced_by_a_later_one(index: Index) -> None:
    index.note_verdict(VALID)
    index.note_verdict(replace(VALID, rank=8))
    assert index.verdict("d1") == replace(VALID, rank=8)


def test_verdicts_of_what_is_not_listed_are_bounded(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_UNLISTED", 10)
    index.note_listing(listing())
    index.note("a000001", listing().adapters["a000001"], "d0")
    for i in range(30):
        index.note_verdict(replace(VALID, digest=f"d{i}"))
    index.note_listing(listing())
    left = [i for i in range(30) if index.verdict(f"d{i}")]
    assert left == [0, *range(20, 30)]


def test_verdicts_are_bounded_though_no_listing_comes(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where contents are replaced by the API alone."""
    monkeypatch.setattr(index_module, "MAX_UNLISTED", 10)
    monkeypatch.setattr(index_module, "_AT_ONCE", 50)
    index.note_listing(listing())
    index.note("a000001", listing().adapters["a000001"], "d0")
    for i in range(200):
        index.note_verdict(replace(VALID, digest=f"d{i}"))
    left = [i for i in range(200) if index.verdict(f"d{i}")]
    assert left[0] == 0
    assert left[-1] == 199
    assert len(left) <= 61


def test_a_name_that_is_no_text_is_left_out(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    """As a directory may have it; it is no adapter's name."""
    strange = "\udcff"
    index.note_listing(Listing({strange: Listed("v", 1.0, 1), **listing().adapters}, "here"))
    index.note(strange, Listed("v", 1.0, 1), "d1")
    index.forget(strange)
    assert index.digest_of(strange, "v") is None
    assert index.listed() == (listing().adapters, "here")
    assert not caplog.records


def test_100_000_adapters(index: Index, restart: Callable[..., Index]) -> None:
    many = listing(count=100_000)
    index.note_listing(many)
    index.note_listing(many)
    for i in range(0, 100_000, 50):
        index.note(f"a{i:06}", many.adapters[f"a{i:06}"], f"d{i}")
        index.note_verdict(replace(VALID, digest=f"d{i}"))
    index = restart()
    assert index.listed() == (many.adapters, "here")
    expected = [(f"a{i:06}", "v1", replace(VALID, digest=f"d{i}")) for i in range(0, 100_000, 50)]
    assert list(index.known()) == expected


def test_the_same_listing_again_writes_nothing(index: Index, path: Path, restart: Callable[..., Index]) -> None:
    """A large source is listed often."""
    index.note_listing(listing(count=20_000))
    restart().note_listing(listing(count=20_000))
    assert path.with_name("index.sqlite-wal").stat().st_size < 1 << 16


# ------------------------------------------------------------------------------------------------ damage


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("This is not an index. " * 1000)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5000:] = random.Random(0).randbytes(len(content) - 5000)
    path.write_bytes(content)


def newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


def foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE listed (id)")
        connection.execute("PRAGMA user_version = 1")
    connection.close()


def no_json(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE verdicts SET details = '{'")
    connection.close()


def no_utf8(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE listed SET version = CAST(x'ff' AS TEXT)")
    connection.close()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "README").write_text("a stranger's")


@pytest.mark.parametrize(
    "harm",
    [text, truncated, overwritten, newer, foreign, no_json, no_utf8, directory],
    ids=lambda harm: harm.__name__,
)
def test_what_cannot_be_read_is_set_aside_and_begun_anew(
    path: Path, restart: Callable[..., Index], caplog: pytest.LogCaptureFixture, harm: Any
) -> None:
    filled(path)
    harm(path)
    was = None if path.is_dir() else path.read_bytes()
    index = restart()
    assert bool(list(path.parent.glob("*.unreadable-*"))) == (harm not in (no_json, no_utf8))
    if harm in (no_json, no_utf8):  # these are found by what meets them
        index.verdict("d1")
        index.listed()
    assert knows_nothing(index)
    assert works(index)
    index.close()
    (aside,) = path.parent.glob("index.sqlite.unreadable-*[0-9]")
    if harm not in (no_json, no_utf8):
        assert (None if aside.is_dir() else aside.read_bytes()) == was
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(aside) in record.message
    assert works(restart())
    assert len(caplog.records) == 1


def test_an_empty_file_is_an_index_that_knows_nothing(path: Path) -> None:
    filled(path)
    empty(path)
    index = Index(path, BASE)
    assert knows_nothing(index)
    assert works(index)
    index.close()


def test_a_log_without_its_index_is_not_taken_for_it(path: Path) -> None:
    filled(path)
    index = Index(path, BASE)
    index.note_listing(listing("v2"))
    left = path.with_name("index.sqlite-wal").read_bytes()
    index.close()
    path.unlink()
    path.with_name("index.sqlite-wal").write_bytes(left)
    index = Index(path, BASE)
    assert knows_nothing(index)
    assert works(index)
    index.close()


def test_a_log_beside_what_is_unreadable_goes_with_it(path: Path, restart: Callable[..., Index]) -> None:
    path.mkdir()
    path.with_name("index.sqlite-wal").write_bytes(b"its log")
    assert works(restart())
    (aside,) = path.parent.glob("index.sqlite.unreadable-*[0-9]")
    assert aside.with_name(f"{aside.name}-wal").read_bytes() == b"its log"


def test_three_unreadable_files_are_kept_and_no_strangers_directory_is_deleted(path: Path) -> None:
    path.mkdir()
    (path / "README").write_text("a stranger's")
    for number in range(6):
        Index(path, BASE).close()
        path.write_text(f"number {number} is no index")
    Index(path, BASE).close()
    kept = sorted(path.parent.glob("index.sqlite.unreadable-*"))
    assert (kept[0] / "README").read_text() == "a stranger's"
    assert [file.read_text() for file in kept[1:]] == [f"number {number} is no index" for number in (3, 4, 5)]


def test_damage_that_comes_while_it_runs_costs_what_is_known_and_no_more(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(path, count=5000)
    index = Index(path, BASE)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(random.Random(0).randbytes(path.stat().st_size - 4096))
    index._connection.execute("PRAGMA shrink_memory")  # type: ignore[union-attr]
    index.listed()
    list(index.known())
    assert knows_nothing(index)
    assert works(index)
    index.close()
    assert len(list(path.parent.glob("index.sqlite.unreadable-*[0-9]"))) == 1
    assert len(caplog.records) == 1


def test_a_directory_that_is_gone_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = Index(tmp_path / "gone" / "index.sqlite", BASE)
    index.note_listing(listing())
    index.note_verdict(VALID)
    assert knows_nothing(index)
    index.close()
    assert len(caplog.records) == 1


def test_a_full_disk_is_logged_once_and_over_when_it_is(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    index.note_listing(listing())
    connection = index._connection
    assert connection is not None
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then says that the disk is full
    index.note_listing(listing("v2", count=10_000))
    index.note_settings(bytes(1 << 20))
    assert len(caplog.records) == 1
    assert "full" in caplog.text
    assert index.listed() == (listing().adapters, "here")  # as it was
    assert index.settings() is None
    connection.execute("PRAGMA max_page_count = 1000000")
    index.note_listing(listing("v2", count=10_000))
    assert index.listed() == (listing("v2", count=10_000).adapters, "here")


def test_an_index_that_somebody_locks_is_not_waited_for_long(index: Index, path: Path) -> None:
    somebody = sqlite3.connect(path)
    somebody.execute("BEGIN IMMEDIATE")
    index.note_verdict(VALID)
    assert index.verdict("d1") is None
    somebody.rollback()
    somebody.close()
    index.note_verdict(VALID)
    assert index.verdict("d1") == VALID
    assert not list(path.parent.glob("*.unreadable-*"))


def test_a_closed_index_knows_nothing(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    works(index)
    index.close()
    assert knows_nothing(index)
    index.note_verdict(VALID)
    assert not caplog.records


# ------------------------------------------------------------------------------------ kills and threads


KILLED = """
import sys, time
from pathlib import Path
from qaa_serve.registry.index import Index
from qaa_serve.sources import Listed, Listing

class Slow(dict):
    def items(self):
        for number, item in enumerate(super().items()):
            if number == len(self) // 2:
                print("half", flush=True)
                time.sleep(600)
            yield item

index = Index(Path(sys.argv[1]), "f" * 64)
index.note_verdict(index.verdict("d1"))
adapters = Slow({f"a{i:06}": Listed("v2", 1.0, 2) for i in range(20_000)})
index.note_listing(Listing(adapters, "there"))
"""


def test_a_kill_in_the_middle_of_a_listing_leaves_the_last_one(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(path)
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"half\n"
        server.kill()
    assert server.returncode == -signal.SIGKILL
    index = Index(path, BASE)
    assert index.listed() == (listing(count=500).adapters, "here")
    assert len(list(index.known())) == 500
    index.note_listing(listing("v2"))
    assert index.listed() == (listing("v2").adapters, "here")
    index.close()
    assert not caplog.records


def test_nobody_sees_half_a_listing(index: Index) -> None:
    half, seen = threading.Event(), threading.Event()

    class Slow(dict[str, Listed]):
        def items(self) -> Any:
            for number, item in enumerate(super().items()):
                if number == len(self) // 2:
                    half.set()
                    seen.wait(0.3)  # for long enough to see it
                yield item

    def look() -> tuple[dict[str, Listed], str | None]:
        assert half.wait(30)
        found = index.listed()
        seen.set()
        return found

    index.note_listing(listing())
    with ThreadPoolExecutor(1) as threads:
        looking = threads.submit(look)
        index.note_listing(Listing(Slow(listing("v2").adapters), "there"))
        assert looking.result() in [(listing().adapters, "here"), (listing("v2").adapters, "there")]


def test_many_threads_may_ask_and_tell(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    many = listing(count=3000)
    index.note_listing(many)

    def work(number: int) -> None:
        choose = random.Random(number)
        for _ in range(100):
            i = choose.randrange(3000)
            name = f"a{i:06}"
            match choose.randrange(6):
                case 0:
                    index.note_verdict(replace(VALID, digest=f"d{i}"))
                case 1:
                    index.note(name, many.adapters[name], f"d{i}")
                case 2:
                    assert index.digest_of(name, "v1") in (None, f"d{i}")
                case 3:
                    assert index.verdict(f"d{i}") in (None, replace(VALID, digest=f"d{i}"))
                case 4:
                    assert all(name == f"a{int(v.digest[1:]):06}" for name, _, v in index.known())
                case 5 if number == 0:
                    index.note_listing(many)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    assert index.listed() == (many.adapters, "here")
    assert not caplog.records


# ------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_is_of_all_that_a_verdict_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = {"a.q_proj": (16, 16), "a.k_proj": (16, 8)}
    one = base_fingerprint(widths, 1000)
    assert len(one) == 64
    assert one == base_fingerprint(dict(reversed(widths.items())), 1000)
    others = [
        base_fingerprint(None, 1000),
        base_fingerprint({}, 1000),
        base_fingerprint(widths, 1001),
        base_fingerprint({**widths, "a.k_proj": (16, 4)}, 1000),
    ]
    monkeypatch.setattr(index_module, "__version__", "99")
    others.append(base_fingerprint(widths, 1000))
    assert len({one, *others}) == 6
