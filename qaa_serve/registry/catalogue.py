"""Public names and the revisions behind them: publishing, replacing, removing, rolling back, using."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from logging import Logger, getLogger
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from qaa_serve.adapters import AdapterError
from qaa_serve.registry.cache import Engine, EngineCache, Observer
from qaa_serve.registry.revisions import NameRefusedError, Rejection, Revision, check_name
from qaa_serve.registry.store import RevisionStore

Source = Literal["directory", "api"]


class Changed(Protocol):
    """Told what a name stands for before and after a change, as name@revision, and how the change ended."""

    def __call__(
        self, action: str, name: str, before: str | None, after: str | None, result: str = "ok", /
    ) -> None:
        """A change has ended."""


class UnknownAdapterError(AdapterError):
    """There is no such adapter, or no such revision of it."""


class UnavailableError(AdapterError):
    """The adapter is served, but cannot be brought into the engine now."""


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
        pinned_revisions: digests' first 12 hex of revisions that are never dropped.
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
        """A revision by the first 12 hex digits of its digest.

        Raises:
            UnknownAdapterError: if it is not kept.
        """
        for revision in self.revisions():
            if revision.short_digest == digest:
                return revision
        known = ", ".join(r.revision for r in self.revisions()) or "none"
        raise UnknownAdapterError(f"adapter {self.name!r} has no revision {digest!r}; kept: {known}")


class Catalogue:
    """The adapters that are served.

    Changes happen one after the other, each in this order: copy and check, load into the engine, switch the
    name (one step of the event loop), let go of the old revision. A failure on the way leaves the name as it
    was.
    """

    def __init__(
        self,
        store: RevisionStore,
        engine: Engine,
        *,
        cache_bytes: int,
        max_count: int = 1 << 16,
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
            keep: former revisions of each name to keep.
            reserved: whether a name is taken, by the base model for one.
            observer: told of changes, loads and evictions, to count them.
            changed: told of each change by name: see `Changed`.
            logger: where to say what happens.
        """
        self.store = store
        self._observer = observer or Observer()
        self._changed = changed
        self.cache = EngineCache(engine, cache_bytes, max_count, self._observer, self._sweep)
        self.entries: dict[str, Entry] = {}
        self.ready = False
        self._keep = keep
        self._reserved = reserved
        self._changing = asyncio.Lock()
        # A thread of its own, without OpenMP threads of its own: they would take the engine's cores.
        self._reader = ThreadPoolExecutor(
            1, thread_name_prefix="qaa-store", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._admitting: str | None = None
        self._dropped: set[Revision] = set()  # their copies go when the engine has let go of them
        self._log = logger or getLogger(__name__)

    # ------------------------------------------------------------------------------------------------ use

    def resolve(self, asked: str) -> Revision | None:
        """The revision that ``name`` or ``name@revision`` stands for; None if there is none."""
        name, at, digest = asked.partition("@")
        entry = self.entries.get(name)
        if entry is None:
            return None
        if not at:
            return entry.current
        try:
            return entry.find(digest)
        except UnknownAdapterError:
            return None

    @asynccontextmanager
    async def use(self, asked: str) -> AsyncIterator[Revision]:
        """Hold the revision that a name stands for now in the engine, for as long as a request needs it.

        Raises:
            UnknownAdapterError: if the name stands for nothing.
            UnavailableError: if the revision is not in the engine and cannot be brought there.
        """
        while True:
            if (revision := self.resolve(asked)) is None:
                raise UnknownAdapterError(f"there is no adapter {asked!r}")
            if self.cache.find(revision) is not None:
                break
            try:
                await self.cache.load(revision)
            except AdapterError as error:
                if self.resolve(asked) == revision:
                    raise UnavailableError(f"adapter {asked!r} cannot be loaded now: {error}") from error
            entry = self.entries.get(revision.name)
            if entry is None or revision not in entry.revisions():
                await self.cache.retire(revision)  # removed while it was loaded
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
        async with self._changing:
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
                    self._drop(revision)
                self._sweep()
            self._persist()
        return revision

    async def remove(self, name: str) -> None:
        """Serve a name no more; its running requests end as they began.

        Raises:
            UnknownAdapterError: if nothing is served under it.
        """
        async with self._changing:
            entry = self._known(name)
            old = entry.current
            await self._let_go(entry)
            self._settle(entry)
            self._note(entry, old, "delete")
            if entry.seen is None and entry.rejection is None:
                del self.entries[name]
            self._persist()
        self._observer.swapped("removed")
        self._log.info("Removed adapter %r", name)

    async def forget_directory(self, name: str) -> None:
        """A directory of the adapters directory is gone: what came from it goes too."""
        async with self._changing:
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
            self._persist()

    async def roll_back(self, name: str, digest: str | None = None) -> Revision:
        """Serve a kept revision again.

        Args:
            name: the public name.
            digest: the first 12 hex digits of the revision's digest; None takes the one before the current.

        Raises:
            UnknownAdapterError: if there is no such name or revision.
            AdapterError: if it cannot be loaded; what the name stood for goes on.
        """
        async with self._changing:
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
            self._persist()
        return revision

    async def pin(self, name: str, digest: str | None = None) -> None:
        """Keep a name's current revision, whichever it is, or one certain revision in the engine's memory.

        Raises:
            UnknownAdapterError: if there is no such name or revision.
            AdapterError: if it cannot be loaded.
        """
        async with self._changing:
            entry = self._served(name) if digest is None else self._known(name)
            revision = entry.current if digest is None else entry.find(digest)
            assert revision is not None  # `_served` has seen to it
            await self.cache.load(revision)
            if digest is None:
                entry.pinned = True
            else:
                entry.pinned_revisions.add(digest)
            self._note_pins()
            self._persist()
            self._note(entry, revision, "pin", revision)

    async def unpin(self, name: str, digest: str | None = None) -> None:
        """Undo `pin`; does nothing if it is not pinned.

        Raises:
            UnknownAdapterError: if there is no such name or revision.
        """
        async with self._changing:
            entry = self._known(name)
            revision = entry.current if digest is None else entry.find(digest)
            if digest is None:
                entry.pinned = False
            else:
                entry.pinned_revisions.discard(digest)
            self._note_pins()
            await self._trim(entry)
            self._persist()
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
        """Serve what an earlier server with this state directory served, as far as that can be."""
        saved = self.store.read_state().get("adapters", {})
        async with self._changing:
            for name, fields in saved.items() if isinstance(saved, dict) else ():
                entry = Entry(name)
                try:
                    check_name(name)
                    entry.source, entry.seen = fields["source"], fields["seen"]
                    entry.pinned, entry.pinned_revisions = fields["pinned"], set(fields["pinned_revisions"])
                    await self._restore_revisions(entry, fields["current"], fields["kept"])
                except (AdapterError, KeyError, TypeError) as error:
                    self._log.error("Adapter %r of the state directory is not served again: %s", name, error)
            self.store.keep_only(r for entry in self.entries.values() for r in entry.revisions())
            self._note_pins()

    def start(self) -> None:
        """All adapters there are at the start have been seen to: from now on changes are written down."""
        self.ready = True
        self._persist()

    # ------------------------------------------------------------------------------------------- internals

    def _known(self, name: str) -> Entry:
        if (entry := self.entries.get(name)) is None or not entry.revisions():
            raise UnknownAdapterError(f"there is no adapter {name!r}")
        return entry

    def _served(self, name: str) -> Entry:
        if (entry := self.entries.get(name)) is None or entry.current is None:
            raise UnknownAdapterError(f"there is no adapter {name!r}")
        return entry

    async def _admit(self, directory: Path, name: str) -> Revision:
        self._admitting = name  # what is found in the store may not be swept away now
        try:
            revision = await self._in_reader(self.store.admit, directory, name)
        finally:
            self._admitting = None
        self._dropped.discard(revision)
        return revision

    async def _in_reader(self, function: Callable[..., Revision], *args: object) -> Revision:
        return await asyncio.get_running_loop().run_in_executor(self._reader, function, *args)

    async def _restore_revisions(self, entry: Entry, current: str | None, kept: list[str]) -> None:
        """Bring back an entry's revisions. A current one that cannot be loaded now stays as a kept one."""
        for digest in [*reversed(kept), *([] if current is None else [current])]:
            try:
                revision = await self._in_reader(self.store.recall, entry.name, digest)
                entry.kept.insert(0, revision)
                if digest == current:
                    await self._load(entry, revision)
                    self._switch(entry, revision)
                    await self._trim(entry)
                elif revision.short_digest in entry.pinned_revisions:
                    await self.cache.load(revision)
            except AdapterError as error:
                self._log.error("Revision %.12s of adapter %r is not back: %s", digest, entry.name, error)
                if digest == current:
                    entry.rejection = Rejection(entry.name, self.store.directory, str(error), error.kind)
                    entry.seen = None  # its directory is to be tried again
        self.entries[entry.name] = entry

    async def _load(self, entry: Entry, revision: Revision) -> None:
        """Bring into the engine what a name shall stand for."""
        if entry.current == revision:
            return
        for other in self._all():
            if other.int_id == revision.int_id and other.revision != revision.revision:
                raise AdapterError(
                    f"its id {revision.int_id} is that of {other.revision!r} by chance: rename the adapter, or "
                    "save it again with any change to its config"
                )
        await self.cache.load(revision)

    def _switch(self, entry: Entry, revision: Revision) -> Revision | None:
        """Let a name stand for a loaded revision; what it stood for, if that was another one."""
        old = entry.current
        if old == revision:
            return None
        if revision in entry.kept:
            entry.kept.remove(revision)
        if old is not None:
            entry.kept.insert(0, old)
        entry.current = revision
        self._settle(entry)
        entry.published = time.time()
        self.entries[entry.name] = entry
        if entry.pinned or entry.pinned_revisions:
            self._note_pins()
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
        if old is not None and old.short_digest not in entry.pinned_revisions:
            await self.cache.retire(old)
        await self._trim(entry)

    def _settle(self, entry: Entry) -> None:
        """That a revision could not be restored matters no more."""
        if entry.rejection is not None and entry.rejection.path == self.store.directory:
            entry.rejection = None

    async def _trim(self, entry: Entry) -> None:
        """Drop former revisions beyond those that are to be kept."""
        loose = [r for r in entry.kept if r.short_digest not in entry.pinned_revisions]
        for revision in loose[self._keep :]:
            entry.kept.remove(revision)
            self._drop(revision)
            await self.cache.retire(revision)
        self._sweep()

    async def _let_go(self, entry: Entry) -> None:
        """Stop serving all revisions of a name."""
        revisions = entry.revisions()
        entry.current, entry.kept = None, []
        entry.pinned, entry.pinned_revisions = False, set()
        self._note_pins()
        for revision in revisions:
            self._drop(revision)
            await self.cache.retire(revision)
        self._sweep()

    def _drop(self, revision: Revision) -> None:
        self._dropped.add(revision)

    def _sweep(self) -> None:
        """Delete the copies of dropped revisions that the engine no longer holds."""
        for revision in list(self._dropped):
            resident = self.cache.find(revision)
            if revision.name != self._admitting and (resident is None or resident.revision != revision):
                self._dropped.remove(revision)
                self.store.remove(revision)

    def _note_pins(self) -> None:
        pinned = set()
        for entry in self.entries.values():
            for revision in entry.revisions():
                if (entry.pinned and revision == entry.current) or revision.short_digest in entry.pinned_revisions:
                    pinned.add(revision.int_id)
        self.cache.pinned = pinned

    def _all(self) -> Iterator[Revision]:
        for entry in self.entries.values():
            yield from entry.revisions()
        yield from self._dropped

    def _persist(self) -> None:
        if not self.ready:
            return
        adapters: dict[str, Any] = {}
        for name, entry in self.entries.items():
            if entry.revisions() or entry.seen:
                adapters[name] = {
                    "current": entry.current.digest if entry.current else None,
                    "kept": [revision.digest for revision in entry.kept],
                    "source": entry.source,
                    "seen": entry.seen,
                    "pinned": entry.pinned,
                    "pinned_revisions": sorted(entry.pinned_revisions),
                }
        try:
            self.store.write_state({"version": 1, "adapters": adapters})
        except OSError as error:
            self._log.error("What is served is not written down for the next start: %s", error)
