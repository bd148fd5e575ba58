"""Names and what they stand for: what the source has is served, changes are whole, and nothing stored is lost."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from registry_support import (
    FakeEngine,
    Hang,
    OddSource,
    Place,
    eventually,
    in_a_loop,
    make,
    make_lora,
    settle,
    tree,
)

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError, digest_of
from qaa_serve.registry import (
    Alias,
    AmbiguousRevisionError,
    CacheFullError,
    Catalogue,
    Condition,
    EngineRefusedError,
    InUseError,
    LoadTimeoutError,
    NameRefusedError,
    Revision,
    UnavailableError,
    UnknownAdapterError,
    read_revision,
)
from qaa_serve.registry import catalogue as catalogue_module
from qaa_serve.sources import (
    HISTORY,
    ChangedMeanwhileError,
    DirectoryHistory,
    DirectorySource,
    NoSuchRevisionError,
    ReadOnlyError,
    SourceError,
)

#: A time limit of reading or loading that is short, but not for a busy machine.
SHORT_S = 0.5


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def odd(place: Place) -> OddSource:
    return OddSource(DirectorySource(place.adapters, rescan_s=0.2))


def current(catalogue: Catalogue, name: str = "a") -> str | None:
    """The digest of what a name stands for."""
    entry = catalogue.entries.get(name)
    return entry.current.digest if entry is not None and entry.current is not None else None


async def use(catalogue: Catalogue, asked: str = "a") -> str:
    """Have a request served; the digest that it had."""
    async with catalogue.use(asked) as revision:
        return revision.digest


async def history(catalogue: Catalogue, name: str = "a") -> list[str]:
    """Digests of former contents, as the source has them now."""
    return await catalogue.contents.history(name)


async def kept(place: Place, seed: int, name: str = "a") -> None:
    """Wait until a content that was replaced by hand is in the source's history."""
    source = DirectorySource(place.adapters)
    await eventually(lambda: place.digest(seed) in source.revisions(name), "the replaced content is kept")


# --------------------------------------------------------------------------------------- put and replace


@in_a_loop
async def test_what_is_put_is_in_the_source_and_served(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine) as catalogue:
        revision = await catalogue.publish("a", place.version(1))
        assert engine.held == {revision}
        assert digest_of(place.adapters / "a") == revision.digest == place.digest(1)
        async with catalogue.use("a") as one, catalogue.use(revision.revision) as other:
            assert one == other == revision
        entry = catalogue.entries["a"]
        assert (entry.state, entry.rejection) == ("served", None)
        assert entry.published is not None
        assert entry.last_used is not None


@in_a_loop
async def test_what_is_in_the_source_is_served(place: Place) -> None:
    make(place.adapters / "qaa", 1)
    make_lora(place.adapters / "lora")
    async with place.server() as catalogue:
        for name in ("qaa", "lora"):
            assert await use(catalogue, name) == digest_of(place.adapters / name)


@pytest.mark.parametrize("asked", ["b", "a@000000000000", "a@", "a@x@y", "", "@", "A"])
@in_a_loop
async def test_what_no_name_stands_for_is_unknown(place: Place, asked: str) -> None:
    async with place.server() as catalogue:
        await catalogue.publish("a", place.version(1))
        with pytest.raises(UnknownAdapterError):
            await use(catalogue, asked)


@in_a_loop
async def test_running_requests_keep_their_revision_through_a_replacement_and_a_removal(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine) as catalogue:
        old = await catalogue.publish("a", place.version(1))
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            assert await first.enter_async_context(catalogue.use("a")) == old
            new = await catalogue.publish("a", place.version(2))
            assert await second.enter_async_context(catalogue.use("a")) == new
            await catalogue.remove("a")
            assert engine.held == {old, new}
            await first.aclose()
            await settle()
            assert engine.held == {new}
        await settle()
        assert engine.held == set()
        assert catalogue.entries == {}


@in_a_loop
async def test_the_same_content_again_changes_nothing(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine) as catalogue:
        revision = await catalogue.publish("a", place.version(1))
        assert await catalogue.publish("a", place.version(1)) == revision
        await settle()
        assert (engine.loads, engine.unloads) == ([revision.revision], [])
        assert await history(catalogue) == []


@in_a_loop
async def test_a_replacement_is_loaded_before_a_request_has_it(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine) as catalogue:
        old = await catalogue.publish("a", place.version(1))
        engine.go.clear()
        publishing = asyncio.create_task(catalogue.publish("a", place.version(2)))
        await engine.loading.wait()
        async with catalogue.use("a") as used:
            assert used == old
            assert digest_of(place.adapters / "a") == old.digest, "nor is it in the source"
            engine.go.set()
            new = await publishing
            async with catalogue.use("a") as used_now:
                assert used_now == new
            assert engine.held == {old, new}
        await settle()
        assert engine.held == {new}


@in_a_loop
async def test_success_is_said_only_when_the_source_has_it(place: Place, odd: OddSource) -> None:
    async with place.server(source=odd) as catalogue:
        await catalogue.publish("a", place.version(1))
        for method, change in (
            ("put", lambda: catalogue.publish("a", place.version(2))),
            ("put", lambda: catalogue.roll_back("a")),
            ("write_settings", lambda: catalogue.pin("a")),
            ("remove", lambda: catalogue.remove("a")),
        ):
            before, settings = current(catalogue), catalogue.settings
            odd.hooks = {method: (hang := Hang())}
            changing = asyncio.create_task(change())  # type: ignore[no-untyped-call]
            await eventually(lambda hang=hang: hang.count, f"the source is at {method}")
            await settle()
            assert not changing.done()
            assert current(catalogue) == before
            assert catalogue.settings == settings
            hang.go.set()
            await changing
        assert "a" not in catalogue.entries


@pytest.mark.parametrize("error", [SourceError("full"), ReadOnlyError("not ours"), ChangedMeanwhileError("moved")])
@in_a_loop
async def test_a_put_that_fails_leaves_the_name_as_it_was_and_the_engine_without_the_new_one(
    place: Place, odd: OddSource, error: AdapterError
) -> None:
    engine = FakeEngine()
    async with place.server(engine, source=odd) as catalogue:
        first = await catalogue.publish("a", place.version(1))
        old = await catalogue.publish("a", place.version(2))
        told, counts = catalogue.fingerprint(), dict(catalogue.counts)
        odd.fail(error, "put", "remove")
        for change in (
            catalogue.publish("a", place.version(3)),
            catalogue.publish("new", place.version(3)),
            catalogue.roll_back("a"),
            catalogue.remove("a"),
        ):
            with pytest.raises(type(error), match=str(error)):
                await change
            await settle()
            assert engine.held == {old}
            assert list(catalogue.entries) == ["a"]
        assert (catalogue.fingerprint(), dict(catalogue.counts)) == (told, counts)
        assert await use(catalogue) == old.digest
        odd.hooks.clear()
        assert await catalogue.roll_back("a") == first


@in_a_loop
async def test_a_pinned_former_revision_stays_in_memory_when_going_back_to_it_fails(
    place: Place, odd: OddSource
) -> None:
    engine = FakeEngine()
    async with place.server(engine, source=odd) as catalogue:
        old = await catalogue.publish("a", place.version(1))
        new = await catalogue.publish("a", place.version(2))
        await catalogue.pin("a", old.digest)
        odd.fail(SourceError("full"), "put")
        with pytest.raises(SourceError):
            await catalogue.roll_back("a")
        await settle()
        assert engine.held == {old, new}


@in_a_loop
async def test_a_failed_load_leaves_the_old_one_serving_and_the_source_as_it_was(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine) as catalogue:
        old = await catalogue.publish("a", place.version(1))
        new = await catalogue.publish("a", place.version(2))
        engine.refuses = lambda revision: True
        for change in (
            catalogue.publish("a", place.version(3)),
            catalogue.publish("new", place.version(3)),
            catalogue.roll_back("a"),
        ):
            with pytest.raises(EngineRefusedError, match="the engine refuses it"):
                await change
        assert list(catalogue.entries) == ["a"]
        assert engine.held == {new}
        assert await use(catalogue) == new.digest == digest_of(place.adapters / "a")
        assert await history(catalogue) == [old.digest]
        assert [path for path in tree(place.adapters) if path.startswith("new")] == []


@in_a_loop
async def test_what_is_wrong_is_refused_and_leaves_nothing(place: Place) -> None:
    bad = shutil.copytree(place.version(1), place.directory / "bad")
    (bad / WEIGHTS_FILE).write_bytes(b"damaged")
    async with place.server(reserved={"llama"}.__contains__) as catalogue:
        with pytest.raises(AdapterError, match="damaged or no safetensors file"):
            await catalogue.publish("a", bad)
        with pytest.raises(NameRefusedError, match="'llama' is the base model's name: choose another"):
            await catalogue.publish("llama", place.version(1))
        with pytest.raises(NameRefusedError, match="cannot be an adapter's name"):
            await catalogue.publish("../a", place.version(1))
        assert catalogue.entries == {}
    assert tree(place.adapters) == []
    assert tree(place.state / "objects") == []


@in_a_loop
async def test_a_put_mends_what_cannot_be_read(place: Place, odd: OddSource) -> None:
    make(place.adapters / "a", 1)
    async with place.server(source=odd) as catalogue:
        odd.fail(SourceError("an input/output error"), "fetch")
        with pytest.raises(UnavailableError, match="'a' cannot be read now: an input/output error"):
            await use(catalogue)
        await catalogue.publish("a", place.version(2))
        assert await use(catalogue) == place.digest(2)


# ------------------------------------------------------------------------------------ step back, keep, remove


@in_a_loop
async def test_stepping_back_twice_goes_two_steps_back(place: Place) -> None:
    async with place.server(keep=5) as catalogue:
        one, two, three = [await catalogue.publish("a", place.version(seed)) for seed in (1, 2, 3)]
        assert await catalogue.roll_back("a") == two
        assert await catalogue.roll_back("a") == one
        assert digest_of(place.adapters / "a") == one.digest
        with pytest.raises(UnknownAdapterError, match="no earlier revision to go back to"):
            await catalogue.roll_back("a")
        assert await catalogue.roll_back("a", three.short_digest) == three
        assert await catalogue.roll_back("a") == two


@in_a_loop
async def test_a_step_back_after_a_put_after_a_step_back_goes_back_to_what_was_served(place: Place) -> None:
    async with place.server(keep=5) as catalogue:
        _, two, _ = [await catalogue.publish("a", place.version(seed)) for seed in (1, 2, 3)]
        assert await catalogue.roll_back("a") == two
        four = await catalogue.publish("a", place.version(4))
        steps = [(await catalogue.roll_back("a")).digest for _ in range(3)]
        assert steps == [place.digest(seed) for seed in (2, 3, 1)], "in the order in which they were served last"
        assert await catalogue.roll_back("a", four.digest) == four


@in_a_loop
async def test_going_back_to_what_is_not_kept_says_what_is(place: Place) -> None:
    async with place.server() as catalogue:
        one, two = [await catalogue.publish("a", place.version(seed)) for seed in (1, 2)]
        known = f"{two.short_digest}, {one.short_digest}"
        with pytest.raises(UnknownAdapterError, match=f"has no revision '000000000000'; kept: {known}"):
            await catalogue.roll_back("a", "0" * 12)
        with pytest.raises(UnknownAdapterError, match="'never' has no earlier revision"):
            await catalogue.roll_back("never")


@in_a_loop
async def test_what_was_removed_can_be_gone_back_to(place: Place) -> None:
    async with place.server() as catalogue:
        one, two = [await catalogue.publish("a", place.version(seed)) for seed in (1, 2)]
        await catalogue.remove("a")
        assert not (place.adapters / "a").exists()
        with pytest.raises(UnknownAdapterError):
            await use(catalogue)
        assert await catalogue.roll_back("a") == two
        assert await use(catalogue) == two.digest
        await catalogue.remove("a")
    async with place.replica("two").server() as catalogue:
        assert await catalogue.roll_back("a", one.short_digest) == one


@in_a_loop
async def test_a_purge_deletes_what_was_kept_too(place: Place) -> None:
    async with place.server() as catalogue:
        for seed in (1, 2):
            await catalogue.publish("a", place.version(seed))
        await catalogue.remove("a", purge=True)
        assert await history(catalogue) == []
        with pytest.raises(UnknownAdapterError):
            await catalogue.roll_back("a")


@in_a_loop
async def test_what_was_removed_before_can_be_purged(place: Place) -> None:
    async with place.server() as catalogue:
        for seed in (1, 2):
            await catalogue.publish("a", place.version(seed))
        await catalogue.remove("a")
        assert len(await catalogue.contents.history("a")) == 2
        with pytest.raises(ChangedMeanwhileError):
            await catalogue.remove("a", Condition(exists=True), purge=True)
        await catalogue.remove("a", purge=True)
        assert await catalogue.contents.history("a") == []
        for name, error in (("a", UnknownAdapterError), ("..", NameRefusedError)):
            with pytest.raises(error):
                await catalogue.remove(name, purge=True)


@in_a_loop
async def test_a_step_back_knows_where_it_is_though_nobody_has_asked_for_the_current_one(place: Place) -> None:
    async with place.server(keep=5) as catalogue:
        for seed in (1, 2, 3):
            await catalogue.publish("a", place.version(seed))
        await catalogue.roll_back("a")
    async with place.replica("two").server() as catalogue:
        assert catalogue.entries["a"].state == "known"
        assert (await catalogue.roll_back("a")).digest == place.digest(1)


@pytest.mark.parametrize("keep", [0, 1, 3])
@in_a_loop
async def test_so_many_former_revisions_are_kept(place: Place, keep: int) -> None:
    engine = FakeEngine()
    async with place.server(engine, keep=keep) as catalogue:
        revisions = [await catalogue.publish("a", place.version(seed)) for seed in range(5)]
        assert await history(catalogue) == [r.digest for r in revisions[4 - keep : 4]]
        for pruned in revisions[: 4 - keep]:
            with pytest.raises(UnknownAdapterError):
                await use(catalogue, pruned.revision)
        assert await use(catalogue) == revisions[4].digest
    assert len(list((place.adapters / HISTORY).glob("a/*"))) == keep


@in_a_loop
async def test_what_is_pinned_or_leads_from_an_alias_is_kept_besides(place: Place) -> None:
    async with place.server(keep=1) as catalogue:
        pinned = await catalogue.publish("a", place.version(1))
        await catalogue.pin("a", pinned.short_digest)
        led_to = await catalogue.publish("a", place.version(2))
        await catalogue.set_alias("stable", Alias.parse(led_to.revision))
        later = [await catalogue.publish("a", place.version(seed)) for seed in (3, 4, 5)]
        assert await history(catalogue) == [pinned.digest, led_to.digest, later[1].digest]
        assert await use(catalogue, catalogue.route("stable")) == led_to.digest
        await catalogue.unpin("a", pinned.short_digest)
        await catalogue.set_alias("stable", None)
        await catalogue.publish("a", place.version(6))
        assert await history(catalogue) == [later[2].digest]


@in_a_loop
async def test_what_an_alias_leads_to_is_not_removed(place: Place) -> None:
    async with place.server() as catalogue:
        await catalogue.publish("a", place.version(1))
        await catalogue.set_alias("chat", Alias.parse("a"))
        with pytest.raises(InUseError, match="the alias 'chat' leads to 'a'"):
            await catalogue.remove("a")
        assert (place.adapters / "a").exists()
        await catalogue.set_alias("chat", None)
        await catalogue.remove("a")
        with pytest.raises(UnknownAdapterError):
            await catalogue.remove("a")


# ---------------------------------------------------------------------------------------------- name@revision


@in_a_loop
async def test_a_revision_is_asked_for_by_12_digits_or_more(place: Place) -> None:
    async with place.server() as catalogue:
        old = await catalogue.publish("a", place.version(1))
        new = await catalogue.publish("a", place.version(2))
        for revision in (old, new):
            for digits in (12, 13, 64):
                assert await use(catalogue, f"a@{revision.digest[:digits]}") == revision.digest
            for asked in (f"a@{revision.digest[:11]}", f"a@{revision.digest}1", f"b@{revision.digest}"):
                with pytest.raises(UnknownAdapterError):
                    await use(catalogue, asked)


@in_a_loop
async def test_digits_that_several_begin_with_are_not_guessed(place: Place, odd: OddSource) -> None:
    async with place.server(source=odd) as catalogue:
        revision = await catalogue.publish("a", place.version(1))
        twin = revision.digest[:20] + "0" * 44
        await catalogue.publish("a", place.version(2))
        odd.revisions = lambda name: [revision.digest, twin]  # type: ignore[method-assign]
        catalogue.entries["a"].history = None
        both = " and ".join(f"a@{digest}" for digest in sorted((revision.digest, twin)))
        for ask in (
            use(catalogue, revision.revision),
            catalogue.roll_back("a", revision.digest[:20]),
            catalogue.pin("a", revision.short_digest),
        ):
            with pytest.raises(AmbiguousRevisionError, match=both):
                await ask
        assert await use(catalogue, f"a@{revision.digest[:21]}") == revision.digest


@in_a_loop
async def test_a_replica_serves_former_revisions_that_it_never_had(place: Place) -> None:
    async with place.server() as one, place.replica("two").server(follow=True) as two:
        old = await one.publish("a", place.version(1))
        new = await one.publish("a", place.version(2))
        await eventually(lambda: "a" in two.entries, "the other has it")
        assert await use(two, old.revision) == old.digest
        assert await use(two) == new.digest
        newest = await one.publish("a", place.version(3))
        await eventually(lambda: current(two) == newest.digest, "the other has the newest")
        assert await use(two, new.revision) == new.digest


@in_a_loop
async def test_a_former_revision_in_memory_needs_no_source(place: Place, odd: OddSource) -> None:
    async with place.server(source=odd) as catalogue:
        old = await catalogue.publish("a", place.version(1))
        await catalogue.publish("a", place.version(2))
        await use(catalogue, old.revision)
        odd.fail(SourceError("away"), "revisions", "fetch_revision")
        asked = odd.calls.total()
        catalogue.entries["a"].history_read -= 3600
        for asked_for in (old.revision, old.engine_name):
            assert await use(catalogue, asked_for) == old.digest
        assert odd.calls.total() == asked


@pytest.mark.parametrize("method", ["revisions", "fetch_revision"])
@in_a_loop
async def test_many_requests_for_a_former_revision_that_cannot_be_read_ask_once(
    place: Place, odd: OddSource, method: str
) -> None:
    async with place.server() as catalogue:
        old = await catalogue.publish("a", place.version(1))
        await catalogue.publish("a", place.version(2))
    async with place.replica("two").server(source=odd) as catalogue:
        odd.fail(SourceError("away"), method)
        answers = await asyncio.gather(*(use(catalogue, old.revision) for _ in range(100)), return_exceptions=True)
        assert all(isinstance(answer, UnavailableError) for answer in answers)
        assert odd.calls[method] == 1


@in_a_loop
async def test_a_former_revision_that_cannot_be_served_is_refused_for_the_same_reason_each_time(
    place: Place,
) -> None:
    async with place.server() as catalogue:
        old = await catalogue.publish("a", place.version(1))
        await catalogue.publish("a", place.version(2))
    async with place.replica("two").server(base={"another.layer": (16, 16)}) as catalogue:
        for _ in range(3):
            with pytest.raises(UnknownAdapterError, match=r"cannot be served: .*made for another base"):
                await use(catalogue, old.revision)


# ------------------------------------------------------------------------------------------------- conditions


@in_a_loop
async def test_of_two_servers_that_change_at_once_one_is_told_to_look_again(place: Place, odd: OddSource) -> None:
    async with place.server(source=odd) as one, place.replica("two").server() as two:
        old = await one.publish("a", place.version(1))
        seen = Condition(digests=frozenset({old.short_digest}))
        async with place.replica("three").server() as three:
            odd.hooks["put"] = hang = Hang()
            first = asyncio.create_task(one.publish("a", place.version(2), seen))
            await eventually(lambda: hang.count, "one is about to write")
            await three.publish("a", place.version(3), seen)  # and another was faster
            hang.go.set()
            with pytest.raises(ChangedMeanwhileError):
                await first
            assert current(one) == old.digest
            assert digest_of(place.adapters / "a") == place.digest(3)
        with pytest.raises(ChangedMeanwhileError, match="is there now"):
            await two.publish("a", place.version(4), Condition(exists=False))


@pytest.mark.parametrize("change", ["publish", "roll_back", "remove"])
@in_a_loop
async def test_a_change_is_made_only_if_its_condition_is_met(place: Place, change: str) -> None:
    async with place.server() as catalogue:
        changes: dict[str, Callable[[str, Condition], Awaitable[Any]]] = {
            "publish": lambda name, condition: catalogue.publish(name, place.version(3), condition),
            "roll_back": lambda name, condition: catalogue.roll_back(name, None, condition),
            "remove": catalogue.remove,
        }
        old = await catalogue.publish("a", place.version(1))
        new = await catalogue.publish("a", place.version(2))
        for condition in (Condition(frozenset({old.short_digest})), Condition(exists=False)):
            with pytest.raises(ChangedMeanwhileError):
                await changes[change]("a", condition)
        if change == "publish":
            with pytest.raises(ChangedMeanwhileError, match="there is no such adapter"):
                await changes[change]("b", Condition(exists=True))
            await changes[change]("c", Condition(exists=False))
            assert current(catalogue, "c") == place.digest(3)
        assert current(catalogue) == new.digest == digest_of(place.adapters / "a")
        await changes[change]("a", Condition(frozenset({"1" * 12, new.short_digest}), exists=True))
        assert current(catalogue) != new.digest


@in_a_loop
async def test_a_condition_holds_for_what_the_source_has_though_nobody_has_asked_for_it(place: Place) -> None:
    digest = place.drop("a", 1)
    async with place.server() as catalogue:
        with pytest.raises(ChangedMeanwhileError, match=f"what is served is a@{digest[:12]}"):
            await catalogue.remove("a", Condition(frozenset({"0" * 12})))
        await catalogue.publish("a", place.version(2), Condition(frozenset({digest[:12]})))


# ------------------------------------------------------------------------------------------------- two servers


@in_a_loop
async def test_whatever_one_server_changes_reaches_the_other(place: Place) -> None:
    engine = FakeEngine()
    async with (
        place.server(follow=True, check=True) as one,
        place.replica("two").server(engine, follow=True, check=True) as two,
    ):

        async def agreed(what: str) -> None:
            await eventually(
                lambda: (
                    one.fingerprint() == two.fingerprint()
                    and one.settings == two.settings
                    and one.entries.keys() == two.entries.keys()
                    and not two.counts["known"]
                ),
                f"the other has {what}",
            )

        old = await one.publish("a", place.version(1))
        await agreed("the put")
        assert current(two) == old.digest
        new = await two.publish("a", place.version(2))
        await agreed("the put of the second")
        assert current(one) == new.digest
        await one.roll_back("a")
        await agreed("the step back")
        assert current(two) == old.digest
        await two.publish("b", place.version(3))
        await one.pin("a")
        await one.pin("a", new.short_digest)
        await agreed("the pins")
        await eventually(lambda: {old, new} <= engine.held, "the other has what is pinned in memory")
        await two.set_alias("chat", Alias.parse({"a": 1, new.revision: 1}))
        await agreed("the alias")
        assert one.settings.aliases["chat"].shares == {"a": 1, new.engine_name: 1}
        await one.unpin("a")
        await one.unpin("a", new.short_digest)
        await two.set_alias("chat", None)
        await agreed("the end of pins and alias")
        await two.remove("a")
        await agreed("the removal")
        assert list(one.entries) == ["b"]


@in_a_loop
async def test_a_step_back_on_one_server_leaves_the_other_as_many_steps(place: Place) -> None:
    """The other sees a change that nobody made there, and must not take what is gone back to for one step more."""
    async with place.server(keep=2) as one, place.replica("two").server(keep=2, follow=True) as two:
        first, second, third = [await one.publish("a", place.version(seed)) for seed in (1, 2, 3)]
        await eventually(lambda: "a" in two.entries, "the other knows it")
        assert await use(two) == third.digest
        assert await one.roll_back("a") == second
        await eventually(lambda: current(two) == second.digest, "the other has gone back")
        await eventually(lambda: not two._tasks, "the other has kept what there was to keep")
        assert await two.roll_back("a") == first


@in_a_loop
async def test_changes_of_the_settings_by_two_servers_are_both_kept(place: Place, odd: OddSource) -> None:
    async with place.server(source=odd) as one, place.replica("two").server() as two:
        for name in ("a", "b"):
            for catalogue in (one, two):
                await catalogue.publish(name, place.version(1))
        odd.hooks["write_settings"] = hang = Hang()
        pinning = asyncio.create_task(one.pin("a"))
        await eventually(lambda: hang.count, "one has read, and not written")
        await two.pin("b")
        hang.go.set()
        await pinning
        assert one.settings.pinned == {"a", "b"}


# ------------------------------------------------------------------------------------------------- a new start


async def serves_the_same(place: Place, before: Catalogue, **settings: Any) -> None:
    """A server that starts now serves what another one did."""
    engine = FakeEngine()
    async with place.server(engine, check=True, **settings) as catalogue:
        await eventually(lambda: not catalogue.counts["known"], "everything is checked")
        assert catalogue.fingerprint() == before.fingerprint()
        assert catalogue.settings == before.settings
        for name, entry in before.entries.items():
            assert entry.current is not None
            assert await use(catalogue, name) == entry.current.digest


async def fill(place: Place) -> Catalogue:
    """Serve what was put by hand, what was uploaded, and what was gone back to; and one that was removed."""
    place.drop("by-hand", 1)
    async with place.server(check=True) as catalogue:
        await catalogue.publish("uploaded", place.version(2))
        for seed in (3, 4):
            await catalogue.publish("back", place.version(seed))
        await catalogue.roll_back("back")
        await catalogue.publish("removed", place.version(5))
        await catalogue.remove("removed")
        await catalogue.pin("back")
        await catalogue.set_alias("chat", Alias.parse({"by-hand": 1, "back": 3}))
        await eventually(lambda: not catalogue.counts["known"], "everything is checked")
        return catalogue


@pytest.mark.parametrize("lost", ["nothing", "state", "index", "objects"])
@in_a_loop
async def test_a_start_without_the_cache_loses_nothing(place: Place, lost: str) -> None:
    before = await fill(place)
    source = tree(place.adapters)
    if lost == "state":
        shutil.rmtree(place.state)
    elif lost == "index":
        for path in place.state.glob("index.sqlite*"):
            path.write_bytes(b"damaged" * 1000)
    elif lost == "objects":
        shutil.rmtree(place.state / "objects")
    await serves_the_same(place, before)
    assert tree(place.adapters) == source


@in_a_loop
async def test_a_start_with_another_base_loses_nothing(place: Place) -> None:
    before = await fill(place)
    source = tree(place.adapters)
    for _ in range(2):
        async with place.server(check=True, base={"another.layer": (16, 16)}) as catalogue:
            await eventually(lambda: not catalogue.counts["known"], "everything is checked")
            assert catalogue.counts["rejected"] == len(catalogue.entries) == 3
            with pytest.raises(UnknownAdapterError):
                await use(catalogue, "uploaded")
    assert tree(place.adapters) == source
    await serves_the_same(place, before)


@in_a_loop
async def test_a_directory_that_is_mounted_late_costs_nothing(place: Place) -> None:
    before = await fill(place)
    away = place.adapters.rename(place.directory / "away")
    place.adapters.mkdir()
    async with place.server(follow=True) as catalogue:
        assert catalogue.fingerprint() == before.fingerprint(), "it is served from the cache"
        assert catalogue.settings == before.settings
        assert await use(catalogue, "uploaded") == place.digest(2)
        place.adapters.rmdir()
        away.rename(place.adapters)
        place.drop("new", 6)
        await eventually(lambda: "new" in catalogue.entries, "it is followed")
        assert await use(catalogue, "back") == place.digest(3), "what was rolled back stays so"
        assert "removed" not in catalogue.entries, "what was deleted stays so"
        assert catalogue.entries.keys() == before.entries.keys() | {"new"}


@in_a_loop
async def test_a_directory_that_is_mounted_late_after_the_state_was_lost_is_served_when_it_is_there(
    place: Place,
) -> None:
    before = await fill(place)
    shutil.rmtree(place.state)
    away = place.adapters.rename(place.directory / "away")
    place.adapters.mkdir()
    async with place.server(follow=True, check=True) as catalogue:
        assert catalogue.entries == {}
        place.adapters.rmdir()
        away.rename(place.adapters)
        await eventually(lambda: catalogue.fingerprint() == before.fingerprint(), "all is served")
        assert catalogue.settings == before.settings


@in_a_loop
async def test_a_source_that_cannot_be_read_at_the_start_is_served_from_the_cache(
    place: Place, odd: OddSource
) -> None:
    before = await fill(place)
    odd.fail(SourceError("away"), "list", "look", "fetch", "revisions", "fetch_revision", "read_settings")
    await serves_the_same(place, before, source=odd)


@in_a_loop
async def test_settings_that_cannot_be_read_at_the_start_are_those_that_were_read_last(
    place: Place, odd: OddSource
) -> None:
    before = await fill(place)
    async with place.server():
        pass  # which reads what the first wrote
    odd.fail(SourceError("away"), "read_settings")
    await serves_the_same(place, before, source=odd)


@in_a_loop
async def test_what_went_while_no_server_ran_is_gone(place: Place) -> None:
    await fill(place)
    shutil.rmtree(place.adapters / "uploaded")
    (place.adapters / ".qaa-serve.json").unlink()
    async with place.server() as catalogue:
        assert catalogue.entries.keys() == {"by-hand", "back"}
        assert not catalogue.settings.pinned
        assert not catalogue.settings.aliases


@in_a_loop
async def test_what_the_base_models_name_an_alias_or_a_word_of_the_metrics_is_called_is_not_served(
    place: Place,
) -> None:
    settings: dict[str, Any] = {"reserved": {"llama"}.__contains__, "check": True}
    async with place.server(**settings) as catalogue:
        await catalogue.publish("a", place.version(1))
        await catalogue.set_alias("chat", Alias.parse("a"))

    async def are_refused(catalogue: Catalogue) -> None:
        for name in ("llama", "chat", "other"):
            await eventually(lambda name=name: name in catalogue.entries, f"{name} was seen")
            entry = catalogue.entries[name]
            assert entry.state == "rejected"
            assert entry.rejection is not None
            assert entry.rejection.kind == "name"
            with pytest.raises(UnknownAdapterError):
                await use(catalogue, name)
        assert await use(catalogue, catalogue.route("chat")) == place.digest(1)

    async with place.server(**settings, follow=True) as catalogue:
        for name in ("llama", "chat", "other"):
            place.drop(name, 2)
        await are_refused(catalogue)
    async with place.server(**settings) as catalogue:
        await are_refused(catalogue)
        for name in ("llama", "chat", "other"):
            with pytest.raises(NameRefusedError):
                await catalogue.publish(name, place.version(3))
            with pytest.raises(NameRefusedError):
                await catalogue.roll_back(name)
        for name in ("llama", "a", "other", "x y"):
            with pytest.raises(NameRefusedError):
                await catalogue.set_alias(name, Alias.parse("a"))
        await catalogue.set_alias("chat", None)
        await eventually(lambda: current(catalogue, "chat"), "the adapter has its name again")
        assert await use(catalogue, "chat") == place.digest(2)


# ------------------------------------------------------------------------------------------------------- lazy


@in_a_loop
async def test_nothing_is_read_before_somebody_asks(place: Place, odd: OddSource) -> None:
    engine = FakeEngine()
    for name in "abc":
        place.drop(name, 1)
    async with place.server(engine, source=odd, follow=True) as catalogue:
        assert catalogue.counts["known"] == 3
        assert all(catalogue.knows(name) for name in "abc")
        place.drop("d", 1)
        await eventually(lambda: "d" in catalogue.entries, "it was seen")
        assert (odd.calls["fetch"], engine.loads) == (0, [])
        assert await use(catalogue, "b") == place.digest(1)
        assert odd.calls["fetch"] == 1
        assert dict(catalogue.counts) == {"known": 3, "served": 1}


@in_a_loop
async def test_everything_is_checked_in_the_background_and_not_read_again(place: Place, odd: OddSource) -> None:
    engine = FakeEngine()
    for name in "abc":
        place.drop(name, 1)
    (place.adapters / "c" / CONFIG_FILE).write_text("{")
    async with place.server(engine, source=odd, check=True) as catalogue:
        await eventually(lambda: not catalogue.counts["known"], "everything is checked")
        assert {name: entry.state for name, entry in catalogue.entries.items()} == {
            "a": "served", "b": "served", "c": "rejected",
        }  # fmt: skip
        assert engine.loads == [], "nobody has asked for one"
        fingerprint = catalogue.fingerprint()
    odd.calls.clear()
    async with place.server(engine, source=odd, check=True) as catalogue:
        assert catalogue.counts["served"] == 2, "known from the index"
        await eventually(lambda: not catalogue.counts["known"], "everything is checked")
        assert catalogue.fingerprint() == fingerprint
        assert await use(catalogue, "a") == place.digest(1)
        assert odd.calls["fetch"] == 0


@in_a_loop
async def test_everything_is_checked_though_the_settings_cannot_be_read(place: Place, odd: OddSource) -> None:
    place.drop("a", 1)
    odd.fail(SourceError("away"), "read_settings")
    async with place.server(source=odd, check=True) as catalogue:
        await eventually(lambda: current(catalogue) == place.digest(1), "it is checked")


@in_a_loop
async def test_a_request_does_not_wait_for_what_is_checked_in_the_background(place: Place, odd: OddSource) -> None:
    for name in "abc":
        place.drop(name, 1)
    odd.hooks["fetch"] = hang = Hang(lambda name, *_: name == "a")
    async with place.server(source=odd, check=True) as catalogue:
        await eventually(lambda: hang.count, "a hangs")
        assert await use(catalogue, "c") == place.digest(1)
        hang.go.set()
        assert await use(catalogue, "a") == place.digest(1)


# -------------------------------------------------------------------------------------------- what hangs or fails


@pytest.mark.parametrize("where", ["fetch", "engine"])
@in_a_loop
async def test_one_adapter_that_hangs_delays_nobody_else(place: Place, odd: OddSource, where: str) -> None:
    engine = FakeEngine()
    place.drop("bad", 1)
    for name in ("good", "second"):
        place.drop(name, 2)
    odd.hooks["fetch"] = hang = Hang(lambda name, *_: name == "bad")
    if where == "engine":
        hang.go.set()
        engine.hang(read_revision(place.adapters / "bad"))
    async with place.server(engine, source=odd, timeout_s=3600, load_timeout_s=3600) as catalogue:
        asking = [asyncio.create_task(use(catalogue, "bad")) for _ in range(20)]
        await eventually(lambda: hang.count and (engine.busy or where == "fetch"), "it hangs")
        assert await use(catalogue, "good") == place.digest(2)
        await catalogue.publish("new", place.version(3))
        await catalogue.publish("good", place.version(4))
        await catalogue.roll_back("good")
        await catalogue.pin("second")
        await catalogue.remove("new")
        assert not any(task.done() for task in asking)
        hang.go.set()
        for gate in engine.gates.values():
            gate.set()
        assert set(await asyncio.gather(*asking)) == {place.digest(1)}


@pytest.mark.parametrize("where", ["fetch", "engine"])
@in_a_loop
async def test_what_hangs_is_answered_after_the_time_limit(place: Place, odd: OddSource, where: str) -> None:
    engine = FakeEngine()
    place.drop("a", 1)
    odd.hooks["fetch"] = hang = Hang()
    if where == "engine":
        hang.go.set()
        engine.hang(read_revision(place.adapters / "a"))
    limits = {"timeout_s" if where == "fetch" else "load_timeout_s": SHORT_S}
    async with place.server(engine, source=odd, **limits) as catalogue:
        answers = await asyncio.gather(*(use(catalogue) for _ in range(100)), return_exceptions=True)
        assert all(isinstance(answer, UnavailableError) for answer in answers)
        assert f"within {SHORT_S} s" in str(answers[0])
        assert (hang.count, len(engine.loads)) == ((1, 0) if where == "fetch" else (1, 1))
        hang.go.set()
        for gate in engine.gates.values():
            gate.set()
        await settle()


@in_a_loop
async def test_many_requests_for_what_is_broken_ask_the_source_once(
    place: Place, odd: OddSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.drop("a", 1)
    odd.fail(SourceError("an input/output error"), "fetch")
    async with place.server(source=odd) as catalogue:
        now = 1000.0
        catalogue._failures._clock = lambda: now

        async def ask() -> float:
            with pytest.raises(UnavailableError, match="an input/output error") as caught:
                await use(catalogue)
            return caught.value.retry_after_s

        pauses = []
        for count in range(1, 9):
            answers = await asyncio.gather(*(ask() for _ in range(100)))
            assert odd.calls["fetch"] == count
            assert len(set(answers)) == 1
            pauses.append(answers[0])
            now += answers[0] - 0.5
            assert await ask() == pytest.approx(0.5)
            assert odd.calls["fetch"] == count
            now += 0.5
        assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
        odd.hooks.clear()
        assert await use(catalogue) == place.digest(1)


@in_a_loop
async def test_many_requests_for_what_the_engine_refuses_ask_it_once_and_a_change_asks_anew(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine) as catalogue:
        old, _ = [await catalogue.publish("a", place.version(seed)) for seed in (1, 2)]
        engine.refuses = lambda revision: True
        asked = len(engine.loads)

        async def ask() -> float:
            with pytest.raises(UnavailableError, match="cannot be loaded now: the engine refuses it") as caught:
                await use(catalogue, old.revision)
            return caught.value.retry_after_s

        assert all(0 < pause <= 1 for pause in await asyncio.gather(*(ask() for _ in range(100))))
        assert len(engine.loads) == asked + 1
        assert catalogue.entries["a"].rejection is None, "a former one says nothing of the current one"
        for change in (
            catalogue.roll_back("a"),
            catalogue.pin("a", old.digest),
            catalogue.publish("a", place.version(1)),
        ):
            asked = len(engine.loads)
            with pytest.raises(EngineRefusedError):
                await change
            assert len(engine.loads) == asked + 1
        engine.refuses = lambda revision: False
        assert await catalogue.roll_back("a") == old


@in_a_loop
async def test_what_the_engine_refuses_is_told(place: Place) -> None:
    engine = FakeEngine()
    engine.refuses = lambda revision: revision.name == "a"
    for name in "ab":
        place.drop(name, 1)
    async with place.server(engine) as catalogue:
        with pytest.raises(UnavailableError):
            await use(catalogue)
        rejection = catalogue.entries["a"].rejection
        assert rejection is not None
        assert (rejection.kind, rejection.reason) == ("engine", "the engine refuses it")
        assert await use(catalogue, "b") == place.digest(1)


@in_a_loop
async def test_a_load_that_takes_too_long_leaves_the_old_one(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine, load_timeout_s=SHORT_S) as catalogue:
        old = await catalogue.publish("a", place.version(1))
        slow = read_revision(place.version(2), "a")
        engine.hang(slow)
        for _ in range(2):
            with pytest.raises(LoadTimeoutError):
                await catalogue.publish("a", place.version(2))
            assert current(catalogue) == old.digest == digest_of(place.adapters / "a")
        engine.gates[slow].set()
        await settle()
        assert engine.held == {old}
        assert await catalogue.publish("a", place.version(2)) == slow


@in_a_loop
async def test_a_put_that_is_cancelled_leaves_nothing(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine) as catalogue:
        wanted = read_revision(place.version(1), "a")
        engine.hang(wanted)
        publishing = asyncio.create_task(catalogue.publish("a", place.version(1)))
        await eventually(lambda: engine.busy, "it is being loaded")
        publishing.cancel()
        await settle()
        engine.gates[wanted].set()
        await settle()
        assert (engine.held, catalogue.entries) == (set(), {})
        assert not (place.adapters / "a").exists()
        assert await catalogue.publish("a", place.version(1)) == wanted


@in_a_loop
async def test_changes_of_one_name_happen_one_after_the_other(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine, keep=5) as catalogue:
        revisions = await asyncio.gather(*(catalogue.publish("a", place.version(seed)) for seed in range(5)))
        await settle()
        assert current(catalogue) == digest_of(place.adapters / "a") == revisions[-1].digest
        assert engine.held == {revisions[-1]}
        assert await history(catalogue) == [revision.digest for revision in revisions[:-1]]
        assert not catalogue._locks, "no lock is kept for nothing"


# --------------------------------------------------------------------------------------------- the last good one


def damage(place: Place, name: str = "a") -> None:
    """Put something invalid in the place of an adapter, as by a writing that went wrong."""
    (place.adapters / name / WEIGHTS_FILE).write_bytes(b"damaged")


@in_a_loop
async def test_what_is_replaced_by_something_invalid_goes_on(place: Place) -> None:
    digest = place.drop("a", 1)
    engine = FakeEngine()
    async with place.server(engine, follow=True, check=True) as catalogue:
        await eventually(lambda: current(catalogue) == digest, "it is served")
        fingerprint = catalogue.fingerprint()
        damage(place)
        await eventually(lambda: catalogue.entries["a"].rejection, "it is rejected")
        assert await use(catalogue) == digest
        await kept(place, 1)

    async def goes_on(catalogue: Catalogue) -> None:
        await eventually(lambda: not catalogue.counts["known"], "everything is checked")
        rejection = catalogue.entries["a"].rejection
        assert rejection is not None
        assert "damaged or no safetensors file" in rejection.reason
        assert catalogue.fingerprint() == fingerprint
        assert (catalogue.counts["served"], catalogue.rejections) == (1, 1)
        assert await use(catalogue) == digest

    async with place.server(follow=True, check=True) as catalogue:
        await goes_on(catalogue)
    async with place.replica("two").server() as catalogue:
        assert await use(catalogue) == digest, "a request that comes first has it too"
        await goes_on(catalogue)
        await catalogue.publish("a", place.version(2))
        assert catalogue.entries["a"].rejection is None
        assert await use(catalogue) == place.digest(2)


@in_a_loop
async def test_the_last_good_one_is_not_missed_because_the_history_could_not_be_read(
    place: Place, odd: OddSource
) -> None:
    async with place.server() as catalogue:
        for seed in (1, 2, 3):
            await catalogue.publish("a", place.version(seed))
    damage(place)
    async with place.replica("two").server(source=odd) as catalogue:
        newest = place.digest(2)
        odd.hooks["fetch_revision"] = hang = Hang()
        asking = [asyncio.create_task(use(catalogue)) for _ in range(3)]
        await eventually(lambda: hang.count, "the last good one is being read")
        asking.append(asyncio.create_task(use(catalogue)))
        hang.go.set()
        assert await asyncio.gather(*asking) == [newest] * 4
    for method in ("revisions", "fetch_revision"):
        async with place.replica(method).server(source=odd) as catalogue:
            odd.fail(SourceError("away"), method)
            with pytest.raises(UnavailableError, match="away"):
                await use(catalogue)
            odd.hooks.clear()
            catalogue._failures._failures.clear()
            assert await use(catalogue) == newest


@in_a_loop
async def test_the_last_good_one_is_fetched_again_from_the_history(place: Place) -> None:
    digest = place.drop("a", 1)
    engine = FakeEngine()
    async with place.server(engine, follow=True) as catalogue:
        await use(catalogue)
        damage(place)
        await eventually(lambda: catalogue.entries["a"].rejection, "it is rejected")
        await kept(place, 1)
        await catalogue.cache.retire(catalogue.entries["a"].current)  # type: ignore[arg-type]
        shutil.rmtree(place.state / "objects")
        assert await use(catalogue) == digest


@in_a_loop
async def test_nothing_is_served_of_a_name_that_was_never_valid(place: Place) -> None:
    place.drop("a", 1)
    damage(place)
    async with place.server(follow=True) as catalogue:
        with pytest.raises(UnknownAdapterError):
            await use(catalogue)
        assert catalogue.entries["a"].state == "rejected"
        assert not catalogue.knows("a")
        place.drop("a", 2)
        await eventually(lambda: catalogue.knows("a"), "it was mended")
        assert await use(catalogue) == place.digest(2)


# --------------------------------------------------------------------------------------------- replaced by hand


@in_a_loop
async def test_what_is_replaced_by_hand_is_kept(place: Place) -> None:
    old = place.drop("a", 1)
    async with place.server(follow=True) as catalogue:
        await use(catalogue)
        new = place.drop("a", 2)
        await eventually(lambda: current(catalogue) == new, "it is followed")
        await kept(place, 1)
        assert await use(catalogue, f"a@{old[:12]}") == old
        assert (await catalogue.roll_back("a")).digest == old == digest_of(place.adapters / "a")


@in_a_loop
async def test_a_source_that_cannot_be_written_is_served_and_its_former_contents_are_kept_locally(
    place: Place, odd: OddSource
) -> None:
    old = place.drop("a", 1)
    odd.fail(ReadOnlyError("not ours"), "put", "remove", "keep", "prune", "write_settings")
    async with place.server(source=odd, follow=True, keep=1) as catalogue:
        await use(catalogue)
        local = DirectoryHistory(place.state / "history")
        for seed, former in ((2, 1), (3, 2)):
            place.drop("a", seed)
            await eventually(lambda seed=seed: current(catalogue) == place.digest(seed), "it is followed")
            await eventually(
                lambda former=former: local.revisions("a") == [place.digest(former)], "the newest one is kept"
            )
        former = await catalogue.load(f"a@{place.digest(2)[:12]}")
        await catalogue.cache.retire(former)
        evict(place, 2)
        assert await use(catalogue, former.revision) == place.digest(2)
        with pytest.raises(UnknownAdapterError):
            await use(catalogue, f"a@{old[:12]}")
        for change in (
            catalogue.publish("a", place.version(4)),
            catalogue.publish("new", place.version(4)),
            catalogue.roll_back("a"),
            catalogue.remove("a"),
            catalogue.pin("a"),
            catalogue.set_alias("chat", Alias.parse("a")),
        ):
            with pytest.raises(ReadOnlyError, match="not ours"):
                await change
        assert await use(catalogue) == place.digest(3)
        assert list(catalogue.entries) == ["a"]
    assert not (place.adapters / HISTORY).exists()


# -------------------------------------------------------------------------------------------------- STATE's copies


def evict(place: Place, seed: int) -> None:
    shutil.rmtree(place.state / "objects" / place.digest(seed))


def spoil(place: Place, seed: int) -> None:
    (place.state / "objects" / place.digest(seed) / WEIGHTS_FILE).write_bytes(b"damaged")


@pytest.mark.parametrize("lose", [evict, spoil])
@in_a_loop
async def test_a_copy_that_is_gone_or_damaged_is_fetched_again(
    place: Place, odd: OddSource, lose: Callable[[Place, int], None]
) -> None:
    engine = FakeEngine()
    async with place.server(engine, source=odd) as catalogue:
        old, new = [await catalogue.publish("a", place.version(seed)) for seed in (1, 2)]
        await catalogue.publish("b", place.version(3))
        await use(catalogue, old.revision)
        for revision in (old, new):
            await catalogue.cache.retire(revision)
        odd.calls.clear()
        for seed in (1, 2):
            lose(place, seed)
        assert await use(catalogue) == new.digest
        assert await use(catalogue, old.revision) == old.digest
        assert (odd.calls["fetch"], odd.calls["fetch_revision"]) == (1, 1)
        for revision in (old, new):
            await catalogue.cache.retire(revision)
        for seed in (1, 2):
            lose(place, seed)
        odd.fail(SourceError("away"), "fetch", "fetch_revision", "revisions", "look", "list")
        for asked in ("a", old.revision):
            with pytest.raises(UnavailableError, match="cannot be loaded now: away"):
                await use(catalogue, asked)
        assert await use(catalogue, "b") == place.digest(3)
        assert catalogue.entries["a"].rejection is None


@in_a_loop
async def test_a_small_state_directory_serves_more_than_it_holds(place: Place, odd: OddSource) -> None:
    nbytes = sum(path.stat().st_size for path in place.version(0).iterdir())
    seeds = range(6)
    for seed in seeds:
        place.drop(f"n{seed}", seed)
    weights = (place.version(0) / WEIGHTS_FILE).stat().st_size
    async with place.server(source=odd, state_bytes=3 * nbytes, cache_bytes=weights) as catalogue:
        for _ in range(2):
            for seed in seeds:
                assert await use(catalogue, f"n{seed}") == place.digest(seed)
        assert catalogue.contents.state.nbytes <= 3 * nbytes
        assert odd.calls["fetch"] > len(seeds)


# ---------------------------------------------------------------------------------------------------- resolvers


@in_a_loop
async def test_what_a_resolver_brings_is_served_without_being_in_the_source(place: Place) -> None:
    async with place.server(follow=True) as catalogue:
        await catalogue.adopt("a", place.version(1))
        assert await use(catalogue) == place.digest(1)
        place.drop("b", 2)
        await eventually(lambda: "b" in catalogue.entries, "the source was looked at")
        await catalogue.adopt("a", place.version(3))
        assert await use(catalogue) == place.digest(1), "it is there already"
        await catalogue.publish("a", place.version(4))
        assert await use(catalogue) == place.digest(4) == digest_of(place.adapters / "a")
        await catalogue.adopt("c", place.version(5))
        await catalogue.remove("c")
        with pytest.raises(UnknownAdapterError):
            await use(catalogue, "c")
    assert [path for path in tree(place.adapters) if path.startswith("c")] == []
    async with place.server() as catalogue:
        assert catalogue.entries.keys() == {"a", "b"}


@in_a_loop
async def test_what_a_resolver_brought_is_forgotten_with_its_copy_and_can_be_brought_again(place: Place) -> None:
    async with place.server() as catalogue:
        await catalogue.adopt("a", place.version(1))
        await use(catalogue)
        for _ in range(2):
            await catalogue.cache.retire(catalogue.entries["a"].current)  # type: ignore[arg-type]
            evict(place, 1)
            with pytest.raises(UnavailableError):
                await use(catalogue)
            assert "a" not in catalogue.entries, "the resolver is asked again"
            await catalogue.adopt("a", place.version(1))
            assert await use(catalogue) == place.digest(1)


@in_a_loop
async def test_what_a_resolver_brings_is_checked_as_all_others(place: Place) -> None:
    async with place.server(reserved={"llama"}.__contains__) as catalogue:
        bad = shutil.copytree(place.version(1), place.directory / "bad")
        (bad / CONFIG_FILE).write_text("{")
        for name, directory in (("a", bad), ("llama", place.version(1))):
            with pytest.raises(AdapterError):
                await catalogue.adopt(name, directory)
        assert catalogue.entries == {}


# ------------------------------------------------------------------------------------------- use while it changes


def two_fit(place: Place) -> int:
    """Bytes for two adapters in the engine."""
    return 2 * (place.version(0) / WEIGHTS_FILE).stat().st_size


@in_a_loop
async def test_an_evicted_revision_is_loaded_again(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine, cache_bytes=two_fit(place)) as catalogue:
        first, *_ = [await catalogue.publish(name, place.version(0)) for name in "abc"]
        assert first not in engine.held
        async with catalogue.use("a"), catalogue.use("c"):
            assert first in engine.held
            with pytest.raises(UnavailableError, match=r"'b' cannot be loaded now: .*in use or pinned"):
                await use(catalogue, "b")
        assert await use(catalogue, "b") == place.digest(0)


@pytest.mark.parametrize("change", ["replace", "remove", "replace and roll back"])
@in_a_loop
async def test_a_request_that_waits_for_a_load_has_what_the_name_stands_for_then(
    place: Place, change: str
) -> None:
    engine = FakeEngine()
    old = read_revision(place.version(1), "a")
    place.drop("a", 1)
    async with place.server(engine) as catalogue:
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
            assert engine.held == set()
            return
        publishing = asyncio.create_task(catalogue.publish("a", place.version(2)))
        await eventually(lambda: len(engine.loads) == 2, "the new one is loaded too")
        engine.go.set()
        new = await publishing
        if change != "replace":
            await catalogue.roll_back("a")
        async with stack:
            assert await using in {old, new}
        assert await use(catalogue) == (new if change == "replace" else old).digest


@in_a_loop
async def test_a_request_never_has_a_revision_that_was_retired_before_it_came(place: Place) -> None:
    """Many requests while a name is replaced over and over, rolled back and evicted."""
    engine = FakeEngine()
    async with place.server(engine, cache_bytes=3 * two_fit(place) // 2, keep=1) as catalogue:
        for name in "ab":
            await catalogue.publish(name, place.version(0))
        done = False

        async def ask(name: str) -> int:
            count = 0
            while not done:
                async with catalogue.use(name) as used:
                    assert used == catalogue.entries[name].current
                    for _ in range(count % 5):
                        await asyncio.sleep(0)
                        assert used in engine.held
                count += 1
                await asyncio.sleep(0)
            return count

        asking = [asyncio.create_task(ask(name)) for name in ("a", "a", "a", "b")]
        for seed in (1, 2, 0, 1, 2, 3):
            with suppress(CacheFullError, UnknownAdapterError):
                await catalogue.publish("a", place.version(seed))
                await catalogue.roll_back("a")
        done = True
        assert min(await asyncio.gather(*asking)) > 1
        await settle()
        assert {r.digest for r in engine.held if r.name == "a"} <= {current(catalogue)}


# ---------------------------------------------------------------------------------------------------- counters


def check_counts(catalogue: Catalogue) -> None:
    """Count everything anew."""
    entries = list(catalogue.entries.values())
    assert +catalogue.counts == Counter(entry.state for entry in entries)
    assert catalogue.rejections == sum(entry.rejection is not None for entry in entries)
    assert catalogue.served_bytes == sum(e.current.nbytes for e in entries if e.current is not None)
    fresh = Catalogue(catalogue.contents, FakeEngine(), cache_bytes=1)
    for entry in entries:
        fresh._enter(entry)
    catalogue.contents.state.needed = catalogue.cache.reads
    assert catalogue.fingerprint() == fresh.fingerprint()


@pytest.mark.parametrize("seed", range(3))
@in_a_loop
async def test_what_is_counted_is_so_whatever_happens(place: Place, odd: OddSource, seed: int) -> None:
    dice = random.Random(seed)
    engine = FakeEngine()
    engine.refuses = lambda revision: dice.random() < 0.1
    invalid = shutil.copytree(place.version(0), place.directory / "invalid")
    (invalid / WEIGHTS_FILE).write_bytes(b"damaged")
    source = DirectorySource(place.adapters)

    async def by_hand(name: str, version: int) -> None:
        if version:
            place.drop(name, version)
        elif (place.adapters / name).exists():
            damage(place, name)
        if (listed := source.look(name)) is not None:
            await catalogue.take(name, listed)

    async def forget(name: str) -> None:
        shutil.rmtree(place.adapters / name, ignore_errors=True)
        await catalogue.forget(name, float("inf"))

    for name in "ab":
        place.drop(name, 1)
    async with place.server(engine, source=odd, reserved={"d"}.__contains__) as catalogue:
        changes: list[Callable[[str, int], Awaitable[Any]]] = [
            lambda name, seed: catalogue.publish(name, place.version(seed) if seed else invalid),
            lambda name, seed: catalogue.roll_back(name),
            lambda name, seed: catalogue.remove(name),
            lambda name, seed: catalogue.pin(name),
            lambda name, seed: catalogue.unpin(name),
            lambda name, seed: catalogue.adopt(name, place.version(seed)),
            lambda name, seed: by_hand(name, seed),
            lambda name, seed: by_hand(name, 0),
            lambda name, seed: forget(name),
            lambda name, seed: use(catalogue, name),
            lambda name, seed: use(catalogue, name),
        ]
        for _ in range(120):
            if dice.random() < 0.1:
                method = dice.choice(("put", "fetch", "remove", "revisions", "write_settings"))
                odd.fail(SourceError("away"), method)
            change = dice.choice(changes)(dice.choice("abcd"), dice.randrange(5))
            with suppress(AdapterError):
                await change
            odd.hooks.clear()
            if dice.random() < 0.3:
                catalogue._failures._failures.clear()
            check_counts(catalogue)
        await eventually(lambda: not catalogue._tasks, "everything has ended")
        adopted = {name for name, entry in catalogue.entries.items() if entry.listed is None}
        assert catalogue.entries.keys() - adopted == source.list().adapters.keys() - adopted


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


@in_a_loop
async def test_each_kind_of_change_is_told_with_what_the_name_stood_for_before_and_after(place: Place) -> None:
    told = Told()
    async with place.server(changed=told) as catalogue:
        first = (await catalogue.publish("a", place.version(1))).revision
        assert told.take() == [("put", "a", None, first, "ok")]
        second = (await catalogue.publish("a", place.version(2))).revision
        assert told.take() == [("put", "a", first, second, "ok")]
        await catalogue.roll_back("a")
        assert told.take() == [("rollback", "a", second, first, "ok")]
        digits = second.partition("@")[2]
        await catalogue.pin("a")
        await catalogue.pin("a", digits)
        await catalogue.unpin("a", digits)
        await catalogue.unpin("a")
        assert told.take() == [
            ("pin", "a", first, first, "ok"), ("pin", "a", second, second, "ok"),
            ("unpin", "a", second, second, "ok"), ("unpin", "a", first, first, "ok"),
        ]  # fmt: skip
        await catalogue.set_alias("chat", Alias.parse("a"))
        await catalogue.set_alias("chat", None)
        assert told.take() == [("alias", "chat", None, "a: 1", "ok"), ("alias", "chat", "a: 1", None, "ok")]
        await catalogue.remove("a")
        assert told.take() == [("delete", "a", first, None, "ok")]
        await catalogue.adopt("b", place.version(1))
        assert told.take() == [("resolve", "b", None, catalogue.entries["b"].current.revision, "ok")]  # type: ignore[union-attr]


@in_a_loop
async def test_changes_by_hand_are_told_as_such_and_once(place: Place) -> None:
    told = Told()
    first = f"a@{place.drop('a', 1)[:12]}"
    async with place.server(changed=told, follow=True) as catalogue:
        await use(catalogue)
        assert told.take() == []
        second = f"a@{place.drop('a', 2)[:12]}"
        await eventually(lambda: told.changes, "the change is told")
        assert told.take() == [("publish", "a", first, second, "ok")]
        damage(place)
        await eventually(lambda: told.changes, "the rejection is told")
        ((action, name, before, after, reason),) = told.take()
        assert (action, name, before, after) == ("reject", "a", second, second)
        assert "damaged" in reason
        os.utime(place.adapters / "a" / CONFIG_FILE)
        seen = catalogue.entries["a"].listed
        await eventually(lambda: catalogue.entries["a"].listed != seen, "it was looked at again")
        assert told.take() == []
        shutil.rmtree(place.adapters / "a")
        await eventually(lambda: told.changes, "its end is told")
        assert told.take() == [("forget", "a", second, None, "ok")]


@in_a_loop
async def test_what_changes_nothing_is_not_told(place: Place) -> None:
    told = Told()
    engine = FakeEngine()
    async with place.server(engine, changed=told) as catalogue:
        await catalogue.publish("a", place.version(1))
        told.take()
        engine.refuses = lambda revision: True
        with pytest.raises(AdapterError):
            await catalogue.publish("a", place.version(2))
        for change in (catalogue.roll_back("a"), catalogue.remove("b"), catalogue.pin("b"), catalogue.unpin("b")):
            with pytest.raises(UnknownAdapterError):
                await change
        await catalogue.unpin("a")
        assert told.take() == []
    async with place.server(changed=told, check=True) as catalogue:
        assert current(catalogue) == place.digest(1)
        assert told.take() == []


@in_a_loop
async def test_when_it_was_published_stays_over_a_restart(place: Place) -> None:
    """Clients see it as a model's `created`."""
    async with place.server() as catalogue:
        await catalogue.publish("a", place.version(1))
        published = catalogue.entries["a"].published
    for which in ("state", "two"):
        async with place.replica(which).server() as catalogue:
            assert catalogue.entries["a"].published == published


@in_a_loop
async def test_a_history_is_read_again_after_a_while_only_for_what_is_not_in_it(
    place: Place, odd: OddSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with place.server(source=odd) as catalogue:
        old, _ = [await catalogue.publish("a", place.version(seed)) for seed in (1, 2)]
        await use(catalogue, old.revision)
        odd.calls.clear()
        for _ in range(10):
            with pytest.raises(UnknownAdapterError):
                await use(catalogue, "a@000000000000")
        assert odd.calls["revisions"] == 0
        monkeypatch.setattr(catalogue_module, "_HISTORY_S", 0.0)
        await use(catalogue, old.revision)
        assert odd.calls["revisions"] == 0
        with pytest.raises(UnknownAdapterError):
            await use(catalogue, "a@000000000000")
        assert odd.calls["revisions"] == 1


@in_a_loop
async def test_a_former_revision_that_goes_while_it_is_asked_for_is_unknown(place: Place, odd: OddSource) -> None:
    async with place.server() as catalogue:
        old, _ = [await catalogue.publish("a", place.version(seed)) for seed in (1, 2)]
    async with place.replica("two").server(source=odd) as catalogue:
        odd.fail(NoSuchRevisionError("it was pruned"), "fetch_revision")
        with pytest.raises(UnknownAdapterError, match="has no former content"):
            await use(catalogue, old.revision)


def test_revisions_are_shown_as_the_current_one_and_what_was_asked_for(place: Place) -> None:
    async def body(catalogue: Catalogue) -> None:
        old = await catalogue.publish("a", place.version(1))
        new = await catalogue.publish("a", place.version(2))
        assert catalogue.entries["a"].revisions() == [new]
        await use(catalogue, old.revision)
        assert catalogue.entries["a"].revisions() == [new, old]
        assert isinstance(new, Revision)

    place.serve(body)
