"""Following a source: what is put there is served, and nothing that is half there or only out of sight."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from registry_support import FakeEngine, Hang, OddSource, Place, eventually, in_a_loop, make

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, digest_of
from qaa_serve.registry import Alias, Catalogue, UnknownAdapterError, read_revision
from qaa_serve.registry import follower as follower_module
from qaa_serve.sources import SETTINGS_FILE, ChangedMeanwhileError, DirectorySource, Listed, Listing, SourceError


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def odd(place: Place) -> OddSource:
    return OddSource(DirectorySource(place.adapters, rescan_s=0.05))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the follower takes for the time: `now` goes on when the test says so, however slow the machine is."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(follower_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@asynccontextmanager
async def following(
    place: Place, odd: OddSource, engine: FakeEngine | None = None, **settings: Any
) -> AsyncIterator[Catalogue]:
    """A server that follows, and that checks what it finds, as a real one does."""
    async with place.server(engine, source=odd, follow=True, check=True, **settings) as catalogue:
        await looked(odd)
        yield catalogue


async def looked(odd: OddSource) -> None:
    """Wait until a look at everything that began after now has ended."""
    looks = odd.calls["list"]
    await eventually(lambda: odd.calls["list"] > looks + 1, "it looked")


def current(catalogue: Catalogue, name: str = "a") -> str | None:
    """The digest of what a name stands for."""
    entry = catalogue.entries.get(name)
    return entry.current.digest if entry is not None and entry.current is not None else None


async def until_served(catalogue: Catalogue, name: str, digest: str | None) -> None:
    await eventually(lambda: current(catalogue, name) == digest, f"{name} serves {digest}")


async def until_gone(catalogue: Catalogue, name: str) -> None:
    await eventually(lambda: name not in catalogue.entries, f"{name} is gone")


# ------------------------------------------------------------------------------------------- what comes and goes


@in_a_loop
async def test_what_comes_by_a_rename_is_not_waited_for(place: Place, odd: OddSource) -> None:
    async with following(place, odd, quiet_s=3600.0) as catalogue:  # which nothing here waits for
        await until_served(catalogue, "a", place.drop("a", 1))
        await until_served(catalogue, "a", place.drop("a", 2))


@in_a_loop
async def test_what_the_trainer_saves_over_an_adapter_replaces_it(place: Place, odd: OddSource) -> None:
    async with following(place, odd) as catalogue:
        for seed in range(3):
            make(place.adapters / "a", seed)
            await until_served(catalogue, "a", digest_of(place.adapters / "a"))
        await eventually(lambda: len(odd.revisions("a")) == 2, "both former ones are kept")


@in_a_loop
async def test_a_slow_copy_is_served_when_it_is_complete(
    place: Place, odd: OddSource, clock: SimpleNamespace
) -> None:
    async with following(place, odd, quiet_s=0.1) as catalogue:
        target = place.adapters / "a"
        target.mkdir()
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            content = (place.version(1) / name).read_bytes()
            for end in range(0, len(content), len(content) // 5):
                (target / name).write_bytes(content[: end + len(content) // 5])
                await looked(odd)
                clock.now += 0.09
                await looked(odd)
                assert "a" not in catalogue.entries, "neither served nor rejected"
        clock.now += 0.09
        await until_served(catalogue, "a", place.digest(1))


@in_a_loop
async def test_a_pair_that_is_half_replaced_is_never_served(
    place: Place, odd: OddSource, clock: SimpleNamespace
) -> None:
    """The config of one and the weights of another can be valid together, and nobody's."""
    old = place.drop("a", 1)
    other = make(place.directory / "other", 2, alpha=3.0)
    engine = FakeEngine()
    async with following(place, odd, engine, quiet_s=0.1) as catalogue:
        async with catalogue.use("a"):
            pass
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (place.adapters / "a" / name).write_bytes((other / name).read_bytes())
            await looked(odd)
            clock.now += 0.09
            await looked(odd)
            assert current(catalogue) == old
        clock.now += 0.09
        await until_served(catalogue, "a", digest_of(other))
        assert [load.partition("@")[2] for load in engine.loads] == [old[:12], digest_of(other)[:12]]
        await eventually(lambda: odd.revisions("a") == [old], "the old one is kept")


@in_a_loop
async def test_a_pair_that_changes_while_it_is_read_is_not_served(place: Place, odd: OddSource) -> None:
    place.drop("a", 1)
    third = make(place.directory / "third", 3, alpha=3.0)
    mixed = digest_of(place.version(1))
    async with following(place, odd) as catalogue:
        await until_served(catalogue, "a", mixed)
        odd.hooks["fetch"] = hang = Hang(lambda *_: not hang.count)
        (place.adapters / "a" / WEIGHTS_FILE).write_bytes((place.version(2) / WEIGHTS_FILE).read_bytes())
        await eventually(lambda: hang.count, "it is being read")
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (place.adapters / "a" / name).write_bytes((third / name).read_bytes())
        hang.go.set()
        await until_served(catalogue, "a", digest_of(third))
        assert catalogue.entries["a"].rejection is None
        await eventually(lambda: odd.revisions("a") == [mixed], "no other one was ever served")


@in_a_loop
async def test_what_is_wrong_is_rejected_once_and_served_when_it_is_mended(place: Place, odd: OddSource) -> None:
    old = place.drop("a", 1)
    async with following(place, odd) as catalogue:
        await until_served(catalogue, "a", old)
        weights = place.adapters / "a" / WEIGHTS_FILE
        weights.write_bytes(b"damaged")
        await eventually(lambda: catalogue.entries["a"].rejection, "it is rejected")
        rejection = catalogue.entries["a"].rejection
        for _ in range(3):
            await looked(odd)
        assert catalogue.entries["a"].rejection is rejection
        assert current(catalogue) == old
        weights.write_bytes((place.version(2) / WEIGHTS_FILE).read_bytes())
        await until_served(catalogue, "a", place.digest(2))
        assert catalogue.entries["a"].rejection is None


@in_a_loop
async def test_what_is_removed_goes(place: Place, odd: OddSource) -> None:
    for name in "abcd":
        place.drop(name, 1)
    async with following(place, odd) as catalogue:
        shutil.rmtree(place.adapters / "a")
        (place.adapters / "b").rename(place.directory / "elsewhere")
        (place.adapters / "c").rename(place.adapters / ".c")
        for name in "abc":
            await until_gone(catalogue, name)
        await until_served(catalogue, "d", place.digest(1))
        shutil.rmtree(place.adapters / "d")  # the last one: the directory is empty, but the same
        await until_gone(catalogue, "d")


@in_a_loop
async def test_what_is_renamed_has_its_new_name(place: Place, odd: OddSource) -> None:
    digest = place.drop("a", 1)
    async with following(place, odd) as catalogue:
        (place.adapters / "a").rename(place.adapters / "b")
        await until_served(catalogue, "b", digest)
        await until_gone(catalogue, "a")


@in_a_loop
async def test_touching_loads_nothing_anew(place: Place, odd: OddSource) -> None:
    digest = place.drop("a", 1)
    engine = FakeEngine()
    async with following(place, odd, engine) as catalogue:
        async with catalogue.use("a"):
            pass
        seen = catalogue.entries["a"].listed
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            os.utime(place.adapters / "a" / name, (1, 1))
        await eventually(lambda: catalogue.entries["a"].listed != seen, "it was looked at")
        await looked(odd)
        assert current(catalogue) == digest
        assert len(engine.loads) == 1
        assert odd.revisions("a") == []


@in_a_loop
async def test_hidden_directories_and_other_files_are_passed_over(place: Place, odd: OddSource) -> None:
    place.drop("a", 1)
    async with following(place, odd) as catalogue:
        make(place.adapters / ".b")
        (place.adapters / "notes.txt").write_text("x")
        (place.adapters / "notes").mkdir()
        (place.adapters / "notes" / "README.md").write_text("x")
        (place.adapters / "a" / "README.md").write_text("x")
        (place.adapters / "dangling").symlink_to("nowhere")
        await looked(odd)
        await looked(odd)
        assert list(catalogue.entries) == ["a"]
        make(place.adapters / "notes")  # now it is one
        await until_served(catalogue, "notes", digest_of(place.adapters / "notes"))
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (place.adapters / "notes" / name).unlink()  # and now no more
        await until_gone(catalogue, "notes")


@in_a_loop
async def test_what_this_server_puts_is_not_taken_again(place: Place, odd: OddSource) -> None:
    engine = FakeEngine()
    changes: list[str] = []
    async with following(
        place, odd, engine, changed=lambda action, name, *_: changes.append(f"{action} {name}")
    ) as catalogue:
        for seed in (1, 2):
            await catalogue.publish("a", place.version(seed))
        await catalogue.roll_back("a")
        await catalogue.publish("b", place.version(3))
        await catalogue.remove("b")
        await looked(odd)
        await looked(odd)
        assert changes == ["put a", "put a", "rollback a", "put b", "delete b"]
        assert odd.calls["fetch"] == 0
        assert current(catalogue) == place.digest(1)


@in_a_loop
async def test_a_name_that_is_just_being_changed_says_nothing_of_the_source(
    place: Place, odd: OddSource, caplog: pytest.LogCaptureFixture
) -> None:
    async with following(place, odd) as catalogue:
        busy = ["a"]

        def look(name: str) -> None:
            if name in busy:
                busy.remove(name)
                raise ChangedMeanwhileError(f"{name} is being changed by somebody else")

        odd.hooks["look"] = look
        for name, seed in (("a", 1), ("b", 2)):
            await until_served(catalogue, name, place.drop(name, seed))
        await eventually(lambda: not busy, "it was looked at while it was being changed")
    assert "until it is back" not in caplog.text


@in_a_loop
async def test_what_is_put_while_the_source_is_looked_at_stays(place: Place, odd: OddSource) -> None:
    """The look that misses it ends after it was put."""
    place.drop("b", 1)
    async with following(place, odd) as catalogue:
        await catalogue.publish("a", place.version(1))
        await looked(odd)
        forget, forgotten, go = catalogue.forget, asyncio.Event(), asyncio.Event()

        async def slowly(name: str, looked_at: float) -> None:
            forgotten.set()
            await go.wait()
            await forget(name, looked_at)

        catalogue.forget = slowly  # type: ignore[method-assign]
        await catalogue.remove("a")
        await forgotten.wait()
        await catalogue.publish("a", place.version(2))
        catalogue.forget = forget  # type: ignore[method-assign]
        go.set()
        await asyncio.sleep(0)
        for _ in range(20):
            assert current(catalogue) == place.digest(2)
            await asyncio.sleep(0)
        await looked(odd)
        await looked(odd)
        assert current(catalogue) == place.digest(2)


# ---------------------------------------------------------------------------------------- links, whole directories


@in_a_loop
async def test_a_link_that_is_turned_to_another_adapter_is_followed(place: Place, odd: OddSource) -> None:
    one, two = place.version(1), place.version(2)
    (place.adapters / "a").symlink_to(one)
    async with following(place, odd) as catalogue:
        await until_served(catalogue, "a", place.digest(1))
        link = place.directory / "link"
        link.symlink_to(two)
        link.rename(place.adapters / "a")
        await until_served(catalogue, "a", place.digest(2))
        make(two, 3)  # no event tells of it
        await until_served(catalogue, "a", digest_of(two))


@in_a_loop
async def test_the_link_to_the_directory_may_be_turned(place: Place) -> None:
    for version in (1, 2):
        make(place.directory / f"v{version}" / "a", version)
    make(place.directory / "v1" / "b")
    (place.directory / "current").symlink_to("v1")
    odd = OddSource(DirectorySource(place.directory / "current", rescan_s=0.1))
    async with following(place, odd) as catalogue:
        await until_served(catalogue, "a", digest_of(place.directory / "v1" / "a"))
        link = place.directory / "link"
        link.symlink_to("v2")
        link.rename(place.directory / "current")
        await until_served(catalogue, "a", digest_of(place.directory / "v2" / "a"))
        await until_gone(catalogue, "b")
        make(place.directory / "v2" / "c", 5)
        await until_served(catalogue, "c", digest_of(place.directory / "v2" / "c"))


@pytest.mark.parametrize("meanwhile", ["nothing", "an empty directory"])
def test_a_directory_that_is_away_for_a_while_loses_nothing(
    place: Place, odd: OddSource, meanwhile: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a file system that is unmounted and mounted again."""

    async def body() -> None:
        for name in "ab":
            place.drop(name, 1)
        engine = FakeEngine()
        async with following(place, odd, engine) as catalogue:
            for name in "ab":
                async with catalogue.use(name):
                    pass
            away = place.adapters.rename(place.directory / "away")
            if meanwhile != "nothing":
                place.adapters.mkdir()
            await looked(odd)
            await looked(odd)
            assert {current(catalogue, name) for name in "ab"} == {place.digest(1)}
            if meanwhile != "nothing":
                place.adapters.rmdir()
            away.rename(place.adapters)
            await until_served(catalogue, "c", place.drop("c", 2))
            shutil.rmtree(place.adapters / "a")
            await until_gone(catalogue, "a")
            assert current(catalogue, "b") == place.digest(1)
            assert len(engine.loads) == 2, "nothing was loaded again"

    asyncio.run(body())
    told = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(told) == 1
    assert "The adapters from it stay as they are until it is back" in told[0]


@in_a_loop
async def test_a_source_that_cannot_be_read_is_waited_for_where_nothing_is_known(
    place: Place, odd: OddSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "_RETRY_S", 0.01)
    place.drop("a", 1)
    async with place.server() as catalogue:
        await catalogue.set_alias("chat", Alias.parse("a"))
    odd.fail(SourceError("away"), "list", "read_settings")
    started = asyncio.Event()

    async def serve() -> None:
        async with place.replica("two").server(source=odd) as catalogue:
            assert catalogue.counts["known"] == 1
            assert catalogue.settings.aliases.keys() == {"chat"}, "with pins and aliases from the start"
            started.set()

    serving = asyncio.create_task(serve())
    await eventually(lambda: odd.calls["list"] > 2, "it tries again")
    assert not started.is_set()
    odd.hooks.clear()
    await serving
    assert started.is_set()


# -------------------------------------------------------------------------------------------------- and failures


@in_a_loop
async def test_an_adapter_that_vanishes_while_it_is_taken_is_gone(place: Place, odd: OddSource) -> None:
    old = place.drop("a", 1)
    place.drop("b", 1)
    async with following(place, odd) as catalogue:
        await until_served(catalogue, "a", old)
        odd.hooks["fetch"] = hang = Hang(lambda name, *_: name == "a")
        place.drop("a", 2)
        await eventually(lambda: hang.count, "it is being taken")
        shutil.rmtree(place.adapters / "a")
        hang.go.set()
        await until_gone(catalogue, "a")
        await until_served(catalogue, "a", place.drop("a", 3))


@in_a_loop
async def test_a_temporary_failure_is_tried_again_after_growing_pauses(
    place: Place, odd: OddSource, clock: SimpleNamespace
) -> None:
    old = place.drop("a", 1)
    async with following(place, odd) as catalogue:
        await until_served(catalogue, "a", old)
        odd.calls["fetch"] = 0
        odd.fail(SourceError("an input/output error"), "fetch")
        place.drop("a", 2)
        for count, pause_s in ((1, 1.0), (2, 2.0), (3, 4.0)):
            await eventually(lambda count=count: odd.calls["fetch"] == count, "it was tried")
            await looked(odd)
            clock.now += pause_s / 2
            await looked(odd)
            if pause_s > 1.0:
                assert odd.calls["fetch"] == count
            clock.now += pause_s / 2
        assert current(catalogue) == old
        assert catalogue.entries["a"].rejection is None
        odd.hooks.clear()
        clock.now += 60.0
        await until_served(catalogue, "a", place.digest(2))


@in_a_loop
async def test_what_is_kept_slowly_delays_nobody(place: Place, odd: OddSource) -> None:
    place.drop("a", 1)
    async with following(place, odd, timeout_s=3600) as catalogue:
        async with catalogue.use("a"):
            pass
        odd.hooks["keep"] = hang = Hang()
        await until_served(catalogue, "a", place.drop("a", 2))
        await eventually(lambda: hang.count, "the old one is being kept")
        await until_served(catalogue, "b", place.drop("b", 3))
        await until_served(catalogue, "a", place.drop("a", 4))
        hang.go.set()


@in_a_loop
async def test_a_load_that_hangs_keeps_nothing_else_from_being_taken(place: Place, odd: OddSource) -> None:
    old = place.drop("a", 1)
    engine = FakeEngine()
    async with following(place, odd, engine, load_timeout_s=3600) as catalogue:
        async with catalogue.use("a"):
            pass
        slow = read_revision(place.version(2), "a")
        engine.hang(slow)
        place.drop("a", 2)
        await eventually(lambda: engine.busy, "the new one is being loaded")
        await until_served(catalogue, "b", place.drop("b", 3))
        shutil.rmtree(place.adapters / "b")
        await until_gone(catalogue, "b")
        assert current(catalogue) == old
        engine.gates[slow].set()
        await until_served(catalogue, "a", place.digest(2))


@in_a_loop
async def test_what_the_engine_refuses_leaves_the_old_one(place: Place, odd: OddSource) -> None:
    old = place.drop("a", 1)
    engine = FakeEngine()
    async with following(place, odd, engine) as catalogue:
        async with catalogue.use("a"):
            pass
        engine.refuses = lambda revision: True
        place.drop("a", 2)
        await eventually(lambda: catalogue.entries["a"].rejection, "it is rejected")
        assert catalogue.entries["a"].rejection.kind == "engine"  # type: ignore[union-attr]
        async with catalogue.use("a") as used:
            assert used.digest == old


@in_a_loop
async def test_a_failure_that_nobody_foresaw_costs_that_adapter_alone(
    place: Place, odd: OddSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with following(place, odd) as catalogue:
        take, failures = Catalogue.take, 0

        async def fail_for_some(self: Catalogue, name: str, listed: Listed) -> None:
            nonlocal failures
            if name == "bad":
                failures += 1
                raise RuntimeError("unforeseen")
            await take(self, name, listed)

        monkeypatch.setattr(Catalogue, "take", fail_for_some)
        place.drop("bad", 1)
        await eventually(lambda: failures, "it failed")
        for name in ("a", "z"):
            await until_served(catalogue, name, place.drop(name, 2))
        await looked(odd)
        assert failures == 1, "it is not done over and over"
        monkeypatch.undo()
        await until_served(catalogue, "bad", place.drop("bad", 3))


@in_a_loop
async def test_the_following_outlives_any_failure(
    place: Place, odd: OddSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.drop("a", 1)
    place.drop("c", 1)
    async with following(place, odd) as catalogue:
        failed = threading.Event()

        async def fail(*args: Any) -> None:
            failed.set()
            raise RuntimeError("unforeseen")

        monkeypatch.setattr(Catalogue, "forget", fail)
        shutil.rmtree(place.adapters / "a")
        await eventually(failed.is_set, "it failed")
        monkeypatch.undo()
        await until_served(catalogue, "b", place.drop("b", 2))
        await until_gone(catalogue, "a")


@in_a_loop
async def test_without_events_everything_is_found_by_looking(
    place: Place, odd: OddSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No watches left, or a file system that has none."""

    async def fail(directory: str) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr("qaa_serve.sources.watch.start_watcher", fail)
    async with following(place, odd) as catalogue:
        await until_served(catalogue, "a", place.drop("a", 1))
        place.drop("b", 1)
        shutil.rmtree(place.adapters / "a")
        await until_gone(catalogue, "a")


# -------------------------------------------------------------------------------------------------------- settings


@in_a_loop
async def test_pins_and_aliases_that_are_changed_by_hand_are_followed(place: Place, odd: OddSource) -> None:
    place.drop("a", 1)
    engine = FakeEngine()
    file = place.adapters / SETTINGS_FILE
    async with following(place, odd, engine) as catalogue:
        file.write_text('{"version": 1, "pinned": ["a"], "aliases": {"chat": {"to": "a"}}}')
        await eventually(lambda: catalogue.knows("chat"), "the alias is there")
        await eventually(lambda: engine.held, "what is pinned is in memory")
        good = catalogue.settings
        for content in ("{", '{"version": 2}', '{"version": 1, "pinned": [], "aliases": {"x": {"to": {}}}}'):
            file.write_text(content)
            await looked(odd)
            await looked(odd)
            assert catalogue.settings == good
        file.write_text('{"version": 1, "pinned": [], "aliases": {"talk": {"to": "a"}}}')
        await eventually(lambda: catalogue.knows("talk"), "the other alias is there")
        assert not catalogue.knows("chat")
        assert not catalogue.cache.pinned
        file.unlink()
        await eventually(lambda: not catalogue.knows("talk"), "there is none")


def test_settings_that_cannot_be_read_are_told_and_the_former_ones_stay_over_a_restart(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with place.server() as catalogue:
            await catalogue.publish("a", place.version(1))
            await catalogue.set_alias("chat", Alias.parse("a"))
        (place.adapters / SETTINGS_FILE).write_text("{")
        async with place.server() as catalogue:
            async with catalogue.use(catalogue.route("chat")) as used:
                assert used.name == "a"
            with pytest.raises(UnknownAdapterError):
                await catalogue.find("other-name")

    asyncio.run(body())
    assert any("stay as they were: they cannot be read" in record.message for record in caplog.records)


# ------------------------------------------------------------------------------------------------------ many names


class ManyNames:
    """A source of many names, each as slow to see as on a busy network file system."""

    def __init__(self, source: DirectorySource, count: int):
        self.url = source.url
        self.count = count
        self._source = source

    def __getattr__(self, method: str) -> Any:
        return getattr(self._source, method)

    def list(self) -> Listing:
        adapters = {}
        for number in range(self.count):
            time.sleep(0.0001)  # which lets others run, as waiting for a disk does
            adapters[f"n{number}"] = Listed("1", 1.0, 100)
        return Listing(adapters, "1:1")

    def look(self, name: str) -> Listed | None:
        time.sleep(0.0001)
        return Listed("1", 1.0, 100) if int(name[1:]) < self.count else None


@in_a_loop
async def test_looking_at_many_names_does_not_hold_the_event_loop(place: Place) -> None:
    source = ManyNames(DirectorySource(place.adapters, rescan_s=0.1), 3000)
    beats = 0
    counted: list[int] = []
    look = source.list

    def counting() -> Listing:
        before = beats
        listing = look()
        counted.append(beats - before)
        return listing

    source.list = counting  # type: ignore[method-assign]

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0.0001)

    beating = asyncio.create_task(beat())
    async with place.server(source=source, follow=True) as catalogue:  # type: ignore[arg-type]
        await eventually(lambda: len(counted) > 2, "it has looked again")
        assert catalogue.counts["known"] == 3000
        source.count = 2000
        await eventually(lambda: len(catalogue.entries) == 2000, "what went is gone")
        source.count = 2500
        await eventually(lambda: len(catalogue.entries) == 2500, "what came is there")
    beating.cancel()
    assert min(counted) > 100
