"""The watched directory: what is put there is served, and nothing that is half there or only out of sight."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from registry_support import FakeEngine, eventually, make, make_catalogue, make_store

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, digest_of
from qaa_serve.registry import Catalogue, DirectoryWatcher, Revision
from qaa_serve.registry import directory as directory_module

QUIET_S = 0.2


class Watched:
    """A watched directory, the catalogue behind it, and every revision that was published."""

    def __init__(self, root: Path, directory: Path, **settings: Any):
        self.root, self.directory = root, directory
        self.engine = FakeEngine()
        self.store = make_store(root / "state")
        self.catalogue = make_catalogue(self.store, self.engine)
        self.watcher = DirectoryWatcher(directory, self.catalogue, **{"quiet_s": QUIET_S, **settings})
        self.looks = 0
        look = self.watcher._look

        async def counting_look(changed: Any) -> None:
            await look(changed)
            self.looks += 1

        self.watcher._look = counting_look  # type: ignore[method-assign]

    def digest(self, name: str) -> str | None:
        """Of what is served under a name."""
        revision = self.catalogue.resolve(name)
        return revision.digest if revision else None

    def rejection(self, name: str) -> str | None:
        """Why a name's newest content is not served."""
        entry = self.catalogue.entries.get(name)
        return entry.rejection.reason if entry and entry.rejection else None

    async def until_served(self, name: str, digest: str | None) -> None:
        await eventually(lambda: self.digest(name) == digest, f"{name} serves {digest}")

    async def looked(self) -> None:
        """Until a look that began after now has ended."""
        looks = self.looks
        await eventually(lambda: self.looks > looks + 1, "it looked")

    async def idle(self) -> None:
        """Until everything that lies there has been seen to."""
        looks = self.looks
        await asyncio.sleep(1.5 * self.watcher._quiet_s)
        await eventually(lambda: self.looks > looks + 2, "it looked")
        if not self.watcher._lost:
            await eventually(lambda: not self.watcher._waiting, "nothing is waited for")


@asynccontextmanager
async def watching(root: Path, directory: Path | None = None, **settings: Any) -> AsyncIterator[Watched]:
    if directory is None:
        directory = root / "adapters"
        directory.mkdir(exist_ok=True)
    watched = Watched(root, directory, **settings)
    await watched.catalogue.restore()
    await watched.watcher.publish_all()
    watched.catalogue.start()
    task = asyncio.create_task(watched.watcher.run())
    await eventually(lambda: watched.looks > 1, "the watch has begun")
    try:
        yield watched
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        watched.store.close()


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await body()

    asyncio.run(main())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the watcher takes for the time: `now` goes on when the test says so, however slow the machine is."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(directory_module, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    return clock


def drop(source: Path, target: Path) -> str:
    """Put an adapter into place by a rename; its digest."""
    digest = digest_of(source)
    source.rename(target)
    return digest


# ------------------------------------------------------------------------------------------- what comes and goes


def test_what_is_there_at_the_start_is_published(tmp_path: Path) -> None:
    async def body() -> None:
        digest = digest_of(make(tmp_path / "adapters" / "a"))
        make(tmp_path / "adapters" / "b")
        (tmp_path / "adapters" / "b" / CONFIG_FILE).write_text("{")
        async with watching(tmp_path) as watched:
            assert watched.digest("a") == digest
            assert "is not JSON" in (watched.rejection("b") or "")

    run(body)


def test_what_comes_by_a_rename_is_not_waited_for(tmp_path: Path) -> None:
    async def body() -> None:
        async with watching(tmp_path, quiet_s=120.0) as watched:  # which nothing here waits for
            await watched.until_served("a", drop(make(tmp_path / "new"), watched.directory / "a"))

    run(body)


def test_what_the_trainer_saves_over_an_adapter_replaces_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with watching(tmp_path) as watched:
            for seed in range(3):
                make(watched.directory / "a", seed)
                await watched.until_served("a", digest_of(watched.directory / "a"))
            assert len(watched.catalogue.entries["a"].kept) == 2

    run(body)


def test_a_slow_copy_is_published_when_it_is_complete(tmp_path: Path, clock: SimpleNamespace) -> None:
    async def body() -> None:
        source = make(tmp_path / "new")
        async with watching(tmp_path, quiet_s=0.1) as watched:
            place = watched.directory / "a"
            place.mkdir()
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                content = (source / name).read_bytes()
                for end in range(0, len(content), len(content) // 5):
                    (place / name).write_bytes(content[: end + len(content) // 5])
                    await watched.looked()
                    clock.now += 0.09
                    await watched.looked()
                    assert watched.engine.loads == []
                    assert "a" not in watched.catalogue.entries, "neither served nor rejected"
            clock.now += 0.09
            await watched.until_served("a", digest_of(source))
            assert watched.rejection("a") is None

    run(body)


def test_a_change_in_place_is_a_new_revision(tmp_path: Path) -> None:
    async def body() -> None:
        make(tmp_path / "adapters" / "a", 1)
        async with watching(tmp_path) as watched:
            old = watched.digest("a")
            other = make(tmp_path / "new", 2)
            (watched.directory / "a" / WEIGHTS_FILE).write_bytes((other / WEIGHTS_FILE).read_bytes())
            await watched.until_served("a", digest_of(other))
            assert [revision.digest for revision in watched.catalogue.entries["a"].kept] == [old]

    run(body)


def test_a_pair_that_is_half_replaced_is_not_published(tmp_path: Path, clock: SimpleNamespace) -> None:
    """The config of one and the weights of another can be valid together, and nobody's."""

    async def body() -> None:
        make(tmp_path / "adapters" / "a", 1)
        other = make(tmp_path / "new", 2, alpha=3.0)
        async with watching(tmp_path, quiet_s=0.1) as watched:
            old = watched.digest("a")
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                (watched.directory / "a" / name).write_bytes((other / name).read_bytes())
                await watched.looked()
                clock.now += 0.09
                await watched.looked()
                assert watched.digest("a") == old
            clock.now += 0.09
            await watched.until_served("a", digest_of(other))
            assert [revision.digest for revision in watched.catalogue.entries["a"].kept] == [old]

    run(body)


def test_a_pair_that_changes_while_it_is_read_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        make(tmp_path / "adapters" / "a", 1)
        second, third = make(tmp_path / "2", 2), make(tmp_path / "3", 3, alpha=3.0)
        async with watching(tmp_path) as watched:
            admit = watched.store.admit
            place = watched.directory / "a"

            def admit_and_change(source: Path, name: str) -> Revision:
                revision = admit(source, name)
                if revision.digest == digest_of(second):
                    for file in (CONFIG_FILE, WEIGHTS_FILE):
                        (place / file).write_bytes((third / file).read_bytes())
                return revision

            monkeypatch.setattr(watched.store, "admit", admit_and_change)
            (place / WEIGHTS_FILE).write_bytes((second / WEIGHTS_FILE).read_bytes())
            await watched.until_served("a", digest_of(third))
            assert len(watched.engine.loads) == 2
            assert watched.rejection("a") is None

    run(body)


def test_what_is_wrong_is_rejected_and_the_last_good_one_serves_until_it_is_fixed(tmp_path: Path) -> None:
    async def body() -> None:
        make(tmp_path / "adapters" / "a", 1)
        fixed = make(tmp_path / "new", 2)
        async with watching(tmp_path, rescan_s=0.1) as watched:
            old = watched.digest("a")
            weights = watched.directory / "a" / WEIGHTS_FILE
            weights.write_bytes(b"damaged")
            await eventually(lambda: watched.rejection("a"), "it is rejected")
            rejection = watched.catalogue.entries["a"].rejection
            await watched.idle()
            assert watched.catalogue.entries["a"].rejection is rejection, "told once"
            assert "damaged or no safetensors file" in rejection.reason
            assert watched.digest("a") == old
            weights.write_bytes((fixed / WEIGHTS_FILE).read_bytes())
            await watched.until_served("a", digest_of(fixed))
            assert watched.rejection("a") is None

    run(body)


def test_what_is_removed_goes(tmp_path: Path) -> None:
    async def body() -> None:
        for name in "abcd":
            make(tmp_path / "adapters" / name)
        async with watching(tmp_path) as watched:
            shutil.rmtree(watched.directory / "a")
            (watched.directory / "b").rename(tmp_path / "elsewhere")
            (watched.directory / "c").rename(watched.directory / ".c")
            for name in "abc":
                await eventually(lambda name=name: name not in watched.catalogue.entries, f"{name} is gone")
            assert watched.digest("d") is not None
            shutil.rmtree(watched.directory / "d")  # the last one: the directory is empty, but the same
            await watched.until_served("d", None)

    run(body)


def test_what_is_renamed_has_its_new_name(tmp_path: Path) -> None:
    async def body() -> None:
        make(tmp_path / "adapters" / "a")
        async with watching(tmp_path) as watched:
            digest = watched.digest("a")
            (watched.directory / "a").rename(watched.directory / "b")
            await watched.until_served("b", digest)
            await watched.until_served("a", None)

    run(body)


def test_touching_publishes_nothing_anew(tmp_path: Path) -> None:
    async def body() -> None:
        make(tmp_path / "adapters" / "a")
        async with watching(tmp_path) as watched:
            published = watched.catalogue.entries["a"].published
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                os.utime(watched.directory / "a" / name, (1, time.time()))
            await watched.idle()
            assert watched.catalogue.entries["a"].published == published
            assert len(watched.engine.loads) == 1

    run(body)


def test_hidden_directories_and_other_files_are_passed_over(tmp_path: Path) -> None:
    async def body() -> None:
        make(tmp_path / "adapters" / "a")
        async with watching(tmp_path, rescan_s=0.1) as watched:
            make(watched.directory / ".b")
            (watched.directory / "notes.txt").write_text("x")
            (watched.directory / "notes").mkdir()
            (watched.directory / "notes" / "README.md").write_text("x")
            (watched.directory / "a" / "README.md").write_text("x")
            (watched.directory / "dangling").symlink_to("nowhere")
            await watched.idle()
            assert list(watched.catalogue.entries) == ["a"]
            assert watched.rejection("a") is None
            assert len(watched.engine.loads) == 1
            make(watched.directory / "notes")  # now it is one
            await watched.until_served("notes", digest_of(watched.directory / "notes"))
            (watched.directory / "notes" / CONFIG_FILE).unlink()
            (watched.directory / "notes" / WEIGHTS_FILE).unlink()  # and now no more
            await watched.until_served("notes", None)

    run(body)


def test_a_removal_by_the_api_lasts_until_the_directory_changes(tmp_path: Path) -> None:
    async def body() -> None:
        make(tmp_path / "adapters" / "a")
        for _ in range(2):  # over a restart, too
            async with watching(tmp_path, rescan_s=0.1) as watched:
                if watched.digest("a"):
                    await watched.catalogue.remove("a")
                os.utime(watched.directory / "a" / CONFIG_FILE)
                await watched.idle()
                assert watched.digest("a") is None
        async with watching(tmp_path) as watched:
            make(watched.directory / "a", 2)
            await watched.until_served("a", digest_of(watched.directory / "a"))

    run(body)


def test_what_went_while_no_server_ran_goes(tmp_path: Path) -> None:
    async def body() -> None:
        make(tmp_path / "adapters" / "a")
        make(tmp_path / "adapters" / "b")
        async with watching(tmp_path):
            pass
        shutil.rmtree(tmp_path / "adapters" / "a")
        async with watching(tmp_path) as watched:
            assert list(watched.catalogue.entries) == ["b"]

    run(body)


def test_what_is_being_written_at_the_start_is_not_taken_for_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        place = make(tmp_path / "adapters" / "a", 1)
        async with watching(tmp_path):
            pass
        old = digest_of(place)
        new = make(tmp_path / "new", 2)
        watched = Watched(tmp_path, tmp_path / "adapters")
        admit = watched.store.admit

        def admit_and_change(source: Path, name: str) -> Revision:
            revision = admit(source, name)
            (place / WEIGHTS_FILE).write_bytes((new / WEIGHTS_FILE).read_bytes())
            return revision

        await watched.catalogue.restore()
        watched.store.admit = admit_and_change  # type: ignore[method-assign]
        await watched.watcher.publish_all()
        assert watched.digest("a") == old
        watched.store.close()

    run(body)


def test_what_may_be_incomplete_is_waited_for(tmp_path: Path, clock: SimpleNamespace) -> None:
    """Look by look."""

    async def body() -> None:
        (tmp_path / "adapters").mkdir()
        watched = Watched(tmp_path, tmp_path / "adapters", quiet_s=1.0)
        look = watched.watcher._look
        place = make(watched.directory / "a")
        sound = (place / WEIGHTS_FILE).read_bytes()
        (place / WEIGHTS_FILE).write_bytes(sound[:-1])
        await look([Path("a")])  # as if it came by a rename
        clock.now += 0.9
        await look([])
        assert watched.catalogue.entries == {}
        (place / WEIGHTS_FILE).write_bytes(sound)
        clock.now += 0.2
        await look([Path("a") / WEIGHTS_FILE])
        clock.now += 0.9
        await look([])
        assert watched.catalogue.entries == {}
        clock.now += 0.2
        await look([])
        assert watched.digest("a") == digest_of(place)
        (place / WEIGHTS_FILE).write_bytes(sound[:-1])
        await look([])
        assert watched.rejection("a") is None
        clock.now += 20.0
        await look([])
        clock.now += 1.1
        await look([])
        assert watched.rejection("a") is not None
        watched.directory.rename(tmp_path / "away")
        for _ in range(3):
            await look([Path("a")])
            clock.now += 1.1
        assert watched.digest("a") is not None
        watched.store.close()

    run(body)


# ---------------------------------------------------------------------------------------- links, whole directories


def test_a_link_that_is_turned_to_another_adapter_is_followed(tmp_path: Path) -> None:
    async def body() -> None:
        one, two = make(tmp_path / "1", 1), make(tmp_path / "2", 2)
        (tmp_path / "adapters").mkdir()
        (tmp_path / "adapters" / "a").symlink_to(one)
        async with watching(tmp_path, rescan_s=0.1) as watched:
            assert watched.digest("a") == digest_of(one)
            (tmp_path / "link").symlink_to(two)
            (tmp_path / "link").rename(watched.directory / "a")
            await watched.until_served("a", digest_of(two))
            make(two, 3)  # no event tells of it
            await watched.until_served("a", digest_of(two))

    run(body)


def test_a_directory_that_is_given_as_a_link_is_watched(tmp_path: Path) -> None:
    async def body() -> None:
        (tmp_path / "v1").mkdir()
        (tmp_path / "current").symlink_to("v1")
        settings: dict[str, Any] = {"quiet_s": 120.0, "rescan_s": 120.0}  # which nothing here waits for
        async with watching(tmp_path, tmp_path / "current", **settings) as watched:
            await watched.until_served("a", drop(make(tmp_path / "new"), tmp_path / "v1" / "a"))

    run(body)


def test_the_link_to_the_directory_may_be_turned(tmp_path: Path) -> None:
    async def body() -> None:
        for version in (1, 2):
            make(tmp_path / f"v{version}" / "a", version)
        make(tmp_path / "v1" / "b")
        (tmp_path / "current").symlink_to("v1")
        async with watching(tmp_path, tmp_path / "current") as watched:
            (tmp_path / "link").symlink_to("v2")
            (tmp_path / "link").rename(tmp_path / "current")
            await watched.until_served("a", digest_of(tmp_path / "v2" / "a"))
            await watched.until_served("b", None)
            await watched.until_served("c", drop(make(tmp_path / "new"), tmp_path / "v2" / "c"))

    run(body)


@pytest.mark.parametrize("meanwhile", ["nothing", "an empty directory"])
def test_a_directory_that_is_away_for_a_while_loses_nothing(
    tmp_path: Path, meanwhile: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a file system that is unmounted and mounted again."""

    async def body() -> None:
        for name in "ab":
            make(tmp_path / "adapters" / name)
        async with watching(tmp_path, rescan_s=0.1) as watched:
            served = {name: watched.digest(name) for name in "ab"}
            watched.directory.rename(tmp_path / "away")
            if meanwhile != "nothing":
                watched.directory.mkdir()
            await eventually(lambda: watched.watcher._lost, "it is missed")
            await watched.idle()
            assert {name: watched.digest(name) for name in "ab"} == served
            if meanwhile != "nothing":
                watched.directory.rmdir()
            (tmp_path / "away").rename(watched.directory)
            await eventually(lambda: not watched.watcher._lost, "it is back")
            await watched.until_served("c", drop(make(tmp_path / "new"), watched.directory / "c"))
            shutil.rmtree(watched.directory / "a")
            await watched.until_served("a", None)
            assert watched.digest("b") == served["b"]
            assert len(watched.engine.loads) == 3

    run(body)
    told = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(told) == 1
    assert "the adapters from it stay as they are until it is back" in told[0]


# -------------------------------------------------------------------------------------------------- and failures


def test_a_failure_of_the_catalogue_costs_that_adapter_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with watching(tmp_path, rescan_s=0.1) as watched:
            publish = Catalogue.publish

            async def fail_for_some(self: Catalogue, name: str, *args: Any, **kwargs: Any) -> Revision:
                if name == "bad":
                    raise RuntimeError("unforeseen")
                return await publish(self, name, *args, **kwargs)

            monkeypatch.setattr(Catalogue, "publish", fail_for_some)
            make(watched.directory / "bad")
            await eventually(lambda: watched.rejection("bad"), "it is rejected")
            assert "unforeseen" in (watched.rejection("bad") or "")
            for name in ("a", "z"):
                make(watched.directory / name)
                await watched.until_served(name, digest_of(watched.directory / name))
            monkeypatch.undo()
            make(watched.directory / "bad", 2)
            await watched.until_served("bad", digest_of(watched.directory / "bad"))
            assert watched.rejection("bad") is None

    run(body)


@pytest.mark.parametrize("what", ["forget_directory", "reject"])
def test_the_watch_outlives_any_failure(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        make(tmp_path / "adapters" / "a")
        async with watching(tmp_path, rescan_s=0.1) as watched:
            failed = 0

            def fail(*args: Any) -> None:
                nonlocal failed
                failed += 1
                raise RuntimeError("unforeseen")

            monkeypatch.setattr(Catalogue, what, fail)
            shutil.rmtree(watched.directory / "a")
            (watched.directory / "bad").mkdir()
            (watched.directory / "bad" / CONFIG_FILE).write_text("{")
            await eventually(lambda: failed, "it failed")
            monkeypatch.undo()
            make(watched.directory / "b")
            await watched.until_served("b", digest_of(watched.directory / "b"))

    run(body)


def test_without_events_everything_is_found_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No watches left, or a file system that has none."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "inotify watch limit reached")

    async def body() -> None:
        monkeypatch.setattr("qaa_serve.registry.directory.awatch", fail)
        async with watching(tmp_path, rescan_s=0.1) as watched:
            await watched.until_served("a", drop(make(tmp_path / "new"), watched.directory / "a"))
            shutil.rmtree(watched.directory / "a")
            await watched.until_served("a", None)

    run(body)


def test_a_directory_that_is_mounted_late_costs_nothing(tmp_path: Path) -> None:
    """At the start it is empty: what came from it stays. Later, what was deleted or rolled back stays so."""
    directory = tmp_path / "adapters"
    directory.mkdir()

    async def first() -> None:
        async with watching(tmp_path) as watched:
            await watched.until_served("gone", drop(make(tmp_path / "1", 1), directory / "gone"))
            good = drop(make(tmp_path / "2", 2), directory / "back")
            await watched.until_served("back", good)
            shutil.rmtree(directory / "back")
            await watched.until_served("back", None)
            drop(make(tmp_path / "2", 2), directory / "back")
            await watched.until_served("back", good)
            make(tmp_path / "3", 3).rename(directory / ".new")
            (directory / "back").rename(directory / ".old")
            (directory / ".new").rename(directory / "back")
            await eventually(lambda: watched.digest("back") not in (None, good), "the bad one is served")
            await watched.catalogue.roll_back("back")
            await watched.catalogue.remove("gone")

    async def late() -> None:
        async with watching(tmp_path) as watched:
            served = watched.digest("back")
            assert served is not None
            await watched.idle()
            assert watched.digest("back") == served
            for path in list(away.iterdir()):
                path.rename(directory / path.name)
            await watched.idle()
            await watched.idle()
            assert watched.digest("back") == served, "what was rolled back stays so"
            assert watched.digest("gone") is None, "what was deleted stays so"

    run(first)
    away = tmp_path / "away"
    directory.rename(away)
    directory.mkdir()
    run(late)


def test_a_directory_that_goes_while_it_is_published_is_removed(tmp_path: Path) -> None:
    """Just when its name stands for it, and before that is noted."""

    async def body() -> None:
        async with watching(tmp_path) as watched:
            persist = watched.catalogue._persist

            async def slowly(*, must: bool = True) -> None:
                shutil.rmtree(watched.directory / "a", ignore_errors=True)
                await persist(must=must)

            watched.catalogue._persist = slowly  # type: ignore[method-assign]
            drop(make(tmp_path / "new"), watched.directory / "a")
            await eventually(lambda: not (watched.directory / "a").exists(), "it was published")
            await watched.until_served("a", None)
            await watched.idle()
            assert watched.digest("a") is None

    run(body)
