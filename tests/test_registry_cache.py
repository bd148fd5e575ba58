"""The engine's memory for adapters: bounded, and nothing goes that somebody uses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from registry_support import FakeEngine, settle

from qaa_serve.adapters import AdapterError
from qaa_serve.registry import CacheFullError, EngineCache, Revision


def revision(name: str, nbytes: int = 10) -> Revision:
    return Revision(name, "0" * 64, Path("/nowhere"), "QAA", 4, nbytes, "base", {})


A, B, C, D = (revision(name) for name in "abcd")


def make_cache(
    capacity: int = 30, max_count: int = 100, unloaded: Callable[[], None] = lambda: None
) -> tuple[EngineCache, FakeEngine]:
    engine = FakeEngine(reads=False)
    return EngineCache(engine, capacity, max_count, unloaded=unloaded), engine


def test_the_least_recently_used_makes_room() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        for loaded in (A, B, C):
            await cache.load(loaded)
        with cache.hold(A.int_id):
            pass
        await cache.load(D)
        assert engine.held == {A, C, D}
        await cache.load(C)  # used, though it is there
        await cache.load(B)
        assert engine.held == {B, C, D}
        assert engine.loads == [r.revision for r in (A, B, C, D, B)]
        assert engine.unloads == [r.revision for r in (B, A)]
        assert cache.nbytes == 30

    asyncio.run(run())


def test_room_is_made_in_bytes() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        for loaded in (A, B, C):
            await cache.load(loaded)
        await cache.load(large := revision("large", 15))
        assert engine.held == {C, large}
        assert cache.nbytes == 25

    asyncio.run(run())


def test_there_are_never_more_than_the_engine_can_hold() -> None:
    async def run() -> None:
        cache, engine = make_cache(max_count=2)
        for loaded in (A, B, C):
            await cache.load(loaded)
        assert engine.held == {B, C}

    asyncio.run(run())


def test_what_is_held_or_pinned_stays_and_the_error_says_so() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        for loaded in (A, B, C):
            await cache.load(loaded)
        cache.pinned = {A.int_id}
        with cache.hold(B.int_id):
            await cache.load(D)
            assert engine.held == {A, B, D}
            with cache.hold(D.int_id), pytest.raises(CacheFullError) as caught:
                await cache.load(C)
            assert "needs 10 bytes, and of the 30 bytes for adapters 30 hold 3 that are in use" in str(
                caught.value
            )
            assert "try again later, or start with a larger --adapter-cache-bytes" in str(caught.value)
        await cache.load(C)
        assert engine.held == {A, C, D}

    asyncio.run(run())


def test_nothing_goes_for_what_does_not_fit_anyway() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        for loaded in (A, B):
            await cache.load(loaded)
        with pytest.raises(CacheFullError):
            await cache.load(revision("huge", 31))
        with cache.hold(A.int_id), pytest.raises(CacheFullError):
            await cache.load(revision("large", 21))
        assert engine.held == {A, B}

    asyncio.run(run())


def test_what_came_into_use_while_room_was_made_stays() -> None:
    async def run() -> None:
        with contextlib.ExitStack() as stack:

            def use_b() -> None:  # as A goes
                stack.enter_context(cache.hold(B.int_id))

            cache, engine = make_cache(unloaded=use_b)
            for loaded in (A, B, C):
                await cache.load(loaded)
            with pytest.raises(CacheFullError):
                await cache.load(revision("large", 30))
            assert B in engine.held

    asyncio.run(run())


def test_what_the_engine_refuses_takes_no_room() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        engine.refuses = lambda revision: revision == A
        with pytest.raises(AdapterError, match="the engine refuses it"):
            await cache.load(A)
        assert (cache.nbytes, cache.find(A), cache.has(A.int_id)) == (0, None, False)
        await cache.load(B)
        assert cache.has(B.int_id)

    asyncio.run(run())


def test_what_is_not_there_cannot_be_held() -> None:
    async def run() -> None:
        cache, _ = make_cache()
        with pytest.raises(KeyError), cache.hold(A.int_id):
            pass
        await cache.load(A)
        with cache.hold(A.int_id) as held:
            assert held is A
        await cache.retire(A)
        with pytest.raises(KeyError), cache.hold(A.int_id):
            pass

    asyncio.run(run())


def test_a_retired_revision_goes_when_its_last_request_ends() -> None:
    async def run() -> None:
        gone: list[bool] = []
        cache, engine = make_cache(unloaded=lambda: gone.append(A not in engine.held))
        await cache.load(A)
        with cache.hold(A.int_id):
            with cache.hold(A.int_id):
                await cache.retire(A)
            await settle()
            assert engine.held == {A}
            assert cache.has(A.int_id)
        await settle()
        assert engine.held == set()
        assert gone == [True]
        await cache.retire(A)  # once more does nothing
        assert engine.unloads == [A.revision]

    asyncio.run(run())


def test_a_request_that_fails_lets_go_too() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        await cache.load(A)
        with contextlib.suppress(ZeroDivisionError), cache.hold(A.int_id):
            await cache.retire(A)
            raise ZeroDivisionError
        await settle()
        assert engine.held == set()

    asyncio.run(run())


def test_a_retired_revision_that_is_loaded_again_stays() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        await cache.load(A)
        with cache.hold(A.int_id):
            await cache.retire(A)
            await cache.load(A)
        await settle()
        assert engine.held == {A}
        assert engine.loads == [A.revision]

    asyncio.run(run())


def test_a_retired_revision_that_comes_into_use_as_it_goes_stays() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        await cache.load(A)
        with cache.hold(A.int_id):
            await cache.retire(A)
        with cache.hold(A.int_id):  # before the unloading has begun
            await settle()
            assert engine.held == {A}
        await settle()
        assert engine.held == set()

    asyncio.run(run())


def test_a_revision_that_many_want_is_loaded_once() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        engine.go.clear()
        wanting = [asyncio.create_task(cache.load(A)) for _ in range(5)]
        await engine.loading.wait()
        engine.go.set()
        await asyncio.gather(*wanting)
        assert engine.loads == [A.revision]

    asyncio.run(run())


def test_retiring_and_loading_at_once_leave_cache_and_engine_agreeing() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        for _ in range(20):
            await asyncio.gather(*(step(r) for r in (A, B, C, D) for step in (cache.load, cache.retire)))
            await settle()
            assert {r for r in (A, B, C, D) if cache.has(r.int_id)} == engine.held
            assert cache.nbytes == 10 * len(engine.held) <= 30

    asyncio.run(run())
