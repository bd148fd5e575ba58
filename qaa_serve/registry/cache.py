"""Which revisions the engine holds in host memory, how many bytes that is, and which one makes room."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from qaa_serve.adapters import AdapterError
from qaa_serve.registry.revisions import Revision


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
        """Forget a revision; no request uses it any more."""


class EngineRefusedError(AdapterError):
    """The engine does not take the adapter."""

    kind = "engine"


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
    """

    revision: Revision
    nbytes: int
    holds: int = 0
    retired: bool = False


class EngineCache:
    """The engine's host memory for adapters, bounded in bytes.

    The engine itself never loads or evicts anything: a request is handed to it only while its adapter is
    held here, so nothing that can fail happens inside an engine step.
    """

    def __init__(
        self,
        engine: Engine,
        capacity: int,
        max_count: int,
        observer: Observer | None = None,
        unloaded: Callable[[], None] = lambda: None,
    ):
        """Make an empty cache.

        Args:
            engine: what loads and unloads.
            capacity: bytes of host memory.
            max_count: number of adapters that the engine can hold.
            observer: told of loads and evictions.
            unloaded: called after a revision has left the engine.
        """
        self.capacity = capacity
        self.pinned: set[int] = set()  # int_ids
        self._engine = engine
        self._observer = observer or Observer()
        self._unloaded = unloaded
        self._max_count = max_count
        self._residents: OrderedDict[int, Resident] = OrderedDict()  # the least recently used first
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory in use."""
        return sum(resident.nbytes for resident in list(self._residents.values()))  # the metrics' thread asks too

    def find(self, revision: Revision) -> Resident | None:
        """The revision's place in the engine; None if it is not there."""
        return self._residents.get(revision.int_id)

    def has(self, int_id: int) -> bool:
        """Whether the engine holds the revision of this id."""
        return int_id in self._residents

    @contextmanager
    def hold(self, int_id: int) -> Iterator[Revision]:
        """Keep a revision where it is while a request uses it.

        Raises:
            KeyError: if the engine does not hold it.
        """
        resident = self._residents[int_id]
        self._residents.move_to_end(int_id)
        resident.holds += 1
        try:
            yield resident.revision
        finally:
            resident.holds -= 1
            if resident.retired and not resident.holds:
                self._in_background(resident)

    async def load(self, revision: Revision) -> None:
        """Have the engine hold a revision, at the cost of the least recently used ones.

        Raises:
            CacheFullError: if all others are in use or pinned.
            EngineRefusedError: if the engine does not take it.
        """
        async with self._changing:
            if (resident := self._residents.get(revision.int_id)) is not None:
                resident.retired = False
                self._residents.move_to_end(revision.int_id)
                return
            await self._make_room(revision.nbytes)
            begun = time.perf_counter()
            nbytes = await self._engine.load(revision)
            self._observer.loaded(revision, time.perf_counter() - begun)
            self._residents[revision.int_id] = Resident(revision, nbytes)

    async def retire(self, revision: Revision) -> None:
        """Have the engine forget a revision, now or when its last request ends."""
        resident = self._residents.get(revision.int_id)
        if resident is not None:
            resident.retired = True
            await self._unload_if_idle(resident)

    async def _make_room(self, needed: int) -> None:
        while self.nbytes + needed > self.capacity or len(self._residents) >= self._max_count:
            idle = [r for i, r in self._residents.items() if not r.holds and i not in self.pinned]
            count = len(self._residents) - len(idle)
            staying = self.nbytes - sum(resident.nbytes for resident in idle)
            if staying + needed > self.capacity or count >= self._max_count:
                raise CacheFullError(
                    f"the adapter needs {needed:,} bytes, and of the {self.capacity:,} bytes for adapters "
                    f"{staying:,} hold {count} that are in use or pinned: try again later, or start with a larger "
                    "--adapter-cache-bytes"
                )
            await self._unload(idle[0])

    async def _unload_if_idle(self, resident: Resident) -> None:
        async with self._changing:
            here = self._residents.get(resident.revision.int_id) is resident
            if here and resident.retired and not resident.holds:
                await self._unload(resident)

    async def _unload(self, resident: Resident) -> None:
        # Out of the table first: from here on nobody can get hold of it.
        del self._residents[resident.revision.int_id]
        await self._engine.unload(resident.revision)
        self._unloaded()

    def _in_background(self, resident: Resident) -> None:
        task = asyncio.get_running_loop().create_task(self._unload_if_idle(resident))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
