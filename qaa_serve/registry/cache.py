"""Which revisions the engine holds in host memory, how many bytes that is, and which one makes room."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from qaa_serve.adapters import AdapterError
from qaa_serve.registry.failures import Failures
from qaa_serve.registry.revisions import Revision

T = TypeVar("T")


class Engine(Protocol):
    """What the registry needs of an engine."""

    async def load(self, revision: Revision) -> int:
        """Read a revision into host memory.

        Returns:
            the bytes it takes there.

        Raises:
            EngineRefusedError: if it cannot be loaded; nothing has changed then.
        """

    async def unload(self, revision: Revision) -> None:
        """Forget a revision; no request uses it any more. Once this has ended, its memory is free."""


class EngineRefusedError(AdapterError):
    """The engine does not take the adapter."""

    kind = "engine"


class LoadTimeoutError(EngineRefusedError):
    """The engine takes too long to load the adapter."""

    temporary = True


class CacheFullError(AdapterError):
    """There is no room, since everything in the cache is in use or pinned."""

    kind, temporary = "memory", True


#: How a change ended.
Result: TypeAlias = Literal["published", "rejected", "removed", "rolled_back"]


class Observer:
    """Told what happens to adapters; this one does nothing with it."""

    def loaded(self, revision: Revision, seconds: float) -> None:
        """The engine has read a revision."""

    def evicted(self, revision: Revision) -> None:
        """A revision made room for another one."""

    def swapped(self, result: Result) -> None:
        """A change has ended."""

    def rejected(self, kind: str) -> None:
        """An adapter was refused, for an AdapterError's kind."""


@dataclass
class Resident:
    """A revision that the engine holds.

    Attributes:
        revision: the revision.
        nbytes: host memory it takes.
        holds: requests that use it, in any part of the server.
        retired: it is to go as soon as nobody uses it.
        idle: it may make room for others.
    """

    revision: Revision
    nbytes: int
    holds: int = 0
    retired: bool = False
    idle: bool = False


@dataclass(frozen=True)
class Room:
    """An amount of the engine's memory: bytes, and a number of adapters."""

    nbytes: int = 0
    count: int = 0

    def __add__(self, other: Room) -> Room:
        return Room(self.nbytes + other.nbytes, self.count + other.count)

    def __sub__(self, other: Room) -> Room:
        return Room(self.nbytes - other.nbytes, self.count - other.count)

    def within(self, limit: Room) -> bool:
        """Whether there is as much."""
        return self.nbytes <= limit.nbytes and self.count <= limit.count


class _Load:
    """A load under way, for all who want it.

    Attributes:
        revision: what is loaded.
        room: what is reserved for it.
        waiters: how many wait for it.
        retired: the revision is to go as soon as nobody uses it.
        resident: its result, held by each waiter until that one has had its turn.
        task: does it; nobody who waits for it can cancel it.
    """

    task: asyncio.Task[None]

    def __init__(self, revision: Revision):
        self.revision = revision
        self.room = Room()
        self.waiters = 0
        self.retired = False
        self.resident: Resident | None = None


class EngineCache:
    """The engine's host memory for adapters, bounded in bytes and in number.

    The engine itself never loads or evicts anything: a request is handed to it only while its adapter is
    held here, so nothing that can fail happens inside an engine step.

    Several revisions are loaded at once, each by a task of its own. Whatever decides runs between two awaits. All
    memory in use is counted in `_used`, and of it apart: what is idle, what belongs to loads under way, and what
    is leaving.
    """

    def __init__(
        self,
        engine: Engine,
        capacity: int,
        max_count: int,
        observer: Observer | None = None,
        *,
        loaders: int = 4,
        timeout_s: float = 60.0,
    ):
        """Make an empty cache.

        Args:
            engine: what loads and unloads.
            capacity: bytes of host memory.
            max_count: number of adapters that the engine can hold.
            observer: told of loads and evictions.
            loaders: how many loads may run at once.
            timeout_s: how long a load may take; 0: for ever.
        """
        self.capacity = capacity
        self.pinned: set[int] = set()  # int_ids; changed by `pin` and `unpin`
        self.failures: Failures[Revision] = Failures()
        self._engine = engine
        self._observer = observer or Observer()
        self._loaders = asyncio.Semaphore(loaders)
        self._timeout_s = timeout_s
        self._limit = Room(capacity, max_count)
        self._used = self._idle = self._loading = self._leaving = self._wanted = Room()
        self._residents: OrderedDict[int, Resident] = OrderedDict()  # the least recently used first
        self._loads: dict[int, _Load] = {}
        self._going: set[int] = set()  # being unloaded
        self._late: dict[int, _Load] = {}  # took too long; the engine may come to have these yet
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory in use, with what is reserved for loads under way."""
        return self._used.nbytes

    def find(self, revision: Revision) -> Resident | None:
        """The revision's place in the engine; None if it is not there."""
        return self._residents.get(revision.int_id)

    def has(self, int_id: int) -> bool:
        """Whether the engine holds the revision of this id."""
        return int_id in self._residents

    def revisions(self) -> list[Revision]:
        """All that the engine holds; any thread may ask."""
        return [resident.revision for resident in list(self._residents.values())]

    def reads(self, digest: str) -> bool:
        """Whether the engine holds a content, or may read its files yet; any thread may ask."""
        loads = [*list(self._loads.values()), *list(self._late.values())]
        coming = any(load.revision.digest == digest for load in loads)
        return coming or any(revision.digest == digest for revision in self.revisions())

    @contextmanager
    def hold(self, int_id: int) -> Iterator[Revision]:
        """Keep a revision where it is while a request uses it.

        Raises:
            KeyError: if the engine does not hold it.
        """
        resident = self._residents[int_id]
        self._residents.move_to_end(int_id)
        resident.holds += 1
        self._note(resident)
        try:
            yield resident.revision
        finally:
            self._release(resident)

    def pin(self, int_id: int) -> None:
        """Never let a revision make room for others."""
        self.pinned.add(int_id)
        if (resident := self._residents.get(int_id)) is not None:
            self._note(resident)

    def unpin(self, int_id: int) -> None:
        """Undo `pin`."""
        self.pinned.discard(int_id)
        if (resident := self._residents.get(int_id)) is not None:
            self._note(resident)

    async def load(self, revision: Revision, *, again: bool = False) -> None:
        """Have the engine hold a revision, at the cost of the least recently used ones.

        When this returns, it is there, and stays until the caller awaits something else.

        Args:
            revision: the revision.
            again: ask the engine even if a load has failed a moment ago.

        Raises:
            CacheFullError: if all others are in use or pinned.
            LoadTimeoutError: if it takes too long.
            EngineRefusedError: if the engine does not take it, or did not a moment ago.
        """
        int_id = revision.int_id
        if (resident := self._residents.get(int_id)) is not None:
            resident.retired = False
            self._residents.move_to_end(int_id)
            return
        if (load := self._loads.get(int_id)) is None:
            if not again:
                self.failures.check(revision)
            if int_id in self._late:
                raise LoadTimeoutError(f"a load that took longer than {self._timeout_s:g} s has not ended yet")
            load = self._loads[int_id] = _Load(revision)
            load.task = self._in_background(self._run(load))
            load.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # maybe nobody asks
        load.retired = False
        load.waiters += 1
        try:
            await asyncio.wait((load.task,))
        finally:
            load.waiters -= 1
            if load.resident is not None:
                if not load.waiters:
                    self._end(load)
                self._release(load.resident)
        load.task.result()

    async def retire(self, revision: Revision) -> None:
        """Have the engine forget a revision, now or when its last request ends."""
        if (load := self._loads.get(revision.int_id)) is not None:
            load.retired = True
        if (resident := self._residents.get(revision.int_id)) is not None:
            resident.retired = True
            await self._unload_if_unused(resident)

    # ------------------------------------------------------------------------------------------------- loads

    async def _run(self, load: _Load) -> None:
        """Load a revision when it is its turn."""
        revision = load.revision
        try:
            async with self._loaders:
                if not load.waiters:
                    raise asyncio.CancelledError  # all who wanted it have gone away
                while revision.int_id in self._going:
                    await self._changed.wait()
                await self._reserve(load)
                nbytes = await self._ask(load)
        except BaseException as error:
            if isinstance(error, AdapterError) and not isinstance(error, CacheFullError):
                self.failures.note(revision, error)
            self._used -= load.room
            self._end(load)
            raise
        self.failures.forget(revision)
        more = Room(nbytes - load.room.nbytes)  # its file was a guess
        load.room, self._used, self._loading = load.room + more, self._used + more, self._loading + more
        # Whoever waits for it has it held until it is that one's turn; this task too, until the end is noted.
        load.resident = Resident(revision, nbytes, load.waiters + 1, load.retired)
        self._residents[revision.int_id] = load.resident
        if not load.waiters:
            self._end(load)
        self._release(load.resident)
        while self._idle.count and not (self._used - self._leaving).within(self._limit):
            self._evict()

    async def _reserve(self, load: _Load) -> None:
        """Take room for a load, as soon as there is some.

        Raises:
            CacheFullError: if there is none, whatever is idle or ends by itself.
        """
        need = Room(load.revision.nbytes, 1)
        self._wanted += need
        try:
            while not (self._used + need).within(self._limit):
                staying = self._used - self._idle - self._loading - self._leaving
                if not (staying + need).within(self._limit):
                    raise CacheFullError(
                        f"the adapter needs {need.nbytes:,} bytes, and of the {self.capacity:,} bytes for "
                        f"adapters {staying.nbytes:,} hold {staying.count} that are in use or pinned: try again "
                        "later, or start with a larger --adapter-cache-bytes"
                    )
                if self._idle.count and not (self._used - self._leaving + self._wanted).within(self._limit):
                    await asyncio.wait((self._evict(),))
                else:  # what others make room for, or load, will do
                    await self._changed.wait()
        finally:
            self._wanted -= need
        load.room, self._used, self._loading = need, self._used + need, self._loading + need

    async def _ask(self, load: _Load) -> int:
        """The engine's answer; if it does not come in time, what it may yet take stays taken."""
        revision, begun = load.revision, time.perf_counter()
        asking = self._in_background(self._engine.load(revision))
        await asyncio.wait((asking,), timeout=self._timeout_s or None)
        if asking.done():
            nbytes = asking.result()
            self._observer.loaded(revision, time.perf_counter() - begun)
            return nbytes
        room, load.room = load.room, Room()
        self._loading -= room
        self._late[revision.int_id] = load
        self._in_background(self._clean_up(revision, room, asking))
        raise LoadTimeoutError(f"the engine has not loaded it within {self._timeout_s:g} s")

    async def _clean_up(self, revision: Revision, room: Room, asking: asyncio.Task[int]) -> None:
        """Have the engine forget what it loads too late; then the room is free."""
        try:
            await asyncio.wait((asking,))
            if not asking.cancelled() and asking.exception() is None:
                await self._engine.unload(revision)
        finally:
            self._late.pop(revision.int_id, None)
            self._left(room)

    def _end(self, load: _Load) -> None:
        """A load is under way no more: it has failed, or all who waited for it have had their turn."""
        self._loading -= load.room
        del self._loads[load.revision.int_id]
        self._wake()

    # ------------------------------------------------------------------------------------------------- unloading

    def _evict(self) -> asyncio.Task[None]:
        """Begin to unload the least recently used one that is idle."""
        resident = next(resident for resident in self._residents.values() if resident.idle)
        self._observer.evicted(resident.revision)
        return self._unload(resident)

    async def _unload_if_unused(self, resident: Resident) -> None:
        here = self._residents.get(resident.revision.int_id) is resident
        if here and resident.retired and not resident.holds:
            await asyncio.wait((self._unload(resident),))

    def _unload(self, resident: Resident) -> asyncio.Task[None]:
        # Out of the table first: from here on nobody can get hold of it.
        del self._residents[resident.revision.int_id]
        self._note(resident)
        self._going.add(resident.revision.int_id)
        room = Room(resident.nbytes, 1)
        self._leaving += room
        return self._in_background(self._see_off(resident.revision, room))

    async def _see_off(self, revision: Revision, room: Room) -> None:
        try:
            await self._engine.unload(revision)
        finally:
            self._going.discard(revision.int_id)
            self._leaving -= room
            self._left(room)

    def _left(self, room: Room) -> None:
        """A revision has left the engine."""
        self._used -= room
        self._wake()

    # ------------------------------------------------------------------------------------------------- notes

    def _release(self, resident: Resident) -> None:
        resident.holds -= 1
        self._note(resident)
        if resident.retired and not resident.holds:
            self._in_background(self._unload_if_unused(resident))

    def _note(self, resident: Resident) -> None:
        """Count a revision among the idle ones if it is one now."""
        int_id = resident.revision.int_id
        idle = self._residents.get(int_id) is resident and not resident.holds and int_id not in self.pinned
        if idle and not resident.idle:
            self._idle += Room(resident.nbytes, 1)
            self._wake()
        elif resident.idle and not idle:
            self._idle -= Room(resident.nbytes, 1)
        resident.idle = idle

    def _wake(self) -> None:
        """Have those look again who wait for any change."""
        if self._loads:
            self._changed.set()
            self._changed = asyncio.Event()

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run what ends by itself, whoever waits for it or not."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
