"""Pins, aliases and shares: what the source's file may say, and what the catalogue makes of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from registry_support import FakeEngine, OddSource, Place, eventually, in_a_loop

from qaa_serve.adapters import WEIGHTS_FILE, AdapterError
from qaa_serve.registry import (
    Alias,
    CacheFullError,
    NameRefusedError,
    SettingsError,
    SourceSettings,
    UnknownAdapterError,
)
from qaa_serve.sources import SETTINGS_FILE, DirectorySource, SourceError

DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# ------------------------------------------------------------------------------------------------- the file


def test_what_is_written_is_read_again() -> None:
    settings = SourceSettings(
        frozenset({"a", f"b@{DIGEST}"}), {"chat": Alias({"a": 9, f"b@{DIGEST}": 1}), "plain": Alias({"a": 1})}
    )
    assert SourceSettings.parse(settings.encode()) == settings
    assert SourceSettings.parse(b"") == SourceSettings()
    assert SourceSettings.parse(SourceSettings().encode()) == SourceSettings()


def test_servers_that_agree_write_the_same_bytes() -> None:
    one = SourceSettings().with_pin("a", True).with_pin("b", True).with_alias("x", Alias.parse({"b": 1, "a": 2}))
    other = SourceSettings().with_alias("x", Alias.parse({"a": 2, "b": 1})).with_pin("b", True).with_pin("a", True)
    assert one.encode() == other.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b"null", b"\xff", b"{}", b'{"version": 1}', b"[" * 100_000,
        b'{"version": 1, "pinned": 3, "aliases": {}}', b'{"version": 1, "pinned": [3], "aliases": {}}',
        b'{"version": 1, "pinned": ["a@12"], "aliases": {}}', b'{"version": 1, "pinned": [], "aliases": []}',
        b'{"version": 1, "pinned": [], "aliases": {"x": "a"}}',
        b'{"version": 1, "pinned": [], "aliases": {"x": {"to": {}}}}',
        b'{"version": 1, "pinned": [], "aliases": {"../x": {"to": "a"}}}',
        b'{"version": 1, "pinned": [], "aliases": {"other": {"to": "a"}}}',
    ],
)  # fmt: skip
def test_a_file_that_is_not_one_is_an_error(content: bytes) -> None:
    with pytest.raises(AdapterError):
        SourceSettings.parse(content)


def test_a_file_of_a_newer_version_is_not_guessed_at() -> None:
    with pytest.raises(SettingsError, match="version 2 is not known here; this server reads 1"):
        SourceSettings.parse(b'{"version": 2, "pinned": [], "aliases": {}}')


@pytest.mark.parametrize(
    "to",
    [
        None, 3, [], {}, ["a"], "a b", "a@12", "a@" + "x" * 12, {"a": -1}, {"a": 1.5}, {"a": True}, {"a": "1"},
        {"a": 0}, {"a": 0, "b": 0}, {"a": 1_000_001}, {"a b": 1}, {3: 1}, {f"n{i}": 1 for i in range(101)},
    ],
)  # fmt: skip
def test_what_an_alias_cannot_lead_to_is_refused(to: Any) -> None:
    with pytest.raises(AdapterError):
        Alias.parse(to)


def test_a_target_without_a_share_is_none() -> None:
    assert Alias.parse({"a": 0, "b": 3}) == Alias({"b": 3})
    assert Alias.parse("a") == Alias({"a": 1})


# ------------------------------------------------------------------------------------------------- shares


def test_shares_are_kept_to() -> None:
    alias = Alias.parse({"a": 80, "b": 20})
    for who in (lambda i: None, lambda i: f"client {i}"):
        chosen = Counter(alias.choose(who(i)) for i in range(5000))
        assert chosen.keys() == {"a", "b"}
        assert 0.75 < chosen["a"] / 5000 < 0.85


def test_a_client_always_gets_the_same_target() -> None:
    alias = Alias.parse({"a": 1, "b": 1, "c": 1})
    again = SourceSettings.parse(SourceSettings().with_alias("x", alias).encode()).aliases["x"]
    for i in range(200):
        who = f"client {i} \udcff"
        assert {alias.choose(who) for _ in range(3)} == {again.choose(who)}


# ------------------------------------------------------------------------------------------- pins and aliases


def test_what_somebody_relies_on_is_told_by_name() -> None:
    settings = SourceSettings(
        frozenset({"a", f"a@{DIGEST}", "b", "c@" + "1" * 12}),
        {"x": Alias({"a@" + "2" * 64: 1, "b": 1}), "y": Alias({"a": 1})},
    )
    assert settings.pins("a") == {"", DIGEST}
    assert settings.pins("b") == {""}
    assert settings.pins("none") == frozenset()
    assert settings.protected("a") == {DIGEST, "2" * 64}
    assert settings.protected("b") == frozenset()
    assert settings.protected("c") == {"1" * 12}
    assert settings.users("a") == ["x", "y"]
    assert settings.users("b") == ["x"]
    assert settings.users("c") == []


def two_fit(place: Place) -> int:
    """Bytes for two adapters in the engine."""
    return 2 * (place.version(0) / WEIGHTS_FILE).stat().st_size


@in_a_loop
async def test_a_pinned_name_stays_in_memory_whatever_it_stands_for(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine, cache_bytes=two_fit(place)) as catalogue:
        await catalogue.publish("a", place.version(0))
        await catalogue.pin("a")
        new = await catalogue.publish("a", place.version(1))
        others = [await catalogue.publish(name, place.version(0)) for name in ("b", "c")]
        assert engine.held == {new, others[-1]}
        await catalogue.unpin("a")
        await catalogue.publish("d", place.version(0))
        assert new not in engine.held


@in_a_loop
async def test_a_pinned_revision_stays_in_memory_when_it_is_replaced(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine, keep=1, cache_bytes=two_fit(place)) as catalogue:
        pinned = await catalogue.publish("a", place.version(0))
        await catalogue.pin("a", pinned.short_digest)
        later = [await catalogue.publish("a", place.version(seed)) for seed in range(1, 4)]
        assert engine.held == {pinned, later[-1]}
        await catalogue.unpin("a", pinned.short_digest)
        other = await catalogue.publish("b", place.version(0))
        assert engine.held == {later[-1], other}


@in_a_loop
async def test_pinning_loads_and_says_when_there_is_no_room(place: Place) -> None:
    engine = FakeEngine()
    async with place.server(engine, cache_bytes=two_fit(place)) as catalogue:
        old, new = [await catalogue.publish("a", place.version(seed)) for seed in (0, 1)]
        await catalogue.pin("a", old.short_digest)
        await catalogue.pin("a")
        assert engine.held == {old, new}
        with pytest.raises(CacheFullError):
            await catalogue.publish("b", place.version(2))
        assert list(catalogue.entries) == ["a"]
        for asked in (("b", None), ("a", "0" * 12), ("a", "")):
            for change in (catalogue.pin, catalogue.unpin):
                with pytest.raises(UnknownAdapterError):
                    await change(*asked)
        await catalogue.remove("a")
        assert engine.held == set()
        assert catalogue.cache.pinned == set()


@in_a_loop
async def test_what_is_pinned_is_in_memory_after_a_start(place: Place) -> None:
    async with place.server() as catalogue:
        old, new = [await catalogue.publish("a", place.version(seed)) for seed in (0, 1)]
        await catalogue.publish("b", place.version(0))
        await catalogue.pin("a")
        await catalogue.pin("a", old.short_digest)
    for which in ("state", "two"):
        engine = FakeEngine()
        async with place.replica(which).server(engine, check=True) as catalogue:
            await eventually(lambda engine=engine: engine.held == {old, new}, "what is pinned is loaded")
            assert catalogue.cache.pinned == {old.int_id, new.int_id}


@in_a_loop
async def test_what_is_pinned_and_gone_can_be_unpinned(place: Place) -> None:
    async with place.server() as catalogue:
        revision = await catalogue.publish("a", place.version(0))
        await catalogue.pin("a")
        await catalogue.pin("a", revision.short_digest)
        await catalogue.remove("a", purge=True)
        assert catalogue.settings.pinned == {"a", revision.engine_name}
        await catalogue.unpin("a", revision.short_digest)
        await catalogue.unpin("a")
        assert catalogue.settings.pinned == frozenset()
        with pytest.raises(UnknownAdapterError):
            await catalogue.unpin("a")


@in_a_loop
async def test_an_alias_leads_to_what_it_says(place: Place) -> None:
    async with place.server() as catalogue:
        old, new = [await catalogue.publish("a", place.version(seed)) for seed in (0, 1)]
        await catalogue.set_alias("stable", Alias.parse(old.revision))
        await catalogue.set_alias("chat", Alias.parse("a"))
        for alias, revision in (("stable", old), ("chat", new), ("a", new)):
            assert catalogue.knows(alias)
            async with catalogue.use(catalogue.route(alias)) as used:
                assert used == revision
        assert catalogue.route("stable") == old.engine_name, "no other revision ever begins so"
        await catalogue.set_alias("chat", Alias.parse(old.revision))
        assert catalogue.route("chat") == old.engine_name
        content = json.loads((place.adapters / SETTINGS_FILE).read_bytes())
        assert content["aliases"]["chat"] == {"to": {old.engine_name: 1}}
        await catalogue.set_alias("chat", None)
        assert not catalogue.knows("chat")
        with pytest.raises(UnknownAdapterError, match="there is no alias 'chat'"):
            await catalogue.set_alias("chat", None)


@in_a_loop
async def test_an_alias_that_leads_nowhere_is_refused(place: Place) -> None:
    async with place.server() as catalogue:
        await catalogue.publish("a", place.version(0))
        await catalogue.set_alias("chat", Alias.parse("a"))
        for to in ("b", {"a": 1, "b": 1}, "a@" + "0" * 12, "chat"):
            with pytest.raises(UnknownAdapterError):
                await catalogue.set_alias("new", Alias.parse(to))
        with pytest.raises(NameRefusedError, match="'a' is an adapter: choose another name for the alias"):
            await catalogue.set_alias("a", Alias.parse("a"))
        with pytest.raises(NameRefusedError, match="'chat' is an alias: choose another name, or delete the alias"):
            await catalogue.publish("chat", place.version(1))
        assert catalogue.settings.aliases.keys() == {"chat"}


@in_a_loop
async def test_what_cannot_be_written_is_not_so(place: Place) -> None:
    odd = OddSource(DirectorySource(place.adapters))
    async with place.server(source=odd) as catalogue:
        await catalogue.publish("a", place.version(0))
        odd.fail(SourceError("full"), "write_settings")
        for change in (catalogue.pin("a"), catalogue.set_alias("chat", Alias.parse("a"))):
            with pytest.raises(SourceError, match="full"):
                await change
        assert catalogue.settings == SourceSettings()
        assert catalogue.cache.pinned == set()
        assert not catalogue.knows("chat")


@in_a_loop
async def test_a_file_that_is_wrong_is_not_written_over(place: Place) -> None:
    file = place.adapters / SETTINGS_FILE
    async with place.server() as catalogue:
        await catalogue.publish("a", place.version(0))
        file.write_text("{")
        with pytest.raises(SettingsError, match="they cannot be read"):
            await catalogue.pin("a")
        assert file.read_text() == "{"
