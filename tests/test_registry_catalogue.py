"""Names and what they stand for: each change is whole or not at all, and running requests never see it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from registry_support import FakeEngine, eventually, make, make_catalogue, make_store, settle, tree

from qaa_serve.adapters import WEIGHTS_FILE, AdapterError
from qaa_serve.registry import (
    AmbiguousRevisionError,
    CacheFullError,
    Catalogue,
    EngineRefusedError,
    Entry,
    LoadTimeoutError,
    NotWrittenError,
    Rejection,
    Revision,
    RevisionStore,
    UnavailableError,
    UnknownAdapterError,
    public_form,
    read_revision,
)

Body = Callable[[Catalogue, FakeEngine], Awaitable[None]]


class Place:
    """Where adapters lie, and the state directory; `serve` starts a server's catalogue on it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.state = directory / "state"

    def adapter(self, seed: int) -> Path:
        """The adapter of a seed."""
        place = self.directory / "adapters" / f"seed-{seed}"
        return place if place.exists() else make(place, seed)

    def copies(self) -> list[str]:
        """Names of the revisions in the store."""
        return sorted(os.listdir(self.state / "revisions"))

    def serve(self, body: Body, engine: FakeEngine | None = None, **settings: Any) -> None:
        """Run the body with a catalogue that has restored what there was."""

        async def run() -> None:
            store = make_store(self.state)
            try:
                catalogue = make_catalogue(store, engine or FakeEngine(), **settings)
                await catalogue.restore()
                catalogue.start()
                await body(catalogue, catalogue.cache._engine)  # type: ignore[arg-type]
                await settle()
            finally:
                store.close()

        asyncio.run(run())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def names(revisions: list[Revision]) -> list[str]:
    return sorted(revision.engine_name for revision in revisions)


# --------------------------------------------------------------------------------------- publish and replace


def test_what_is_published_is_served(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        revision = await catalogue.publish("a", place.adapter(1), "api")
        assert catalogue.resolve("a") == catalogue.resolve(revision.revision) == revision
        async with catalogue.use("a") as used:
            assert used == revision
            assert engine.held == {revision}
        entry = catalogue.entries["a"]
        assert (entry.source, entry.seen, entry.rejection) == ("api", None, None)
        assert entry.published is not None
        assert entry.last_used is not None
        assert place.copies() == [revision.engine_name]

    place.serve(body)


@pytest.mark.parametrize("asked", ["b", "a@000000000000", "a@", "a@x@y", "", "@", "A"])
def test_what_no_name_stands_for_is_unknown(place: Place, asked: str) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(1), "api")
        assert catalogue.resolve(asked) is None
        with pytest.raises(UnknownAdapterError):
            async with catalogue.use(asked):
                pass

    place.serve(body)


def test_a_replaced_revision_is_kept_and_can_be_asked_for(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        old = await catalogue.publish("a", place.adapter(1), "api")
        new = await catalogue.publish("a", place.adapter(2), "api")
        assert engine.held == {new}
        async with catalogue.use("a") as one, catalogue.use(old.revision) as other:
            assert (one, other) == (new, old)
        assert place.copies() == names([old, new])

    place.serve(body)


def test_running_requests_keep_their_revision_through_a_replacement_and_a_removal(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        old = await catalogue.publish("a", place.adapter(1), "api")
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            assert await first.enter_async_context(catalogue.use("a")) == old
            new = await catalogue.publish("a", place.adapter(2), "api")
            assert await second.enter_async_context(catalogue.use("a")) == new
            assert engine.held == {old, new}
            await catalogue.remove("a")
            assert engine.held == {old, new}
            assert place.copies() == names([old, new]), "as long as the engine holds them"
            await first.aclose()
            await settle()
            assert engine.held == {new}
            assert place.copies() == [new.engine_name]
        await settle()
        assert engine.held == set()
        assert place.copies() == []
        assert catalogue.entries == {}

    place.serve(body)


def test_the_same_content_again_changes_nothing(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        (place.directory / "base").mkdir()  # found beside the adapter, not beside the upload
        revision = await catalogue.publish("a", place.adapter(1), "directory")
        upload = Path(shutil.copytree(place.adapter(1), place.directory / "x" / "y" / "z"))
        assert await catalogue.publish("a", upload, "api") == revision
        await settle()
        assert catalogue.entries["a"].kept == []
        assert engine.held == {revision}
        assert (engine.loads, engine.unloads) == ([revision.revision], [])
        assert place.copies() == [revision.engine_name]

    place.serve(body)


def test_a_content_that_comes_back_is_served_again_and_kept_once(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        first = await catalogue.publish("a", place.adapter(1), "directory")
        second = await catalogue.publish("a", place.adapter(2), "directory")
        assert await catalogue.publish("a", place.adapter(1), "directory") == first
        assert catalogue.entries["a"].revisions() == [first, second]
        assert engine.held == {first}

    place.serve(body)


def test_only_so_many_former_revisions_are_kept(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        first = await catalogue.publish("a", place.adapter(0), "api")
        async with catalogue.use("a"):
            later = [await catalogue.publish("a", place.adapter(seed), "api") for seed in range(1, 5)]
            assert catalogue.entries["a"].revisions() == later[:0:-1]
            assert catalogue.resolve(first.revision) is None
            assert place.copies() == names([first, *later[1:]]), "the first is still in use"
        await settle()
        assert place.copies() == names(later[1:])
        assert engine.held == {later[-1]}

    place.serve(body, keep=2)


def test_former_revisions_need_not_be_kept(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(1), "api")
        new = await catalogue.publish("a", place.adapter(2), "api")
        assert place.copies() == [new.engine_name]
        with pytest.raises(UnknownAdapterError, match="'a' has no earlier revision to go back to"):
            await catalogue.roll_back("a")

    place.serve(body, keep=0)


# -------------------------------------------------------------------------------------------------- failures


def test_a_failed_load_leaves_the_old_one_serving(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        old = await catalogue.publish("a", place.adapter(1), "api")
        engine.refuses = lambda revision: True
        for name in ("a", "new"):
            with pytest.raises(AdapterError, match="the engine refuses it"):
                await catalogue.publish(name, place.adapter(2), "api")
        assert list(catalogue.entries) == ["a"]
        assert catalogue.entries["a"].revisions() == [old]
        assert engine.held == {old}
        assert place.copies() == [old.engine_name]
        async with catalogue.use("a") as used:
            assert used == old

    place.serve(body)


def test_a_failed_replacement_by_a_kept_revision_leaves_it_kept(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        old = await catalogue.publish("a", place.adapter(1), "api")
        new = await catalogue.publish("a", place.adapter(2), "api")
        engine.refuses = lambda revision: True
        with pytest.raises(AdapterError):
            await catalogue.publish("a", place.adapter(1), "api")
        with pytest.raises(AdapterError):
            await catalogue.roll_back("a")
        assert catalogue.entries["a"].revisions() == [new, old]
        assert place.copies() == names([old, new])

    place.serve(body)


def test_what_changed_while_it_was_read_is_not_served(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        with pytest.raises(AdapterError, match="its files changed while they were read"):
            await catalogue.publish("a", place.adapter(1), "directory", unchanged=lambda: False)
        assert catalogue.entries == {}
        assert place.copies() == []

    place.serve(body)


def test_the_base_models_name_and_what_is_no_name_are_refused(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        with pytest.raises(AdapterError, match="'llama' is the base model's name: choose another"):
            await catalogue.publish("llama", place.adapter(1), "api")
        with pytest.raises(AdapterError, match="cannot be an adapter's name"):
            await catalogue.publish("../a", place.adapter(1), "api")
        assert place.copies() == []

    place.serve(body, reserved={"llama"}.__contains__)


def test_a_rejection_is_noted_and_what_was_served_goes_on(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        revision = await catalogue.publish("a", place.adapter(1), "directory")
        for name in ("a", "b"):
            catalogue.reject(Rejection(name, Path(name), "wrong"))
        assert catalogue.resolve("a") == revision
        assert catalogue.resolve("b") is None
        for change in (catalogue.remove, catalogue.roll_back, catalogue.pin, catalogue.unpin):
            with pytest.raises(UnknownAdapterError):
                await change("b")
        await catalogue.publish("a", place.adapter(1), "directory")
        assert catalogue.entries["a"].rejection is None
        await catalogue.forget_directory("b")
        assert list(catalogue.entries) == ["a"]

    place.serve(body)


def test_a_name_and_what_is_said_of_it_change_in_one_step(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        old = await catalogue.publish("a", place.adapter(1), "api")
        catalogue.reject(Rejection("a", Path("a"), "wrong"))
        entry = catalogue.entries["a"]
        publishing = asyncio.create_task(catalogue.publish("a", place.adapter(2), "directory"))
        while not publishing.done():
            if entry.current == old:
                assert (entry.source, entry.seen) == ("api", None)
                assert entry.rejection is not None
            else:
                assert (entry.source, entry.seen) == ("directory", catalogue.resolve("a").digest)  # type: ignore[union-attr]
                assert entry.rejection is None
            await asyncio.sleep(0)
        assert await publishing == entry.current != old

    place.serve(body)


# ------------------------------------------------------------------------------------ remove, forget, roll back


def test_a_removal_by_the_api_lasts_until_the_directory_changes(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(1), "directory")
        await catalogue.remove("a")
        assert place.copies() == []
        await catalogue.publish("a", place.adapter(1), "directory")
        assert catalogue.resolve("a") is None
        assert place.copies() == []
        with pytest.raises(UnknownAdapterError):
            await catalogue.remove("a")
        new = await catalogue.publish("a", place.adapter(2), "directory")
        assert catalogue.resolve("a") == new

    place.serve(body)


def test_what_the_api_published_stays_when_a_directory_of_its_name_goes(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(1), "directory")
        new = await catalogue.publish("a", place.adapter(2), "api")
        await catalogue.forget_directory("a")
        assert catalogue.resolve("a") == new
        back = await catalogue.publish("a", place.adapter(1), "directory")
        assert catalogue.resolve("a") == back, "a directory that comes back is a change"

    place.serve(body)


@pytest.mark.parametrize("last", ["directory", "api"])
def test_nothing_is_left_of_a_name_whose_adapter_and_directory_are_gone(place: Place, last: Any) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(1), "directory")
        await catalogue.publish("a", place.adapter(2), last)
        await catalogue.remove("a")
        await catalogue.forget_directory("a")
        assert catalogue.entries == {}
        assert place.copies() == []

    place.serve(body)


def test_a_rejection_stays_when_what_the_api_published_is_removed(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(1), "api")
        catalogue.reject(Rejection("a", Path("a"), "wrong"))
        await catalogue.remove("a")
        assert catalogue.entries["a"].rejection is not None

    place.serve(body)


def test_rolling_back_serves_an_earlier_revision_until_the_directory_changes(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        revisions = [await catalogue.publish("a", place.adapter(seed), "directory") for seed in range(3)]
        assert await catalogue.roll_back("a") == revisions[1]
        assert engine.held == {revisions[1]}
        await catalogue.publish("a", place.adapter(2), "directory")
        assert catalogue.resolve("a") == revisions[1]
        assert await catalogue.roll_back("a", revisions[0].short_digest) == revisions[0]
        assert set(catalogue.entries["a"].kept) == set(revisions[1:])
        known = ", ".join(r.revision for r in catalogue.entries["a"].revisions())
        with pytest.raises(UnknownAdapterError, match=f"has no revision '000000000000'; kept: {known}"):
            await catalogue.roll_back("a", "0" * 12)
        with pytest.raises(UnknownAdapterError, match="there is no adapter 'b'"):
            await catalogue.roll_back("b")
        new = await catalogue.publish("a", place.adapter(3), "directory")
        assert catalogue.resolve("a") == new

    place.serve(body)


# ------------------------------------------------------------------------------------------------------ pins


def two_fit(place: Place) -> int:
    """Bytes for two adapters in the engine."""
    return 2 * (place.adapter(0) / WEIGHTS_FILE).stat().st_size


def test_a_pinned_name_stays_in_memory_whatever_it_stands_for(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(0), "api")
        await catalogue.pin("a")
        new = await catalogue.publish("a", place.adapter(1), "api")
        others = [await catalogue.publish(name, place.adapter(0), "api") for name in ("b", "c")]
        assert engine.held == {new, others[-1]}
        await catalogue.unpin("a")
        await catalogue.publish("d", place.adapter(0), "api")
        assert new not in engine.held

    place.serve(body, cache_bytes=two_fit(place))


def test_a_pinned_revision_is_never_dropped(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        pinned = await catalogue.publish("a", place.adapter(0), "api")
        await catalogue.pin("a", pinned.short_digest)
        later = [await catalogue.publish("a", place.adapter(seed), "api") for seed in range(1, 4)]
        assert engine.held == {pinned, later[-1]}
        assert catalogue.entries["a"].revisions() == [later[2], later[1], pinned]
        await catalogue.unpin("a", pinned.short_digest)
        await settle()
        assert catalogue.entries["a"].revisions() == later[:0:-1]
        assert engine.held == {later[-1]}
        assert place.copies() == names(later[1:])

    place.serve(body, keep=1)


def test_pinning_loads_and_says_when_there_is_no_room(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        old = await catalogue.publish("a", place.adapter(0), "api")
        new = await catalogue.publish("a", place.adapter(1), "api")
        assert engine.held == {new}
        await catalogue.pin("a", old.short_digest)
        await catalogue.pin("a")
        assert engine.held == {old, new}
        with pytest.raises(CacheFullError):
            await catalogue.publish("b", place.adapter(2), "api")
        assert list(catalogue.entries) == ["a"]
        for asked in (("b", None), ("a", "0" * 12)):
            for change in (catalogue.pin, catalogue.unpin):
                with pytest.raises(UnknownAdapterError):
                    await change(*asked)
        await catalogue.remove("a")
        assert engine.held == set()
        assert catalogue.cache.pinned == set()

    place.serve(body, cache_bytes=two_fit(place))


# ------------------------------------------------------------------------------------------- use while it changes


def test_an_evicted_revision_is_loaded_again(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        first, _, _ = [await catalogue.publish(name, place.adapter(0), "api") for name in "abc"]
        assert first not in engine.held
        async with catalogue.use("a"), catalogue.use("c"):
            assert first in engine.held
            with pytest.raises(UnavailableError, match=r"'b' cannot be loaded now: .*in use or pinned"):
                async with catalogue.use("b"):
                    pass
        engine.refuses = lambda revision: True
        with pytest.raises(UnavailableError, match="'b' cannot be loaded now: the engine refuses it"):
            async with catalogue.use("b"):
                pass
        assert catalogue.resolve("b") is not None

    place.serve(body, cache_bytes=two_fit(place))


def test_requests_during_a_replacement_have_the_old_one_until_the_new_one_is_loaded(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        old = await catalogue.publish("a", place.adapter(1), "api")
        engine.go.clear()
        publishing = asyncio.create_task(catalogue.publish("a", place.adapter(2), "api"))
        await engine.loading.wait()
        async with catalogue.use("a") as used:
            assert used == old
            engine.go.set()
            new = await publishing
            async with catalogue.use("a") as used_now:
                assert used_now == new
            assert engine.held == {old, new}
        await settle()
        assert engine.held == {new}

    place.serve(body)


def test_a_request_never_has_a_revision_that_was_retired_before_it_came(place: Place) -> None:
    """Many requests while a name is replaced over and over, rolled back and evicted."""

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(0), "api")
        await catalogue.publish("b", place.adapter(0), "api")
        done = False

        async def ask(name: str) -> int:
            count = 0
            while not done:
                before = catalogue.resolve(name)
                changes = []
                switch = catalogue.entries[name].published
                async with catalogue.use(name) as used:
                    if catalogue.entries[name].published == switch:
                        assert used == before
                    assert used == catalogue.resolve(name)
                    for _ in range(count % 5):
                        await asyncio.sleep(0)
                        changes.append(used in engine.held)
                    assert all(changes)
                count += 1
                await asyncio.sleep(0)
            return count

        asking = [asyncio.create_task(ask(name)) for name in ("a", "a", "a", "b")]
        for seed in (1, 2, 0, 1, 2, 3):
            try:
                await catalogue.publish("a", place.adapter(seed), "api")
                await catalogue.roll_back("a")
            except CacheFullError:
                continue
        done = True
        assert min(await asyncio.gather(*asking)) > 1
        await settle()
        assert engine.held == {
            r for e in catalogue.entries.values() for r in e.revisions() if catalogue.cache.find(r)
        }
        assert place.copies() == names([r for e in catalogue.entries.values() for r in e.revisions()])

    place.serve(body, cache_bytes=3 * two_fit(place) // 2, keep=1)


@pytest.mark.parametrize("change", ["replace", "remove", "replace and roll back"])
def test_a_request_that_waits_for_a_load_has_what_the_name_stands_for_then(place: Place, change: str) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        old = await catalogue.publish("a", place.adapter(1), "api")
        for name in "bc":
            await catalogue.publish(name, place.adapter(0), "api")
        assert old not in engine.held
        engine.go.clear()
        stack = AsyncExitStack()
        using = asyncio.create_task(stack.enter_async_context(catalogue.use("a")))
        await engine.loading.wait()
        if change == "remove":
            await catalogue.remove("a")
            engine.go.set()
            with pytest.raises(UnknownAdapterError):
                await using
            await settle()
            assert all(revision.name != "a" for revision in engine.held)
            assert all(not name.startswith("a@") for name in place.copies())
            return
        publishing = asyncio.create_task(catalogue.publish("a", place.adapter(2), "api"))
        await settle()
        engine.go.set()
        new = await publishing
        expected = {new, old} if change == "replace" else {old, new}
        if change != "replace":
            await catalogue.roll_back("a")
        async with stack:
            assert await using in expected
        async with catalogue.use("a") as used:
            assert used == (new if change == "replace" else old)

    place.serve(body, cache_bytes=two_fit(place), engine=LenientEngine())


def test_changes_of_other_names_do_not_wait_for_a_load_that_hangs(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        a = await catalogue.publish("a", place.adapter(1), "api")
        await catalogue.remove("a")
        await settle()
        engine.hang(a)
        hanging = asyncio.create_task(catalogue.publish("a", place.adapter(1), "api"))
        await eventually(lambda: engine.busy == {a}, "it hangs")
        behind = asyncio.create_task(catalogue.publish("a", place.adapter(2), "api"))
        async with asyncio.timeout(5):
            b = await catalogue.publish("b", place.adapter(1), "api")
            await catalogue.publish("b", place.adapter(2), "api")
            await catalogue.roll_back("b")
            await catalogue.pin("b")
            async with catalogue.use("b") as used:
                assert used == b
            await catalogue.remove("b")
        assert not behind.done()
        assert "a" not in catalogue.entries
        engine.gates[a].set()
        assert await hanging == a
        assert await behind == catalogue.resolve("a")
        assert catalogue.entries["a"].kept == [a], "one after the other"
        assert not catalogue._locks

    place.serve(body)


def test_a_publishing_that_takes_too_long_leaves_the_old_one_and_no_copy(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        old = await catalogue.publish("a", place.adapter(1), "api")
        slow = read_revision(place.adapter(2), "a")
        engine.hang(slow)
        for _ in range(2):
            with pytest.raises(LoadTimeoutError):
                await catalogue.publish("a", place.adapter(2), "api")
            assert catalogue.resolve("a") == old
            assert place.copies() == names([old, slow]), "the engine may read it yet"
        engine.gates[slow].set()
        await settle()
        assert engine.held == {old}
        assert place.copies() == [old.engine_name]
        assert await catalogue.publish("a", place.adapter(2), "api") == slow

    place.serve(body, load_timeout_s=0.05)


def test_a_publishing_that_is_cancelled_leaves_nothing(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        wanted = read_revision(place.adapter(1), "a")
        engine.hang(wanted)
        publishing = asyncio.create_task(catalogue.publish("a", place.adapter(1), "api"))
        await eventually(lambda: engine.busy, "it is being loaded")
        publishing.cancel()
        await settle()
        engine.gates[wanted].set()
        await settle()
        assert (engine.held, place.copies(), catalogue.entries) == (set(), [], {})

    place.serve(body)


def test_a_publishing_that_is_cancelled_while_it_is_copied_leaves_nothing_and_is_waited_for(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit, go, admitting = RevisionStore.admit, threading.Event(), []

    def admit_slowly(store: RevisionStore, source: Path, name: str) -> Revision:
        admitting.append(name)
        assert len(admitting) == 1
        go.wait(30)
        try:
            return admit(store, source, name)
        finally:
            admitting.pop()

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        monkeypatch.setattr(RevisionStore, "admit", admit_slowly)
        publishing = asyncio.create_task(catalogue.publish("a", place.adapter(1), "api"))
        await eventually(lambda: admitting, "it is copied")
        publishing.cancel()
        again = asyncio.create_task(catalogue.publish("a", place.adapter(2), "api"))
        await settle()
        go.set()
        revision = await again
        assert publishing.cancelled()
        assert place.copies() == [revision.engine_name]

    place.serve(body)


def test_requests_for_what_is_broken_ask_the_engine_once_and_a_change_asks_anew(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        for seed in (1, 2):
            await catalogue.publish("a", place.adapter(seed), "api")
        old = catalogue.entries["a"].kept[0]
        engine.refuses = lambda revision: True
        asked = len(engine.loads)

        async def ask() -> float:
            with pytest.raises(UnavailableError, match="cannot be loaded now: the engine refuses it") as caught:
                async with catalogue.use(old.revision):
                    pass
            return caught.value.retry_after_s

        await asyncio.gather(*(ask() for _ in range(100)))
        assert all([0 < await ask() <= 1 for _ in range(100)])
        assert len(engine.loads) == asked + 1
        for change in (
            catalogue.roll_back("a"),
            catalogue.pin("a", old.digest),
            catalogue.publish("a", place.adapter(1), "api"),
        ):
            asked = len(engine.loads)
            with pytest.raises(EngineRefusedError):
                await change
            assert len(engine.loads) == asked + 1
        engine.refuses = lambda revision: False
        assert await catalogue.roll_back("a") == old
        async with catalogue.use(old.revision) as used:
            assert used == old

    place.serve(body)


def test_a_revision_may_be_asked_for_by_as_many_digits_as_tell_it_apart(place: Place) -> None:
    def revision(digit: str) -> Revision:
        return Revision("a", "0" * 12 + digit * 52, place.directory, "QAA", 4, 1, "base", {})

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        one, two = revision("1"), revision("2")
        catalogue.entries["a"] = Entry("a", current=one, kept=[two])
        assert catalogue.resolve("a") == one
        for known in (one, two):
            assert catalogue.find(known.engine_name) == catalogue.find(f"a@{known.digest[:13]}") == known
        assert catalogue.resolve("a@000000000000") is None
        both = f"{one.engine_name} and {two.engine_name}"
        for ask in (catalogue.roll_back, catalogue.pin, catalogue.unpin):
            with pytest.raises(AmbiguousRevisionError, match=both):
                await ask("a", "0" * 12)
        with pytest.raises(UnknownAdapterError, match=both):
            async with catalogue.use("a@000000000000"):
                pass
        for asked in ("a@00000000000", "a@", f"a@{one.digest}1", f"a@{'0' * 13}"):
            assert catalogue.resolve(asked) is None
        catalogue.entries.clear()

    place.serve(body)


def test_states_are_written_one_at_a_time_and_the_last_one_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state = RevisionStore.write_state
    writing: list[Any] = []

    def write_slowly(store: RevisionStore, state: dict[str, Any]) -> None:
        writing.append(state)
        assert len(writing) == 1
        time.sleep(0.01)
        write_state(store, state)
        writing.pop()

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        monkeypatch.setattr(RevisionStore, "write_state", write_slowly)
        changes = [asyncio.create_task(catalogue.publish(name, place.adapter(1), "api")) for name in "abcdef"]
        await eventually(lambda: writing, "one is written")
        changes[0].cancel()
        await asyncio.gather(*changes, return_exceptions=True)
        await catalogue.remove("c")
        assert catalogue.store.read_state() == catalogue._state()
        assert list(catalogue._state()) == list(catalogue.entries)
        assert not writing

    place.serve(body)


def test_pins_that_an_older_version_wrote_are_kept(place: Place) -> None:
    """It wrote the first 12 digits, here and as the copies' names."""
    kept, *_ = publish_two(place)
    file = place.state / "state.json"
    state = json.loads(file.read_text())
    state["adapters"]["a"]["pinned_revisions"] = [kept.short_digest]
    file.write_text(json.dumps(state))
    for copy in (place.state / "revisions").iterdir():
        copy.rename(copy.with_name(public_form(copy.name)))

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        assert catalogue.entries["a"].pinned_revisions == {kept.digest}
        assert kept in engine.held
        assert catalogue.cache.pinned == {kept.int_id}
        assert len(place.copies()) == 4

    place.serve(body)


class LenientEngine(FakeEngine):
    """One whose files may go while it reads them, which fails then."""

    async def load(self, revision: Revision) -> int:
        try:
            return await super().load(revision)
        except AdapterError:
            raise
        except AssertionError as error:
            raise AdapterError(str(error)) from error


def test_a_removal_and_the_same_content_again_while_it_is_loaded_end_well(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        old = await catalogue.publish("a", place.adapter(1), "api")
        for name in "bc":
            await catalogue.publish(name, place.adapter(0), "api")
        engine.go.clear()
        stack = AsyncExitStack()
        using = asyncio.create_task(stack.enter_async_context(catalogue.use("a")))
        await engine.loading.wait()
        await catalogue.remove("a")
        publishing = asyncio.create_task(catalogue.publish("a", place.adapter(1), "api"))
        await eventually(lambda: catalogue.cache._loads[old.int_id].waiters == 2, "both wait for one load")
        engine.go.set()
        assert await publishing == old
        async with stack:
            with contextlib.suppress(UnknownAdapterError):  # there was none when it was loaded
                assert await using == old
            await settle()
            assert old in engine.held
        async with catalogue.use("a") as used:
            assert used == old
        assert old.engine_name in place.copies()

    place.serve(body, cache_bytes=two_fit(place), engine=LenientEngine())


def test_what_was_removed_and_came_back_while_it_was_in_use_stays(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        revision = await catalogue.publish("a", place.adapter(1), "api")
        async with catalogue.use("a"):
            await catalogue.remove("a")
            assert await catalogue.publish("a", place.adapter(1), "api") == revision
        for name in "bc":
            await catalogue.publish(name, place.adapter(0), "api")
        assert revision not in engine.held
        async with catalogue.use("a") as used:
            assert used == revision

    place.serve(body, cache_bytes=two_fit(place))


def test_what_the_engine_holds_is_served_on_without_the_store(place: Place) -> None:
    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        old = await catalogue.publish("a", place.adapter(1), "api")
        shutil.rmtree(place.state)
        async with catalogue.use("a") as used:
            assert used == old
            new = await catalogue.publish("a", place.adapter(2), "api")
        async with catalogue.use("a") as used:
            assert used == new
        await settle()
        with pytest.raises(UnavailableError):
            async with catalogue.use(old.revision):
                pass
        assert place.copies() == [new.engine_name]

    place.serve(body, engine=LenientEngine())


# --------------------------------------------------------------------------------------------------- restarts


def test_a_restart_serves_the_same(place: Place) -> None:
    revisions = []

    async def first(catalogue: Catalogue, engine: FakeEngine) -> None:
        revisions.extend([await catalogue.publish("a", place.adapter(seed), "directory") for seed in (1, 2, 3)])
        await catalogue.roll_back("a")
        await catalogue.pin("a")
        await catalogue.pin("a", revisions[0].short_digest)
        revisions.append(await catalogue.publish("b", place.adapter(1), "api"))

    async def second(catalogue: Catalogue, engine: FakeEngine) -> None:
        one, two, three, other = revisions
        entry = catalogue.entries["a"]
        assert entry.current == two
        assert set(entry.kept) == {one, three}
        assert (entry.source, entry.seen) == ("directory", three.digest)
        assert (entry.pinned, entry.pinned_revisions) == (True, {one.digest})
        assert catalogue.cache.pinned == {one.int_id, two.int_id}
        assert engine.held == {one, two, other}
        assert (catalogue.entries["b"].current, catalogue.entries["b"].source) == (other, "api")
        await catalogue.publish("a", place.adapter(3), "directory")
        assert catalogue.resolve("a") == two, "the rollback lasts until the directory changes"
        assert place.copies() == names(revisions)

    place.serve(first)
    shutil.rmtree(place.directory / "adapters" / "seed-1")
    place.serve(second)
    place.serve(second)


def test_a_content_that_comes_back_after_a_restart_is_kept_once(place: Place) -> None:
    (place.directory / "base").mkdir()  # found beside the adapter, not beside the copy

    async def first(catalogue: Catalogue, engine: FakeEngine) -> None:
        for seed in (1, 2):
            await catalogue.publish("a", place.adapter(seed), "directory")

    async def second(catalogue: Catalogue, engine: FakeEngine) -> None:
        two = catalogue.resolve("a")
        one = await catalogue.publish("a", place.adapter(1), "directory")
        assert catalogue.entries["a"].revisions() == [one, two]
        await catalogue.publish("a", place.adapter(1), "api")
        await settle()
        assert engine.held == {one}
        assert place.copies() == names([one, two])

    place.serve(first)
    place.serve(second, keep=1)


def test_a_removal_outlasts_a_restart_until_the_directory_changes(place: Place) -> None:
    async def first(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(1), "directory")
        await catalogue.remove("a")

    async def second(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(1), "directory")
        assert catalogue.resolve("a") is None

    async def third(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(2), "directory")
        assert catalogue.resolve("a") is not None

    for body in (first, second, second, third):
        place.serve(body)


def test_what_is_left_over_is_deleted_at_the_start(place: Place) -> None:
    async def nothing(catalogue: Catalogue, engine: FakeEngine) -> None:
        assert catalogue.entries == {}
        assert place.copies() == []

    place.serve(nothing)
    store = make_store(place.state)
    store.admit(place.adapter(1), "stray")
    store.close()
    place.serve(nothing)


def publish_two(place: Place) -> list[Revision]:
    """Names a and b, each with a kept revision; theirs in that order."""
    revisions = []

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        for name in "ab":
            revisions.extend([await catalogue.publish(name, place.adapter(seed), "api") for seed in (1, 2)])

    place.serve(body)
    return revisions


BAD_FIELDS = {
    "no fields": None,
    "a list": [1],
    "empty": {},
    "kept is a number": {"kept": 3},
    "kept holds a number": {"kept": [3]},
    "current is a number": {"current": 3},
    "current is a list": {"current": ["x"]},
    "current is another": {"current": "0" * 64},
    "pins are a number": {"pinned_revisions": 3},
    "pins are lists": {"pinned_revisions": [[1]]},
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_damaged_part_of_the_state_costs_that_adapter_alone(place: Place, fields: Any) -> None:
    _, _, kept, current = publish_two(place)
    file = place.state / "state.json"
    state = json.loads(file.read_text())
    state["adapters"]["a"] = (
        {**state["adapters"]["a"], **fields} if isinstance(fields, dict) and fields else fields
    )
    state["adapters"]["../x"] = state["adapters"]["b"]
    file.write_text(json.dumps(state))

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        assert catalogue.entries["b"].revisions() == [current, kept]
        assert catalogue.resolve("a") is None
        assert "../x" not in catalogue.entries
        assert engine.held == {current}
        assert catalogue.resolve("b") == current

    place.serve(body)


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", '{"adapters": 3}', '{"version": 2, "adapters": {}}', "\xff"]
)
def test_without_a_state_that_can_be_read_every_copy_is_served_again(place: Place, content: str | None) -> None:
    """An empty, damaged, lost or newer one: nothing that was uploaded is deleted."""
    a_kept, a_current, b_kept, b_current = publish_two(place)
    state = place.state / "state.json"
    if content is None:
        state.unlink()
    else:
        state.write_text(content, encoding="latin-1")

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        assert {name: entry.current for name, entry in catalogue.entries.items()} == {
            "a": a_current, "b": b_current,
        }  # fmt: skip
        assert catalogue.resolve(a_kept.revision) == a_kept
        assert catalogue.resolve(b_kept.revision) == b_kept
        revision = await catalogue.publish("a", place.adapter(9), "api")
        assert catalogue.resolve("a") == revision

    place.serve(body)
    aside = [path.read_text(encoding="latin-1") for path in place.state.glob("state.json.unreadable-*")]
    assert aside == ([] if content is None else [content])


def test_when_it_was_published_stays_over_a_restart(place: Place) -> None:
    """Clients see it as a model's `created`."""
    publish_two(place)
    seen: list[list[float | None]] = []

    async def look(catalogue: Catalogue, engine: FakeEngine) -> None:
        seen.append([catalogue.entries[name].published for name in "ab"])

    for _ in range(2):
        place.serve(look)
        time.sleep(0.01)
    assert seen[0] == seen[1]
    assert None not in seen[0]


def test_one_entry_of_the_state_that_is_odd_touches_no_other(place: Place) -> None:
    *_, b_current = publish_two(place)
    state = json.loads((place.state / "state.json").read_text())
    state["adapters"]["a"] = 1
    (place.state / "state.json").write_text(json.dumps(state))

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        assert catalogue.resolve("b") == b_current
        assert catalogue.resolve("a") is None

    place.serve(body)


def test_a_start_with_another_base_loses_nothing(place: Place) -> None:
    """None of the copies fits it; with the right base everything is back as it was, pins and all."""
    publish_two(place)

    async def pin(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.pin("b")

    place.serve(pin)
    before = json.loads((place.state / "state.json").read_text())
    copies = place.copies()

    async def other_base() -> None:
        store = make_store(place.state)
        store.base = {"another.layer": (16, 16)}
        catalogue = make_catalogue(store, FakeEngine())
        await catalogue.restore()
        catalogue.start()
        assert all(entry.current is None for entry in catalogue.entries.values())
        store.close()

    for _ in range(2):
        asyncio.run(other_base())
    assert place.copies() == copies
    assert json.loads((place.state / "state.json").read_text()) == before

    async def back(catalogue: Catalogue, engine: FakeEngine) -> None:
        assert all(entry.current is not None for entry in catalogue.entries.values())
        assert catalogue.entries["b"].pinned

    place.serve(back)


def test_a_damaged_copy_is_not_served_and_the_directory_brings_it_back(place: Place) -> None:
    _, damaged, kept, current = publish_two(place)
    (damaged.path / WEIGHTS_FILE).write_bytes(b"damaged")

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        assert catalogue.resolve("a") is None
        assert catalogue.entries["b"].revisions() == [current, kept]
        assert await catalogue.publish("a", place.adapter(2), "directory") == damaged
        assert catalogue.resolve("a") == damaged

    place.serve(body)


def test_a_damaged_copy_of_a_former_revision_costs_that_one_alone(place: Place) -> None:
    damaged, current, *others = publish_two(place)
    (damaged.path / WEIGHTS_FILE).write_bytes(b"damaged")

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        assert catalogue.entries["a"].revisions() == [current]
        assert catalogue.entries["a"].rejection is None
        assert place.copies() == names([damaged, current, *others]), "it may be mended yet"

    place.serve(body)


def test_what_cannot_be_loaded_at_the_start_is_not_lost(place: Place) -> None:
    """A server that was started once with too little memory, or for another base."""
    kept, current, *others = publish_two(place)

    async def short(catalogue: Catalogue, engine: FakeEngine) -> None:
        entry = catalogue.entries["a"]
        assert entry.current is None
        assert entry.rejection is not None
        assert "the engine refuses it" in entry.rejection.reason
        assert entry.kept == [current, kept]
        assert engine.held == {others[1]}
        with pytest.raises(UnknownAdapterError):
            async with catalogue.use("a"):
                pass

    async def enough(catalogue: Catalogue, engine: FakeEngine) -> None:
        engine.refuses = lambda revision: False
        assert catalogue.entries["a"].revisions() == [current, kept]
        assert await catalogue.roll_back("a") == current
        assert catalogue.entries["a"].rejection is None

    async def removed(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.remove("a")
        assert list(catalogue.entries) == ["b"]
        assert place.copies() == names(others)

    def refusing() -> FakeEngine:
        engine = FakeEngine()
        engine.refuses = lambda revision: revision.name == "a"
        return engine

    place.serve(short, refusing())
    place.serve(enough, refusing())
    place.serve(short, refusing())
    place.serve(removed, refusing())


def test_a_directory_that_could_not_be_loaded_at_the_start_is_tried_again(place: Place) -> None:
    async def publish(catalogue: Catalogue, engine: FakeEngine) -> None:
        revision = await catalogue.publish("a", place.adapter(1), "directory")
        assert catalogue.resolve("a") == revision

    async def short(catalogue: Catalogue, engine: FakeEngine) -> None:
        with pytest.raises(AdapterError, match="the engine refuses it"):
            await catalogue.publish("a", place.adapter(1), "directory")

    engine = FakeEngine()
    engine.refuses = lambda revision: True
    place.serve(publish)
    place.serve(short, engine)
    place.serve(publish)


def test_a_state_that_cannot_be_written_stops_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        monkeypatch.setattr(RevisionStore, "write_state", fail)
        with pytest.raises(NotWrittenError, match="a restart undoes it"):
            await catalogue.publish("a", place.adapter(1), "api")
        assert catalogue.resolve("a") is not None, "it is served all the same"
        with pytest.raises(NotWrittenError):
            await catalogue.remove("a")
        await catalogue.publish("a", place.adapter(1), "directory")  # the directory itself is what is remembered
        monkeypatch.undo()

    place.serve(body)


def test_before_the_start_nothing_is_written_down(place: Place) -> None:
    async def run() -> None:
        store = make_store(place.state)
        catalogue = make_catalogue(store, FakeEngine())
        await catalogue.publish("a", place.adapter(1), "api")
        assert store.read_state() is None
        catalogue.start()
        assert list(store.read_state() or ()) == ["a"]
        store.close()

    asyncio.run(run())
    assert "state.json" in tree(place.state)


# ------------------------------------------------------------------------------------------ what is told of it


class Told:
    """Takes note of changes, each (action, name, before, after, result)."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str, str | None, str | None, str]] = []

    def __call__(self, action: str, name: str, before: str | None, after: str | None, result: str = "ok") -> None:
        self.changes.append((action, name, before, after, result))

    def take(self) -> list[tuple[str, str, str | None, str | None, str]]:
        """What was told since."""
        taken, self.changes = self.changes, []
        return taken


def test_each_kind_of_change_is_told_with_what_the_name_stood_for_before_and_after(place: Place) -> None:
    told = Told()

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        first = (await catalogue.publish("a", place.adapter(1), "api")).revision
        assert told.take() == [("put", "a", None, first, "ok")]
        second = (await catalogue.publish("a", place.adapter(2), "api")).revision
        assert told.take() == [("put", "a", first, second, "ok")]
        assert (await catalogue.roll_back("a")).revision == first
        assert told.take() == [("rollback", "a", second, first, "ok")]
        await catalogue.pin("a")
        await catalogue.pin("a", second.partition("@")[2])
        await catalogue.unpin("a", second.partition("@")[2])
        await catalogue.unpin("a")
        assert told.take() == [
            ("pin", "a", first, first, "ok"), ("pin", "a", second, second, "ok"),
            ("unpin", "a", second, second, "ok"), ("unpin", "a", first, first, "ok"),
        ]  # fmt: skip
        await catalogue.remove("a")
        assert told.take() == [("delete", "a", first, None, "ok")]

    place.serve(body, changed=told)


def test_changes_of_the_adapters_directory_are_told_as_such(place: Place) -> None:
    told = Told()

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        first = (await catalogue.publish("a", place.adapter(1), "directory")).revision
        second = (await catalogue.publish("a", place.adapter(2), "directory")).revision
        assert told.take() == [("publish", "a", None, first, "ok"), ("publish", "a", first, second, "ok")]
        for _ in range(3):
            catalogue.reject(Rejection("a", Path("a"), "wrong"))
        assert told.take() == [("reject", "a", second, second, "wrong")], "once"
        catalogue.reject(Rejection("new", Path("new"), "wrong"))
        assert told.take() == [("reject", "new", None, None, "wrong")]
        await catalogue.forget_directory("a")
        await catalogue.forget_directory("new")
        await catalogue.forget_directory("never")
        assert told.take() == [("forget", "a", second, None, "ok")]

    place.serve(body, changed=told)


def test_what_changes_nothing_is_not_told(place: Place) -> None:
    told = Told()

    async def body(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(1), "directory")
        told.take()
        await catalogue.publish("a", place.adapter(1), "directory")
        engine.refuses = lambda revision: True
        with pytest.raises(AdapterError):
            await catalogue.publish("a", place.adapter(2), "api")
        for change in (catalogue.roll_back("a"), catalogue.remove("b"), catalogue.pin("b"), catalogue.unpin("b")):
            with pytest.raises(UnknownAdapterError):
                await change
        assert told.take() == []

    place.serve(body, changed=told)


def test_what_a_restart_serves_again_is_no_change(place: Place) -> None:
    told = Told()

    async def first(catalogue: Catalogue, engine: FakeEngine) -> None:
        await catalogue.publish("a", place.adapter(1), "api")

    async def second(catalogue: Catalogue, engine: FakeEngine) -> None:
        assert catalogue.resolve("a") is not None
        assert told.take() == []

    place.serve(first)
    place.serve(second, changed=told)
