from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from object_store import Server, Store, killable, make_files, new_store

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError, digest_of
from qaa_serve.sources import (
    HISTORY,
    SETTINGS_FILE,
    ChangedMeanwhileError,
    NoSuchRevisionError,
    ReadOnlyError,
    SourceError,
)
from qaa_serve.sources.objects import ObjectSource

MAX_BYTES = 1 << 20


@pytest.fixture(autouse=True)
def no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith(("AWS_", "FSSPEC_")) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def the_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(the_server: Server) -> Iterator[Server]:
    yield the_server
    the_server.denied = set()
    the_server.lose = lambda method, path: False


@pytest.fixture(params=["s3", "memory"])
def store(request: pytest.FixtureRequest, server: Server) -> Store:
    return new_store(request.param, server)


@pytest.fixture
def s3(server: Server) -> Store:
    return new_store("s3", server)


@pytest.fixture
def files(tmp_path: Path) -> Any:
    return lambda number: make_files(tmp_path / "files", number)


def fetched(source: ObjectSource, name: str, target: Path) -> str | None:
    """Digest of what the source serves as a name; None if it is nothing."""
    listed = source.look(name)
    if listed is None:
        return None
    target.mkdir(parents=True, exist_ok=True)
    source.fetch(name, listed.version, target, max_bytes=MAX_BYTES)
    assert sorted(file.name for file in target.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    return digest_of(target)


def wait_for_another_second() -> None:
    """S3 tells the time of a change in whole seconds."""
    time.sleep(1.05 - time.time() % 1)


# What people upload


def test_uploaded_files_are_listed_and_copied(store, files, tmp_path):
    source = store.source()
    assert source.list().adapters == {}
    directory, digest = files(1)
    store.upload(directory, "a", (CONFIG_FILE,))
    assert not source.list().adapters["a"].complete
    store.upload(directory, "a")
    listing = source.list()
    listed = listing.adapters["a"]
    assert listing.identity == store.url
    assert listed == source.look("a") == store.source().look("a")
    assert (listed.complete, listed.settled, listed.nbytes) == (True, False, 14)
    assert abs(listed.changed - time.time()) < 60
    assert fetched(source, "a", tmp_path / "copy") == digest
    assert source.look("b") is None


def test_another_upload_is_another_version(store, files, tmp_path):
    source = store.source()
    store.upload(files(1)[0], "a")
    before = source.look("a").version
    store.upload(files(2)[0], "a", (WEIGHTS_FILE,))
    with pytest.raises(ChangedMeanwhileError):
        source.fetch("a", before, tmp_path, max_bytes=MAX_BYTES)
    assert source.list().adapters["a"].version == source.look("a").version != before


def test_an_upload_while_it_is_copied_is_found_out(store, files, tmp_path, monkeypatch):
    source = store.source()
    store.upload(files(1)[0], "a")
    get_file = source._fs.get_file
    other = files(2)[0]
    (other / WEIGHTS_FILE).write_bytes(b"x" * 14)  # as many bytes as before

    def get_and_replace(path: str, target: str) -> None:
        get_file(path, target)
        store.upload(other, "a")

    monkeypatch.setattr(source._fs, "get_file", get_and_replace)
    with pytest.raises(ChangedMeanwhileError):
        source.fetch("a", source.look("a").version, tmp_path, max_bytes=MAX_BYTES)


def test_too_large_an_adapter_is_not_copied(store, files, tmp_path, monkeypatch):
    source = store.source()
    store.upload(files(1)[0], "a")
    monkeypatch.setattr(source._fs, "get_file", lambda *_: pytest.fail("it was copied"))
    with pytest.raises(AdapterError, match="14 bytes; at most 13"):
        source.fetch("a", source.look("a").version, tmp_path, max_bytes=13)


def test_only_adapters_are_listed(store, files):
    store.upload(files(1)[0], ".hidden")
    store.upload(files(1)[0], "a/nested")
    store.fs.pipe_file(f"{store.url}/b/README.md", b"text")
    assert store.source().list().adapters == {}


def test_an_adapter_is_no_source(store, files):
    store.upload(files(1)[0], "a")
    with pytest.raises(SourceError, match="itself an adapter"):
        ObjectSource(f"{store.url}/a", storage_options=store.options).list()


# What is put


def test_what_is_put_is_served_in_one_step(store, files, tmp_path):
    directory, digest = files(1)
    listed = store.source().put("a", directory, digest)
    assert listed.settled
    other = store.source()
    assert other.list().adapters["a"].version == other.look("a").version == listed.version
    assert other.look("a").nbytes == other.list().adapters["a"].nbytes == listed.nbytes == 14
    assert fetched(other, "a", tmp_path / "copy") == digest
    assert other.revisions("a") == []


def test_a_listing_reads_no_heads(store, files, monkeypatch):
    for name in ("a", "b", "gone"):
        store.source().put(name, *files(1))
        store.source().put(name, *files(2))
    store.source().remove("gone")
    store.upload(files(3)[0], "b")
    store.source().keep("b", files(2)[1], files(2)[0])
    source = store.source()
    monkeypatch.setattr(source._fs, "cat_file", lambda *_: pytest.fail("a head was read"))
    assert set(source.list().adapters) == {"a", "b"}


def test_put_replaces_an_upload_and_keeps_it(store, files, tmp_path):
    source = store.source()
    store.upload(files(1)[0], "a")
    store.fs.pipe_file(f"{store.url}/a/README.md", b"text")
    source.put("a", *files(2))
    assert fetched(source, "a", tmp_path / "copy") == files(2)[1]
    assert source.revisions("a") == [files(1)[1]]
    source.fetch_revision("a", files(1)[1], tmp_path, max_bytes=MAX_BYTES)
    assert digest_of(tmp_path) == files(1)[1]
    assert {key for key in store.everything() if not key.startswith(HISTORY)} == {"a/README.md"}


def test_a_file_that_is_no_adapter_yet_is_not_lost(store, files):
    store.upload(files(1)[0], "a", (CONFIG_FILE,))
    store.source().put("a", *files(2))
    store.source().put("a", *files(3))
    kept = [key for key in store.everything() if "incomplete" in key]
    assert [store.fs.cat_file(f"{store.url}/{key}") for key in kept] == [(files(1)[0] / CONFIG_FILE).read_bytes()]


def test_an_upload_is_newer_than_what_was_put(store, files, tmp_path):
    source = store.source()
    source.put("a", *files(1))
    store.upload(files(2)[0], "a")
    assert fetched(source, "a", tmp_path / "2") == files(2)[1]
    assert source.list().adapters["a"] == source.look("a") == store.source().list().adapters["a"]


def test_the_same_upload_again_is_newer_too(store, files, tmp_path):
    source = store.source()
    store.upload(files(1)[0], "a")
    wait_for_another_second()
    source.put("a", *files(2))
    store.upload(files(1)[0], "a")
    assert fetched(source, "a", tmp_path / "1") == files(1)[1]


def test_what_an_upload_replaced_is_kept_and_does_not_come_back(store, files, tmp_path):
    source = store.source()
    source.put("a", *files(1))
    store.upload(files(2)[0], "a")
    version = source.look("a").version
    for _ in range(2):
        source.keep("a", files(1)[1], files(1)[0])
        assert source.revisions("a") == [files(1)[1]]
    assert source.look("a").version == version
    store.upload(files(3)[0], "a")
    source.keep("a", files(2)[1], files(2)[0])
    assert source.revisions("a") == [files(1)[1], files(2)[1]]
    store.delete("a")
    assert source.look("a") is None
    assert source.list().adapters == {}


def test_keep_does_not_end_what_is_served(store, files, tmp_path):
    source = store.source()
    source.put("a", *files(1))
    source.keep("a", files(1)[1], files(1)[0])
    assert source.revisions("a") == []
    source.keep("a", files(2)[1], files(2)[0])
    assert source.revisions("a") == [files(2)[1]]
    store.upload(files(3)[0], "a", (CONFIG_FILE,))  # half an upload replaces nothing yet
    source.keep("a", files(2)[1], files(2)[0])
    store.fs.rm_file(f"{store.url}/a/{CONFIG_FILE}")
    assert fetched(source, "a", tmp_path / "copy") == files(1)[1]


def test_the_order_of_the_history(store, files):
    source = store.source()
    one, two, three, four = (files(number)[1] for number in (1, 2, 3, 4))
    for number in (1, 2, 3):
        source.put("a", *files(number))
    assert source.revisions("a") == [one, two]
    source.put("a", *files(2), again=True)
    assert source.revisions("a") == [one, two, three]
    source.put("a", *files(1), again=True)
    assert source.revisions("a") == [one, two, three]
    source.put("a", *files(4))
    assert source.revisions("a") == [two, three, one]
    source.put("a", *files(2))
    assert source.revisions("a") == [three, one, four]
    source.put("a", *files(2))
    assert source.revisions("a") == [three, one, four]


def test_expected(store, files):
    source = store.source()
    with pytest.raises(ChangedMeanwhileError):
        source.put("a", *files(1), expected="head:other")
    first = source.put("a", *files(1), expected="")
    second = source.put("a", *files(2), expected=first.version)
    for stale in ("", first.version):
        with pytest.raises(ChangedMeanwhileError):
            source.put("a", *files(3), expected=stale)
        with pytest.raises(ChangedMeanwhileError):
            source.remove("a", expected=stale)
    assert source.look("a").version == second.version
    source.remove("a", expected=second.version)
    source.put("a", *files(1), expected="")


def test_remove_and_put_again(store, files, tmp_path):
    source = store.source()
    source.put("a", *files(1))
    store.upload(files(2)[0], "a")
    source.remove("a")
    assert source.look("a") is None
    assert store.source().list().adapters == {}
    assert source.revisions("a") == [files(1)[1], files(2)[1]]
    source.remove("a")
    source.put("a", *files(3))
    assert source.revisions("a") == [files(1)[1], files(2)[1]]
    assert fetched(source, "a", tmp_path / "copy") == files(3)[1]


@pytest.mark.parametrize("removed_before", [False, True])
def test_purge_leaves_nothing(store, files, removed_before):
    source = store.source()
    source.put("a", *files(1))
    store.upload(files(1)[0], "a", (CONFIG_FILE,))
    source.put("a", *files(2))
    store.upload(files(3)[0], "a")
    source.put("b", *files(1))
    others = {key for key in store.everything() if "b" in key.split("/")}
    if removed_before:
        source.remove("a")
    source.remove("a", purge=True)
    source.remove("never-there", purge=True)
    assert store.everything() == others
    assert source.revisions("a") == []


def test_prune(store, files, tmp_path):
    source = store.source()
    digests = [files(number)[1] for number in range(5)]
    for number in range(5):
        source.put("a", *files(number))
    version = source.look("a").version
    source.prune("a", 1, protected=[digests[1]])
    assert source.revisions("a") == [digests[1], digests[3]]
    assert source.look("a").version == version
    with pytest.raises(NoSuchRevisionError):
        source.fetch_revision("a", digests[0], tmp_path, max_bytes=MAX_BYTES)
    source.put("a", *files(3), again=True)
    source.prune("a", 0)
    assert source.revisions("a") == []
    assert fetched(source, "a", tmp_path / "copy") == digests[3]


def test_settings_are_replaced_in_one_step(store):
    source = store.source()
    assert source.read_settings() == (b"", None)
    assert source.list().settings is None
    first = source.write_settings(b"one", None)
    assert source.read_settings() == (b"one", first)
    assert source.list().settings == first
    with pytest.raises(ChangedMeanwhileError):
        source.write_settings(b"two", None)
    second = source.write_settings(b"two", first)
    with pytest.raises(ChangedMeanwhileError):
        source.write_settings(b"three", first)
    assert store.source().read_settings() == (b"two", second)
    assert store.everything() == {SETTINGS_FILE}


def test_changes(store):
    async def first_two() -> list[Any]:
        source = ObjectSource(store.url, poll_s=0.01, storage_options=store.options)
        found = []
        async for change in source.changes():
            found.append(change)
            if len(found) == 2:
                break
        return found

    assert asyncio.run(first_two()) == [None, None]


# Several at once


def test_of_two_writers_one_wins(store, files, tmp_path):
    listed = store.source().put("a", *files(0))
    for number in range(1, 9, 2):
        start = threading.Barrier(2)

        def write(mine: int, expected: str = listed.version, start: threading.Barrier = start) -> Any:
            source = store.source()
            start.wait()
            try:
                return source.put("a", *files(mine), expected=expected)
            except ChangedMeanwhileError:
                return None

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(write, (number, number + 1)))
        (listed,) = filter(None, results)
        winner = number if results[0] else number + 1
        assert fetched(store.source(), "a", tmp_path / str(number)) == files(winner)[1]
    store.source().put("a", *files(9))
    assert len([key for key in store.everything() if key.endswith(WEIGHTS_FILE)]) == 6  # none of a loser's


def test_changes_that_ask_for_nothing_all_happen(store, files):
    source = store.source()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: source.put("a", *files(number)), range(3)))
    assert len(source.revisions("a")) == 2


def test_many_threads(store, files, tmp_path):
    source = store.source()

    def use(number: int) -> str | None:
        source.put(f"n{number}", *files(number))
        source.list()
        return fetched(source, f"n{number}", tmp_path / str(number))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(16))) == [files(number)[1] for number in range(16)]


def test_nothing_is_gone_only_because_a_listing_missed_it(store, files, monkeypatch):
    """A listing has many pages: what changes from an upload to a head while it runs may be in none of them."""
    source = store.source()
    store.upload(files(1)[0], "a")
    source.list()
    find = source._fs.find
    monkeypatch.setattr(source._fs, "find", lambda path, **how: find(path, **how) if "prefix" in how else {})
    assert "a" in source.list().adapters


def test_what_is_put_while_an_adapter_is_purged_stays(store, files, tmp_path, monkeypatch):
    source = store.source()
    source.put("a", *files(1))
    write = source._write

    def write_and_go_on(*args: Any) -> Any:
        etag = write(*args)
        store.source().put("a", *files(2))
        return etag

    monkeypatch.setattr(source, "_write", write_and_go_on)
    source.remove("a", purge=True)
    assert fetched(store.source(), "a", tmp_path / "copy") == files(2)[1]


def test_a_look_meets_what_is_there_while_it_is_replaced(store, files, monkeypatch):
    source = store.source()
    store.upload(files(1)[0], "a")
    find, others = source._fs.find, iter([2])

    def find_and_replace(*args: Any, **how: Any) -> Any:
        found = find(*args, **how)
        for number in others:
            store.source().put("a", *files(number))
        return found

    monkeypatch.setattr(source._fs, "find", find_and_replace)
    assert source.look("a") is not None


def slow_source(store: Store, files: Any, monkeypatch: pytest.MonkeyPatch, number: int) -> ObjectSource:
    """A source that another one's change comes before, just when it would make its own."""
    slow = store.source()
    write, others = slow._write, iter([number])

    def write_late(*args: Any) -> Any:
        for other in others:
            store.source().put("a", *files(other))
        return write(*args)

    monkeypatch.setattr(slow, "_write", write_late)
    return slow


def test_a_change_is_made_again_after_another_one(store, files, tmp_path, monkeypatch):
    """The other one clears away what is not its own, and so what the slow one uploaded."""
    store.source().put("a", *files(0))
    slow = slow_source(store, files, monkeypatch, 1)
    slow.put("a", *files(2))
    assert fetched(slow, "a", tmp_path / "copy") == files(2)[1]
    assert slow.revisions("a") == [files(0)[1], files(1)[1]]


def test_a_change_that_expects_something_gives_way_to_another_one(store, files, tmp_path, monkeypatch):
    version = store.source().put("a", *files(0)).version
    slow = slow_source(store, files, monkeypatch, 1)
    with pytest.raises(ChangedMeanwhileError):
        slow.put("a", *files(2), expected=version)
    assert fetched(slow, "a", tmp_path / "copy") == files(1)[1]


# When something is wrong


def test_a_lost_answer_is_no_conflict(s3, server, files, tmp_path):
    source = s3.source()
    listed = source.put("a", *files(1))
    settings = source.write_settings(b"one", None)
    losses = [f"{HISTORY}/a/head.json", SETTINGS_FILE]

    def lose(method: str, path: str) -> bool:
        lost = method == "PUT" and any(path.endswith(end) for end in losses)
        losses[:] = [end for end in losses if not (lost and path.endswith(end))]
        return lost

    server.lose = lose
    source.put("a", *files(2), expected=listed.version)
    source.write_settings(b"two", settings)
    assert losses == []
    assert fetched(s3.source(), "a", tmp_path / "copy") == files(2)[1]


def test_a_store_that_may_only_be_read(s3, server, files, tmp_path):
    source = s3.source()
    source.put("a", *files(1))
    server.denied = {"PUT", "DELETE"}
    with pytest.raises(ReadOnlyError, match="credentials"):
        source.put("a", *files(2))
    with pytest.raises(ReadOnlyError):
        source.remove("a")
    with pytest.raises(ReadOnlyError):
        source.write_settings(b"one", None)
    assert fetched(source, "a", tmp_path / "copy") == files(1)[1]
    server.denied = {"GET", "HEAD"}
    with pytest.raises(SourceError, match="credentials"):
        source.list()


def test_what_cannot_be_deleted_is_replaced_all_the_same(s3, server, files, tmp_path, caplog):
    source = s3.source()
    s3.upload(files(1)[0], "a")
    server.denied = {"DELETE"}
    source.put("a", *files(2))
    assert fetched(s3.source(), "a", tmp_path / "2") == files(2)[1]
    assert "stays there for now" in caplog.text
    source.remove("a")
    assert s3.source().list().adapters == {}
    with pytest.raises(ReadOnlyError):
        source.remove("a", purge=True)


def test_a_bucket_that_is_not_there(server):
    source = ObjectSource("s3://no-such-bucket/prefix", storage_options=server.options)
    for ask in (source.list, lambda: source.look("a"), lambda: source.write_settings(b"", None)):
        with pytest.raises(SourceError, match="check the name of the bucket"):
            ask()


def test_an_endpoint_that_is_not_there(s3):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(SourceError, match=f"{endpoint}.*can be reached"):
            s3.source(endpoint_url=endpoint).list()
        assert time.monotonic() - start < 30


def test_an_endpoint_that_does_not_answer(s3):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SourceError, match="imeout"):
            s3.source(endpoint_url=endpoint, config_kwargs={"read_timeout": 0.2}).list()


def test_a_damaged_head(store, files):
    source = store.source()
    source.put("a", *files(1))
    source.put("b", *files(1))
    before = store.everything()
    store.fs.pipe_file(f"{store.url}/{HISTORY}/a/head.json", b"nonsense")
    for ask in (source.look, source.revisions, lambda name: source.put(name, *files(2))):
        with pytest.raises(SourceError, match="damaged"):
            ask("a")
    assert "b" in source.list().adapters
    assert store.everything() == before


def test_what_was_put_and_is_gone(store, files, tmp_path):
    source = store.source()
    source.put("a", *files(1))
    for key in store.everything():
        if key.endswith(WEIGHTS_FILE):
            store.fs.rm_file(f"{store.url}/{key}")
    assert not source.look("a").complete
    with pytest.raises(SourceError, match=f"no {WEIGHTS_FILE}"):
        source.fetch("a", source.look("a").version, tmp_path, max_bytes=MAX_BYTES)


@pytest.mark.parametrize("url", ["s3://", "nonsense://bucket", "s3"])
def test_urls_that_are_none(url):
    with pytest.raises(AdapterError):
        ObjectSource(url)


# Where the options come from


def test_the_environment_says_where_the_store_is(s3, server, files, monkeypatch):
    s3.source().put("a", *files(1))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    assert set(ObjectSource(s3.url).list().adapters) == {"a"}


def test_fsspec_settings_of_the_environment(s3, server, files):
    s3.source().put("a", *files(1))
    settings = {
        "FSSPEC_S3_ENDPOINT_URL": server.options["endpoint_url"],
        "FSSPEC_S3_KEY": "testing",
        "FSSPEC_S3_SECRET": "testing",
    }
    make = "from qaa_serve.sources.objects import ObjectSource"
    code = f"{make}; print(*ObjectSource({s3.url!r}).list().adapters)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["a"], run.stderr


def test_sources_do_not_need_fsspec():
    code = "import sys; sys.modules['fsspec'] = None; import qaa_serve.sources"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


# A process that is killed


@pytest.fixture(scope="module")
def change_and_die() -> Iterator[Any]:
    with killable(Path(__file__).parent) as change:
        yield change


def prepare(store: Store, files: Any, uploaded: bool) -> ObjectSource:
    """Two contents in the history, and a third one that is served."""
    source = store.source()
    source.put("a", *files(1))
    source.put("a", *files(2))
    if uploaded:
        store.upload(files(3)[0], "a")
        source.keep("a", files(2)[1], files(2)[0])
    else:
        source.put("a", *files(3))
    return source


CHANGES = {
    "put": lambda files: ("put", "a", *files(4)),
    "put again": lambda files: ("put", "a", *files(1)),
    "remove": lambda files: ("remove", "a"),
    "keep": lambda files: ("keep", "a", files(4)[1], files(4)[0]),
    "prune": lambda files: ("prune", "a", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("uploaded", [False, True], ids=["put before", "uploaded before"])
@pytest.mark.parametrize("change", CHANGES)
def test_killed_at_any_request(server, files, tmp_path, change_and_die, change, uploaded):
    method, *args = CHANGES[change](files)
    flags = {"again": True} if change == "put again" else {}
    after = {"put": files(4)[1], "put again": files(1)[1], "remove": None}.get(change, files(3)[1])
    steps, died = 0, True
    while died:
        store = new_store("s3", server)
        prepare(store, files, uploaded)
        died = change_and_die(store, steps, method, *args, **flags)
        fresh = store.source()
        found = fetched(fresh, "a", tmp_path / f"{steps}-served")
        assert found in {files(3)[1], after}, f"killed at request {steps}"
        assert found == after or died
        listed, looked = store.source().list().adapters.get("a"), fresh.look("a")
        assert (listed and listed.version) == (looked and looked.version)
        assert listed is None or (listed.complete and listed.nbytes >= looked.nbytes)
        kept = fresh.revisions("a")
        if method != "prune":
            assert {files(1)[1], files(2)[1]} <= {*kept, found}
            assert files(3)[1] in {*kept, found}, "what was served is lost"
        for number, digest in enumerate(kept):
            target = tmp_path / f"{steps}-{number}"
            target.mkdir()
            fresh.fetch_revision("a", digest, target, max_bytes=MAX_BYTES)
            assert digest_of(target) == digest
        # What was left is cleared away by the next change: there are a head and what it speaks of.
        fresh.put("a", *files(5))
        state = fresh._state("a")
        places = {state.head.content, *state.head.history}
        used = {f"{HISTORY}/a/{place}/{file}" for place in places for file in (CONFIG_FILE, WEIGHTS_FILE)}
        assert store.everything() == {f"{HISTORY}/a/head.json", *used}
        steps += 1
    assert steps > 1
