"""The engine's memory for adapters: bounded, and nothing goes that somebody uses."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import random
import weakref
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from registry_support import FakeEngine, settle

from qaa_serve.adapters import AdapterError
from qaa_serve.registry import (
    CacheFullError,
    EngineCache,
    EngineRefusedError,
    LoadTimeoutError,
    Observer,
    Revision,
    UnavailableError,
)
from qaa_serve.registry.contents import RefusedContentError
from qaa_serve.registry.failures import MAX_REMEMBERED, Failures


def revision(name: str, nbytes: int = 10) -> Revision:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Revision(name, digest, Path("/nowhere"), "QAA", 4, nbytes, "base", {})


A, B, C, D = (revision(name) for name in "abcd")


def make_cache(capacity: int = 30, max_count: int = 100, **settings: Any) -> tuple[EngineCache, FakeEngine]:
    engine = FakeEngine(reads=False)
    return EngineCache(engine, capacity, max_count, **settings), engine


def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.create_task(work)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


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
        cache.pin(A.int_id)
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
        observer = Observer()
        cache, engine = make_cache(observer=observer)
        for loaded in (A, B, C):
            await cache.load(loaded)
        with contextlib.ExitStack() as stack:
            observer.evicted = lambda revision: stack.enter_context(cache.hold(B.int_id))  # type: ignore[method-assign]
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
        cache, engine = make_cache()
        await cache.load(A)
        with cache.hold(A.int_id):
            with cache.hold(A.int_id):
                await cache.retire(A)
            await settle()
            assert engine.held == {A}
            assert cache.has(A.int_id)
        await settle()
        assert engine.held == set()
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


# ----------------------------------------------------------------------------------------- several loads at once


def test_a_load_that_hangs_stops_no_other_one() -> None:
    async def run() -> None:
        cache, engine = make_cache(loaders=2)
        engine.hang(A)
        hanging = start(cache.load(A))
        await settle()
        await cache.load(B)
        await cache.load(C)
        assert engine.held == {B, C}
        engine.gates[A].set()
        await hanging
        assert engine.held == {A, B, C}

    asyncio.run(run())


def test_no_more_loads_run_at_once_than_there_are_loaders() -> None:
    async def run() -> None:
        cache, engine = make_cache(capacity=100, loaders=2)
        engine.hang(A, B, C, D)
        loads = [start(cache.load(r)) for r in (A, B, C, D)]
        await settle()
        assert engine.busy == {A, B}
        engine.gates[B].set()
        await loads[1]
        await settle()
        assert engine.busy == {A, C}
        for gate in engine.gates.values():
            gate.set()
        await asyncio.gather(*loads)

    asyncio.run(run())


def test_room_is_reserved_before_a_load_begins() -> None:
    async def run() -> None:
        cache, engine = make_cache(capacity=30)
        await cache.load(D)
        engine.hang(A, B, C)
        with cache.hold(D.int_id):
            loads = [start(cache.load(r)) for r in (A, B, C)]
            await settle()
            assert engine.busy == {A, B}, "the third waits: one of these may become idle"
            assert cache.nbytes == 30
            engine.gates[A].set()
            engine.gates[C].set()
            await loads[0]
            await loads[2]
            assert engine.held == {C, D}, "A was idle"
        engine.gates[B].set()
        await loads[1]
        assert cache.nbytes == 30

    asyncio.run(run())


def test_there_is_no_room_beside_what_is_held_and_what_is_loaded_to_be_held() -> None:
    async def run() -> None:
        cache, engine = make_cache(capacity=20)
        engine.hang(B)
        with contextlib.ExitStack() as stack:

            async def use(revision: Revision) -> None:
                await cache.load(revision)
                stack.enter_context(cache.hold(revision.int_id))

            await use(A)
            using, wanting = start(use(B)), start(cache.load(C))
            await settle()
            assert not wanting.done(), "B may fail yet"
            engine.gates[B].set()
            await using
            with pytest.raises(CacheFullError, match="20 hold 2 that are in use"):
                await wanting

    asyncio.run(run())


def test_an_eviction_under_way_is_waited_for() -> None:
    async def run() -> None:
        cache, engine = make_cache(capacity=20)
        await cache.load(A)
        await cache.load(B)
        engine.hang(A)  # its unload
        with cache.hold(B.int_id):
            loading = start(cache.load(C))
            retiring = start(cache.retire(A))
            again = start(cache.load(A))
            await settle()
            assert not loading.done()
            assert engine.busy == set()
            engine.gates[A].set()
            await loading
            await retiring
            assert engine.held >= {B, C}
        await again
        assert engine.held in ({A, C}, {A, B})
        assert engine.loads.count(A.revision) == 2

    asyncio.run(run())


def test_loads_and_evictions_are_told() -> None:
    class Told(Observer):
        def __init__(self) -> None:
            self.heard: list[tuple[str, Revision]] = []

        def loaded(self, revision: Revision, seconds: float) -> None:
            assert seconds >= 0
            self.heard.append(("loaded", revision))

        def evicted(self, revision: Revision) -> None:
            self.heard.append(("evicted", revision))

    async def run() -> None:
        cache, engine = make_cache(capacity=10, observer=(told := Told()))
        await cache.load(A)
        await cache.load(B)
        await cache.retire(B)
        engine.refuses = lambda revision: True
        with pytest.raises(EngineRefusedError):
            await cache.load(C)
        assert told.heard == [("loaded", A), ("evicted", A), ("loaded", B)]

    asyncio.run(run())


def test_two_that_need_room_do_not_evict_for_three() -> None:
    async def run() -> None:
        cache, engine = make_cache(capacity=40)
        others = [revision(f"other-{i}") for i in range(4)]
        for other in others:
            await cache.load(other)
        engine.hang(*others[:2])
        loads = [start(cache.load(r)) for r in (A, B)]
        await settle()
        assert engine.unloading == set(others[:2]), "both at once"
        for other in others[:2]:
            engine.gates[other].set()
        await asyncio.gather(*loads)
        assert engine.held == {*others[2:], A, B}

    asyncio.run(run())


def test_nothing_is_evicted_while_enough_is_leaving() -> None:
    async def run() -> None:
        cache, engine = make_cache(capacity=20)
        await cache.load(A)
        await cache.load(B)
        engine.hang(B)
        retiring, loading = start(cache.retire(B)), start(cache.load(C))
        await settle()
        engine.gates[B].set()
        await asyncio.gather(retiring, loading)
        assert engine.held == {A, C}

    asyncio.run(run())


def test_a_request_has_what_it_waited_for_before_that_can_make_room() -> None:
    """Room for one, and two that are wanted all the time: each has its turn."""

    async def run() -> None:
        cache, engine = make_cache(capacity=10)
        served = []

        async def use(revision: Revision) -> None:
            while True:
                with contextlib.suppress(CacheFullError):
                    await cache.load(revision)
                    with cache.hold(revision.int_id):
                        served.append(revision)
                        return
                await asyncio.sleep(0)

        async with asyncio.timeout(5):
            await asyncio.gather(*(use(r) for r in (A, B, C) * 5))
        assert len(served) == 15
        assert len(engine.loads) <= 15

    asyncio.run(run())


def test_what_is_larger_than_its_file_makes_others_go() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        for loaded in (A, B):
            await cache.load(loaded)
        load = engine.load

        async def load_larger(revision: Revision) -> int:
            return await load(revision) + 5

        engine.load = load_larger  # type: ignore[method-assign]
        await cache.load(C)
        await settle()
        assert engine.held == {B, C}
        assert cache.nbytes == 25

    asyncio.run(run())


# --------------------------------------------------------------------------------------------- who goes away


def test_a_caller_that_goes_away_cancels_the_load_for_nobody() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        engine.hang(A)
        first, second = start(cache.load(A)), start(cache.load(A))
        await settle()
        first.cancel()
        await settle()
        assert first.cancelled()
        engine.gates[A].set()
        await second
        assert (engine.held, engine.loads) == ({A}, [A.revision])

    asyncio.run(run())


def test_a_load_that_nobody_waits_for_any_more_stays_cached_and_can_make_room() -> None:
    async def run() -> None:
        cache, engine = make_cache(capacity=10)
        engine.hang(A)
        loading = start(cache.load(A))
        await settle()
        loading.cancel()
        engine.gates[A].set()
        await settle()
        assert cache.has(A.int_id)
        await cache.load(B)
        assert engine.held == {B}

    asyncio.run(run())


def test_a_load_whose_callers_have_gone_before_its_turn_never_begins() -> None:
    async def run() -> None:
        cache, engine = make_cache(loaders=1)
        engine.hang(A)
        loading, waiting = start(cache.load(A)), start(cache.load(B))
        await settle()
        waiting.cancel()
        await settle()
        engine.gates[A].set()
        await loading
        await settle()
        assert (engine.held, engine.loads) == ({A}, [A.revision])
        assert cache.nbytes == 10
        await cache.load(B)

    asyncio.run(run())


def test_what_is_retired_while_it_is_loaded_goes_after_its_last_request() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        engine.hang(A)

        async def use() -> None:
            await cache.load(A)
            with cache.hold(A.int_id):
                await settle()
                assert engine.held == {A}

        using = start(use())
        await settle()
        await cache.retire(A)
        assert cache.reads(A.digest)
        engine.gates[A].set()
        await using
        await settle()
        assert engine.held == set()
        assert not cache.reads(A.digest)

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------ time limit


def test_a_load_that_takes_too_long_is_given_up_and_its_room_is_kept_until_it_is_gone() -> None:
    async def run() -> None:
        cache, engine = make_cache(capacity=20, timeout_s=0.02, loaders=1)
        cache.failures = Failures(clock := Clock())
        engine.hang(A)
        with pytest.raises(LoadTimeoutError, match=r"not loaded it within 0\.02 s") as caught:
            await cache.load(A)
        assert (caught.value.kind, caught.value.temporary) == ("engine", True)
        assert (cache.nbytes, cache.has(A.int_id), cache.reads(A.digest)) == (10, False, True)
        await cache.load(B)  # its loader is free
        with pytest.raises(CacheFullError):
            await cache.load(revision("large", 20))
        clock.now += 2
        for again in (False, True):
            with pytest.raises(LoadTimeoutError, match="has not ended yet"):
                await cache.load(A, again=again)
        assert engine.loads.count(A.revision) == 1, "the engine never loads it twice at once"
        engine.gates[A].set()
        await settle()
        assert engine.unloads == [A.revision]
        assert (cache.nbytes, cache.reads(A.digest)) == (10, False)
        await cache.load(A, again=True)
        assert engine.held == {A, B}
        assert cache.nbytes == 20

    asyncio.run(run())


def test_a_load_that_fails_too_late_leaves_nothing() -> None:
    async def run() -> None:
        cache, engine = make_cache(timeout_s=0.02)
        engine.hang(A)
        with pytest.raises(LoadTimeoutError):
            await cache.load(A)
        engine.refuses = lambda revision: True
        engine.gates[A].set()
        await settle()
        assert (cache.nbytes, engine.unloads) == (0, [])

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------- failures


def test_a_failure_is_remembered_for_longer_each_time_and_a_success_forgets_it() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        cache.failures = Failures(clock := Clock())
        engine.refuses = lambda revision: revision == A
        pauses = []
        for _ in range(8):
            with pytest.raises(EngineRefusedError):
                await cache.load(A)
            pauses.append(cache.failures.pause_s(A))
            asked = len(engine.loads)
            clock.now += pauses[-1] - 0.25
            for _ in range(100):
                with pytest.raises(EngineRefusedError, match="the engine refuses it"):
                    await cache.load(A)
            assert len(engine.loads) == asked, "the engine is left alone"
            await cache.load(B)
            clock.now += 0.25
        assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
        engine.refuses = lambda revision: False
        await cache.load(A)
        await cache.retire(A)
        engine.refuses = lambda revision: True
        with pytest.raises(EngineRefusedError):
            await cache.load(A)
        assert cache.failures.pause_s(A) == 1

    asyncio.run(run())


def test_whoever_says_so_has_the_engine_asked_anew() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        engine.refuses = lambda revision: True
        for _ in range(3):
            with pytest.raises(EngineRefusedError):
                await cache.load(A, again=True)
        assert len(engine.loads) == 3
        engine.refuses = lambda revision: False
        await cache.load(A, again=True)

    asyncio.run(run())


def test_all_who_wait_for_a_load_share_its_failure() -> None:
    async def run() -> None:
        cache, engine = make_cache()
        engine.refuses = lambda revision: True
        results = await asyncio.gather(*(cache.load(A) for _ in range(100)), return_exceptions=True)
        assert {type(result) for result in results} == {EngineRefusedError}
        assert len(engine.loads) == 1

    asyncio.run(run())


def test_a_full_cache_is_not_the_adapters_fault() -> None:
    async def run() -> None:
        cache, _ = make_cache(capacity=10)
        await cache.load(A)
        with cache.hold(A.int_id), pytest.raises(CacheFullError):
            await cache.load(B)
        assert cache.failures.pause_s(B) == 0
        await cache.load(B)

    asyncio.run(run())


def test_so_many_failures_are_remembered() -> None:
    failures = Failures(Clock())
    many = [revision(f"r{i}") for i in range(MAX_REMEMBERED + 10)]
    for failed in many:
        failures.note(failed, EngineRefusedError("x"))
    assert [failures.pause_s(r) > 0 for r in many] == [False] * 10 + [True] * MAX_REMEMBERED


def test_a_remembered_failure_keeps_nothing_of_what_was_being_read() -> None:
    class Content:
        """What is being read."""

    failures = Failures(Clock())

    def fail() -> weakref.ref[Content]:
        content = Content()
        try:
            raise EngineRefusedError("x")
        except EngineRefusedError as error:
            failures.note(A, error)
        return weakref.ref(content)

    content = fail()
    gc.collect()
    assert content() is None
    with pytest.raises(EngineRefusedError, match="x"):
        failures.check(A)


@pytest.mark.parametrize("error", [RefusedContentError("x", "memory"), UnavailableError("x", 7.0)])
def test_any_error_is_remembered_as_it_was(error: AdapterError) -> None:
    failures = Failures(Clock())
    failures.note(A, error)
    with pytest.raises(type(error), match="x") as caught:
        failures.check(A)
    assert vars(caught.value) == vars(error)


# ------------------------------------------------------------------------------------------- in any order


class Moody(FakeEngine):
    """Takes its time, fails now and then, and checks what the cache promises."""

    def __init__(self, chance: random.Random):
        super().__init__(reads=False)
        self.chance = chance
        self.used: dict[Revision, int] = {}

    async def _wait(self) -> None:
        for _ in range(self.chance.randrange(8)):
            await asyncio.sleep(0)
        if self.chance.random() < 0.05:
            await asyncio.sleep(0.03)

    async def load(self, revision: Revision) -> int:
        nbytes = await super().load(revision)
        self.held.discard(revision)
        self.busy.add(revision)
        await self._wait()
        self.busy.discard(revision)
        if self.chance.random() < 0.15:
            raise EngineRefusedError("it did not like it")
        self.held.add(revision)
        return nbytes

    async def unload(self, revision: Revision) -> None:
        assert not self.used.get(revision), "somebody uses it"
        self.unloading.add(revision)
        await self._wait()
        self.unloading.discard(revision)
        await super().unload(revision)

    @property
    def nbytes(self) -> int:
        return sum(revision.nbytes for revision in self.held | self.busy)


@pytest.mark.parametrize("seed", range(30))
def test_in_whatever_order_things_happen_nothing_is_lost_and_nothing_is_over(seed: int) -> None:
    chance = random.Random(seed)
    capacity, loaders = chance.choice((35, 60, 100)), chance.choice((1, 2, 4))

    async def run() -> None:
        engine = Moody(chance)
        cache = EngineCache(engine, capacity, 6, loaders=loaders, timeout_s=0.02)
        revisions = [revision(f"r{i}", chance.choice((5, 10, 20))) for i in range(8)]

        def check() -> None:
            assert engine.nbytes <= cache.nbytes <= capacity
            assert len(engine.held | engine.busy) <= 6
            assert len(engine.busy) <= loaders + len(cache._late)
            assert {r for r in revisions if cache.has(r.int_id)} <= engine.held

        async def use(wanted: Revision) -> None:
            await cache.load(wanted, again=chance.random() < 0.2)
            with cache.hold(wanted.int_id):
                engine.used[wanted] = engine.used.get(wanted, 0) + 1
                try:
                    for _ in range(chance.randrange(6)):
                        await asyncio.sleep(0)
                        assert wanted in engine.held
                        check()
                finally:
                    engine.used[wanted] -= 1

        async def pin(wanted: Revision) -> None:
            await cache.load(wanted, again=True)
            cache.pin(wanted.int_id)
            try:
                for _ in range(chance.randrange(20)):
                    await asyncio.sleep(0)
                    assert cache.has(wanted.int_id) or wanted.int_id not in cache.pinned
            finally:
                cache.unpin(wanted.int_id)

        tasks: list[asyncio.Task[None]] = []
        for _ in range(250):
            wanted = revisions[min(int(chance.expovariate(0.4)), 7)]
            what = chance.random()
            if what < 0.6:
                tasks.append(start(use(wanted)))
            elif what < 0.65 and wanted is revisions[7]:
                tasks.append(start(pin(wanted)))
            elif what < 0.8 and wanted is not revisions[7]:
                tasks.append(start(cache.retire(wanted)))
            elif tasks:
                chance.choice(tasks).cancel()
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
                check()
        async with asyncio.timeout(20):
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, AdapterError | asyncio.CancelledError | None), result
            while cache._tasks or cache._loads:
                await asyncio.sleep(0.001)
        assert engine.held == {r for r in revisions if cache.has(r.int_id)}
        assert cache.nbytes == engine.nbytes
        assert cache._idle.nbytes == sum(r.nbytes for r in engine.held)
        assert (cache._loading, cache._leaving, cache._wanted) == (type(cache._used)(),) * 3
        assert not any(resident.holds for resident in cache._residents.values())
        assert not cache._late
        assert not cache._going
        for wanted in revisions:
            await cache.retire(wanted)
        assert (engine.held, cache.nbytes, cache._idle.count) == (set(), 0, 0)

    asyncio.run(run())
