"""Public names and the revisions behind them: publishing, replacing, removing, rolling back, using."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from logging import Logger, getLogger
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch

from qaa_serve.adapters import AdapterError
from qaa_serve.registry.cache import Engine, EngineCache, Observer
from qaa_serve.registry.revisions import NameRefusedError, Rejection, Revision, check_name
from qaa_serve.registry.store import RevisionStore

Source = Literal["directory", "api"]
T = TypeVar("T")


class Changed(Protocol):
    """Told what a name stands for before and after a change, as name@revision, and how the change ended."""

    def __call__(
        self, action: str, name: str, before: str | None, after: str | None, result: str = "ok", /
    ) -> None:
        """A change has ended."""


class UnknownAdapterError(AdapterError):
    """There is no such adapter, or no such revision of it."""


class AmbiguousRevisionError(UnknownAdapterError):
    """Several revisions begin with the digits that were given."""


class NotWrittenError(AdapterError):
    """A change is made, and would be undone by a restart."""

    kind, temporary = "store", True


class UnavailableError(AdapterError):
    """The adapter is served, but cannot be brought into the engine now.

    Attributes:
        retry_after_s: when to ask again, in seconds.
    """

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass
class Entry:
    """What one name stands for.

    Attributes:
        name: the public name.
        current: what is served under it; None if it was removed or never valid.
        kept: former revisions that can be asked for by name@revision and rolled back to, the newest first.
        source: where the current revision came from.
        seen: the digest of the adapters directory's content that was published last, so that a restart does
            not undo a rollback or a removal.
        pinned: the current revision, whichever it is, always stays in the engine's memory.
        pinned_revisions: digests of revisions that are never dropped.
        rejection: why the newest content is not served.
        published: Unix time at which the current revision was published.
        last_used: Unix time of the last request.
    """

    name: str
    current: Revision | None = None
    kept: list[Revision] = field(default_factory=list)
    source: Source | None = None
    seen: str | None = None
    pinned: bool = False
    pinned_revisions: set[str] = field(default_factory=set)
    rejection: Rejection | None = None
    published: float | None = None
    last_used: float | None = None

    def revisions(self) -> list[Revision]:
        """All that can be asked for, the current one first."""
        return [*([self.current] if self.current else []), *self.kept]

    def find(self, digest: str) -> Revision:
        """A revision by its digest, or by the first 12 or more hex digits of it.

        Raises:
            AmbiguousRevisionError: if several begin with them.
            UnknownAdapterError: if it is not kept.
        """
        found = [r for r in self.revisions() if r.digest.startswith(digest)] if len(digest) >= 12 else []
        if len(found) > 1:
            names = " and ".join(r.engine_name for r in found)
            raise AmbiguousRevisionError(f"{self.name}@{digest} may be {names}: give more digits")
        if not found:
            known = ", ".join(r.revision for r in self.revisions()) or "none"
            raise UnknownAdapterError(f"adapter {self.name!r} has no revision {digest!r}; kept: {known}")
        return found[0]


class Catalogue:
    """The adapters that are served.

    Changes of one name happen one after the other, each in this order: copy and check, load into the engine,
    switch the name (one step of the event loop), let go of the old revision. A failure on the way leaves the name
    as it was.
    """

    def __init__(
        self,
        store: RevisionStore,
        engine: Engine,
        *,
        cache_bytes: int,
        max_count: int = 1 << 16,
        loaders: int = 4,
        load_timeout_s: float = 60.0,
        keep: int = 2,
        reserved: Callable[[str], bool] = lambda name: False,
        observer: Observer | None = None,
        changed: Changed = lambda action, name, before, after, result="ok": None,
        logger: Logger | None = None,
    ):
        """Start with no adapters.

        Args:
            store: where copies are kept.
            engine: what runs them.
            cache_bytes: of host memory in the engine.
            max_count: of adapters in the engine.
            loaders: how many adapters are loaded at once, and how many are copied and checked.
            load_timeout_s: how long the engine may take to load one; 0: for ever.
            keep: former revisions of each name to keep.
            reserved: whether a name is taken, by the base model for one.
            observer: told of changes, loads and evictions, to count them.
            changed: told of each change by name: see `Changed`.
            logger: where to say what happens.
        """
        self.store = store
        self._observer = observer or Observer()
        self._changed = changed
        self.cache = EngineCache(
            engine,
            cache_bytes,
            max_count,
            self._observer,
            lambda revision: self._sweep(revision.name),
            loaders=loaders,
            timeout_s=load_timeout_s,
        )
        self.entries: dict[str, Entry] = {}
        self.ready = False
        self._keep = keep
        self._reserved = reserved
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # Threads of their own, without OpenMP threads of their own: they would take the engine's cores.
        self._readers = ThreadPoolExecutor(
            loaders, thread_name_prefix="qaa-store", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="qaa-state")  # so the last state is written last
        self._admitting: set[str] = set()
        self._unserved: dict[str, Any] = {}  # what is written of names that could not be brought back whole
        self._dropped: dict[str, set[Revision]] = {}  # by name; their copies go when the engine has let go of them
        self._pins: dict[str, set[int]] = {}  # by name
        self._log = logger or getLogger(__name__)

    # ------------------------------------------------------------------------------------------------ use

    def resolve(self, asked: str) -> Revision | None:
        """The revision that ``name`` or ``name@revision`` stands for; None if there is none."""
        try:
            return self.find(asked)
        except UnknownAdapterError:
            return None

    def find(self, asked: str) -> Revision:
        """The revision that ``name`` or ``name@revision`` stands for.

        Raises:
            AmbiguousRevisionError: if it may be several.
            UnknownAdapterError: if there is none.
        """
        name, at, digest = asked.partition("@")
        entry = self.entries.get(name)
        if entry is None or (not at and entry.current is None):
            raise UnknownAdapterError(f"there is no adapter {asked!r}")
        return entry.find(digest) if at or entry.current is None else entry.current

    @asynccontextmanager
    async def use(self, asked: str) -> AsyncIterator[Revision]:
        """Hold the revision that a name stands for now in the engine, for as long as a request needs it.

        Raises:
            UnknownAdapterError: if the name stands for nothing.
            UnavailableError: if the revision is not in the engine and cannot be brought there.
        """
        while True:
            revision = self.find(asked)
            if self.cache.find(revision) is not None:
                break
            try:
                await self.cache.load(revision)
            except AdapterError as error:
                if self.resolve(asked) == revision:
                    retry_after_s = self.cache.failures.pause_s(revision) or 5
                    message = f"adapter {asked!r} cannot be loaded now: {error}"
                    raise UnavailableError(message, retry_after_s) from error
        self.entries[revision.name].last_used = time.time()
        with self.cache.hold(revision.int_id):
            yield revision

    # -------------------------------------------------------------------------------------------- changes

    async def publish(
        self, name: str, directory: Path, source: Source, unchanged: Callable[[], bool] = lambda: True
    ) -> Revision:
        """Serve a directory's content under a name.

        Args:
            name: the public name.
            directory: holds the adapter.
            source: where it came from.
            unchanged: asked after the files were copied; if it says no, they may not belong together.

        Raises:
            AdapterError: if it cannot be served; what the name stood for goes on.
        """
        try:
            return await self._publish(name, directory, source, unchanged)
        except AdapterError as error:
            if source == "api":  # a directory is refused when it has not changed for a while
                self._observer.rejected(error.kind)
            raise

    async def _publish(
        self, name: str, directory: Path, source: Source, unchanged: Callable[[], bool]
    ) -> Revision:
        check_name(name)
        if self._reserved(name):
            raise NameRefusedError(f"{name!r} is the base model's name: choose another for the adapter")
        async with self._lock(name):
            revision = await self._admit(directory, name)
            entry = self.entries.get(name) or Entry(name)
            try:
                if not unchanged():
                    raise AdapterError("its files changed while they were read")
                if source == "directory" and entry.seen == revision.digest:
                    entry.rejection = None  # back to what it was
                    return revision
                await self._load(entry, revision)
                before = entry.current
                # From here to the next await is the atomic step.
                old = self._switch(entry, revision)
                entry.source, entry.rejection = source, None
                if source == "directory":
                    entry.seen = revision.digest
                self._observer.swapped("published")
                self._note(entry, before, "put" if source == "api" else "publish")
                await self._let_go_of_former(entry, old)
            finally:
                # What was copied for nothing goes again.
                if revision not in entry.revisions():
                    await self._drop(revision)
            await self._persist(must=source == "api")
        return revision

    async def remove(self, name: str) -> None:
        """Serve a name no more; its running requests end as they began.

        Raises:
            UnknownAdapterError: if nothing is served under it.
        """
        async with self._lock(name):
            entry = self._known(name)
            old = entry.current
            await self._let_go(entry)
            self._settle(entry)
            self._note(entry, old, "delete")
            if entry.seen is None and entry.rejection is None:
                del self.entries[name]
            await self._persist()
        self._observer.swapped("removed")
        self._log.info("Removed adapter %r", name)

    async def forget_directory(self, name: str) -> None:
        """A directory of the adapters directory is gone: what came from it goes too."""
        async with self._lock(name):
            entry = self.entries.get(name)
            if entry is None:
                return
            entry.rejection = entry.seen = None
            if entry.source != "api" or not entry.revisions():
                old = entry.current
                await self._let_go(entry)
                del self.entries[name]
                if old is not None:
                    self._observer.swapped("removed")
                    self._note(entry, old, "forget")
                    self._log.info("Removed adapter %r: its directory is gone", name)
            await self._persist(must=False)

    async def roll_back(self, name: str, digest: str | None = None) -> Revision:
        """Serve a kept revision again.

        Args:
            name: the public name.
            digest: the first 12 or more hex digits of the revision's digest; None takes the one before the
                current.

        Raises:
            UnknownAdapterError: if there is no such name or revision.
            AdapterError: if it cannot be loaded; what the name stood for goes on.
        """
        async with self._lock(name):
            if (entry := self.entries.get(name)) is None:
                raise UnknownAdapterError(f"there is no adapter {name!r}")
            if digest is None and not entry.kept:
                raise UnknownAdapterError(f"adapter {name!r} has no earlier revision to go back to")
            revision = entry.kept[0] if digest is None else entry.find(digest)
            await self._load(entry, revision)
            before = entry.current
            old = self._switch(entry, revision)
            self._observer.swapped("rolled_back")
            self._note(entry, before, "rollback")
            await self._let_go_of_former(entry, old)
            await self._persist()
        return revision

    async def pin(self, name: str, digest: str | None = None) -> None:
        """Keep a name's current revision, whichever it is, or one certain revision in the engine's memory.

        Raises:
            UnknownAdapterError: if there is no such name or revision.
            AdapterError: if it cannot be loaded.
        """
        async with self._lock(name):
            entry = self._served(name) if digest is None else self._known(name)
            revision = entry.current if digest is None else entry.find(digest)
            assert revision is not None  # `_served` has seen to it
            await self.cache.load(revision, again=True)
            if digest is None:
                entry.pinned = True
            else:
                entry.pinned_revisions.add(revision.digest)
            self._note_pins(entry)
            await self._persist()
            self._note(entry, revision, "pin", revision)

    async def unpin(self, name: str, digest: str | None = None) -> None:
        """Undo `pin`; does nothing if it is not pinned.

        Raises:
            UnknownAdapterError: if there is no such name or revision.
        """
        async with self._lock(name):
            entry = self._known(name)
            revision = entry.current if digest is None else entry.find(digest)
            if digest is None:
                entry.pinned = False
            elif revision is not None:
                entry.pinned_revisions.discard(revision.digest)
            self._note_pins(entry)
            await self._trim(entry)
            await self._persist()
            self._note(entry, revision, "unpin", revision)

    def reject(self, rejection: Rejection) -> None:
        """Note why a content is not served; what its name stands for goes on."""
        entry = self.entries.setdefault(rejection.name, Entry(rejection.name))
        known, entry.rejection = entry.rejection, rejection
        self._observer.rejected(rejection.kind)
        if known == rejection:
            return
        self._log.error("Not serving adapter %r (%s): %s", rejection.name, rejection.path, rejection.reason)
        current = None if entry.current is None else entry.current.revision
        self._changed("reject", rejection.name, current, current, rejection.reason)

    async def restore(self) -> None:
        """Serve what an earlier server with this state directory served, as far as that can be.

        What cannot be served now (by another base, a smaller limit) is not forgotten: its copies stay, and so does
        what was written of it. Without a state that can be read, every copy is served again, the newest of a name.
        """
        saved = self.store.read_state()
        if saved is None:
            if (aside := self.store.set_state_aside()) is not None:
                self._log.error(
                    "The state of %s cannot be read by this version. It is now %s; every adapter that has a copy "
                    "is served again, the newest one of each name", self.store.directory, aside.name,
                )  # fmt: skip
            saved = {name: _as_uploaded(digests) for name, digests in self.store.copies().items()}
        await asyncio.gather(*(self._restore(name, fields) for name, fields in saved.items()))
        self.store.keep_only((name, digest) for name, fields in saved.items() for digest in _digests_in(fields))

    def start(self) -> None:
        """All adapters there are at the start have been seen to: from now on changes are written down."""
        self.ready = True
        try:
            self.store.write_state(self._state())
        except OSError as error:
            self._log.error("What is served is not written down for the next start: %s", error)

    # ------------------------------------------------------------------------------------------- internals

    def _lock(self, name: str) -> asyncio.Lock:
        """What a change of this name holds; it is kept as long as somebody does or waits for it."""
        return self._locks.setdefault(name, asyncio.Lock())

    def _known(self, name: str) -> Entry:
        if (entry := self.entries.get(name)) is None or not entry.revisions():
            raise UnknownAdapterError(f"there is no adapter {name!r}")
        return entry

    def _served(self, name: str) -> Entry:
        if (entry := self.entries.get(name)) is None or entry.current is None:
            raise UnknownAdapterError(f"there is no adapter {name!r}")
        return entry

    async def _admit(self, directory: Path, name: str) -> Revision:
        self._admitting.add(name)  # what is found in the store may not be swept away now
        admitting = asyncio.ensure_future(self._in(self._readers, self.store.admit, directory, name))
        try:
            await asyncio.wait((admitting,))
        except asyncio.CancelledError:
            await asyncio.wait((admitting,))  # its thread goes on, and no other change of the name may begin
            entry = self.entries.get(name) or Entry(name)
            if admitting.exception() is None and admitting.result() not in entry.revisions():
                self._dropped.setdefault(name, set()).add(admitting.result())
            raise
        else:
            if admitting.exception() is None:
                self._dropped.get(name, set()).discard(admitting.result())
            return admitting.result()
        finally:
            self._admitting.discard(name)
            self._sweep(name)

    async def _in(self, threads: Executor, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *args)

    async def _restore(self, name: str, fields: Any) -> None:
        async with self._lock(name):
            entry = Entry(name)
            try:
                check_name(name)
                entry.source, entry.seen, entry.pinned = fields["source"], fields["seen"], fields["pinned"]
                current, kept, pins = fields["current"], fields["kept"], set(fields["pinned_revisions"])
                for digest in [*kept, current or ""]:
                    if pins & {digest, digest[:12]}:  # an older version wrote the first 12 digits
                        entry.pinned_revisions.add(digest)
                await self._restore_revisions(entry, current, kept)
            except (AdapterError, KeyError, TypeError) as error:
                self._log.error("Adapter %r of the state directory is not served again: %s", name, error)
            published = fields.get("published") if isinstance(fields, dict) else None
            if entry.current is not None and isinstance(published, float):
                entry.published = published
            if [revision.digest for revision in entry.revisions()] != _digests_in(fields) or entry.current is None:
                self._unserved[name] = fields
            self._note_pins(entry)

    async def _restore_revisions(self, entry: Entry, current: str | None, kept: list[str]) -> None:
        """Bring back an entry's revisions. A current one that cannot be loaded now stays as a kept one."""
        for digest in [*reversed(kept), *([] if current is None else [current])]:
            try:
                revision = await self._in(self._readers, self.store.recall, entry.name, digest)
                entry.kept.insert(0, revision)
                if digest == current:
                    await self._load(entry, revision)
                    self._switch(entry, revision)
                    await self._trim(entry)
                elif digest in entry.pinned_revisions:
                    await self.cache.load(revision)
            except AdapterError as error:
                self._log.error("Revision %.12s of adapter %r is not back: %s", digest, entry.name, error)
                if digest == current:
                    entry.rejection = Rejection(entry.name, self.store.directory, str(error), error.kind)
                    entry.seen = None  # its directory is to be tried again
        self.entries[entry.name] = entry

    async def _load(self, entry: Entry, revision: Revision) -> None:
        """Bring into the engine what a name shall stand for."""
        if entry.current != revision:
            await self.cache.load(revision, again=True)

    def _switch(self, entry: Entry, revision: Revision) -> Revision | None:
        """Let a name stand for a loaded revision; what it stood for, if that was another one."""
        old, entry.current = entry.current, revision
        self._unserved.pop(entry.name, None)
        if old == revision:  # though its copy may be another one
            return None
        if revision in entry.kept:
            entry.kept.remove(revision)
        if old is not None:
            entry.kept.insert(0, old)
        self._settle(entry)
        entry.published = time.time()
        self.entries[entry.name] = entry
        self._note_pins(entry)
        self._log.info(
            "Serving %s adapter %s as %r (rank %d, %d bytes)%s",
            revision.kind,
            revision.revision,
            entry.name,
            revision.rank,
            revision.nbytes,
            f", instead of {old.revision}" if old else "",
        )
        return old

    def _note(self, entry: Entry, before: Revision | None, action: str, after: Revision | None = None) -> None:
        """Tell of a change; left out, `after` is what the name stands for now."""
        after = after or entry.current
        old, new = (None if revision is None else revision.revision for revision in (before, after))
        self._changed(action, entry.name, old, new)

    async def _let_go_of_former(self, entry: Entry, old: Revision | None) -> None:
        """Of what a name stood for until now, and of former revisions beyond those that are kept."""
        if old is not None and old.digest not in entry.pinned_revisions:
            await self.cache.retire(old)
        await self._trim(entry)

    def _settle(self, entry: Entry) -> None:
        """That a revision could not be restored matters no more."""
        if entry.rejection is not None and entry.rejection.path == self.store.directory:
            entry.rejection = None

    async def _trim(self, entry: Entry) -> None:
        """Drop former revisions beyond those that are to be kept."""
        loose = [r for r in entry.kept if r.digest not in entry.pinned_revisions]
        for revision in loose[self._keep :]:
            entry.kept.remove(revision)
            await self._drop(revision)

    async def _let_go(self, entry: Entry) -> None:
        """Stop serving all revisions of a name."""
        revisions = entry.revisions()
        self._unserved.pop(entry.name, None)
        entry.current, entry.kept = None, []
        entry.pinned, entry.pinned_revisions = False, set()
        self._note_pins(entry)
        await asyncio.gather(*map(self._drop, revisions))

    async def _drop(self, revision: Revision) -> None:
        """Let a revision go, and its copy as soon as the engine has let go of it."""
        self._dropped.setdefault(revision.name, set()).add(revision)
        await self.cache.retire(revision)
        self._sweep(revision.name)

    def _sweep(self, name: str) -> None:
        """Delete the copies of a name's dropped revisions that the engine does not need any more."""
        if name in self._admitting or (dropped := self._dropped.get(name)) is None:
            return
        for revision in [r for r in dropped if not self.cache.may_read(r)]:
            dropped.remove(revision)
            self.store.remove(revision)
        if not dropped:
            del self._dropped[name]

    def _note_pins(self, entry: Entry) -> None:
        pinned = {
            revision.int_id
            for revision in entry.revisions()
            if (entry.pinned and revision == entry.current) or revision.digest in entry.pinned_revisions
        }
        before = self._pins.pop(entry.name, set())
        if pinned:
            self._pins[entry.name] = pinned
        for int_id in pinned - before:
            self.cache.pin(int_id)
        for int_id in before - pinned:
            self.cache.unpin(int_id)

    async def _persist(self, *, must: bool = True) -> None:
        """Write down what is served; one writer at a time writes one state after the other.

        Raises:
            NotWrittenError: if that fails and it `must` not.
        """
        if not self.ready:
            return
        try:
            await self._in(self._writer, self.store.write_state, self._state())
        except OSError as error:
            self._log.error("What is served is not written down for the next start: %s", error)
            if must:
                raise NotWrittenError(
                    f"it is done, but cannot be written down ({error.strerror or error}), so a restart undoes it: "
                    "make room in the state directory and send it again"
                ) from error

    def _state(self) -> dict[str, Any]:
        adapters = {}
        for name, entry in self.entries.items():
            if entry.revisions() or entry.seen:
                adapters[name] = {
                    "current": entry.current.digest if entry.current else None,
                    "kept": [revision.digest for revision in entry.kept],
                    "source": entry.source,
                    "seen": entry.seen,
                    "published": entry.published,
                    "pinned": entry.pinned,
                    "pinned_revisions": sorted(entry.pinned_revisions),
                }
        return adapters | self._unserved


def _as_uploaded(digests: list[str]) -> dict[str, Any]:
    """What is written of an adapter that was uploaded, the newest content last."""
    *former, current = digests
    return {
        "current": current, "kept": former[::-1], "source": "api", "seen": None, "pinned": False,
        "pinned_revisions": [],
    }  # fmt: skip


def _digests_in(fields: Any) -> list[str]:
    """The revisions that are written of an adapter."""
    if not isinstance(fields, dict):
        return []
    kept = fields.get("kept")
    found = [fields.get("current"), *(kept if isinstance(kept, list) else ())]
    return [digest for digest in found if isinstance(digest, str)]
