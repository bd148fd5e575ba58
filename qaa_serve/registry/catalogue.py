"""Public names and the revisions behind them: using, replacing, removing, rolling back."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from logging import Logger, getLogger
from pathlib import Path
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from qaa_serve.adapters import AdapterError
from qaa_serve.registry.cache import Engine, EngineCache, EngineRefusedError, Observer
from qaa_serve.registry.contents import Contents, Fill
from qaa_serve.registry.entries import (
    ANY,
    AmbiguousRevisionError,
    Condition,
    Entry,
    InUseError,
    State,
    UnavailableError,
    UnknownAdapterError,
)
from qaa_serve.registry.failures import Failures
from qaa_serve.registry.index import Verdict
from qaa_serve.registry.revisions import NameRefusedError, Rejection, Revision, check_name
from qaa_serve.registry.settings import Alias, SourceSettings
from qaa_serve.sources import ChangedMeanwhileError, Listed, NoSuchRevisionError

T = TypeVar("T")

#: How often a change of the settings begins anew when another server's comes between.
_TRIES = 5

#: How long what could not be read in the background waits until it is tried again, in seconds.
_RETRY_S = 30.0

#: The longest that a history is taken as it was read, in seconds, for a revision that is not in it.
_HISTORY_S = 5.0


class Changed(Protocol):
    """Told what a name stands for before and after a change, as name@revision, and how the change ended."""

    def __call__(
        self, action: str, name: str, before: str | None, after: str | None, result: str = "ok", /
    ) -> None:
        """A change has ended."""


class Catalogue:
    """The adapters that are served: what the source has, as far as it is valid.

    Changes of one name happen one after the other, each in this order: copy and check, load into the engine, write
    to the source, switch the name (one step of the event loop), retire the old revision. A failure on the way
    leaves the name as it was. A name that nobody has asked for is neither checked nor loaded before somebody does,
    or before it is its turn in the background.
    """

    def __init__(
        self,
        contents: Contents,
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
            contents: where adapters come from.
            engine: what runs them.
            cache_bytes: of host memory in the engine.
            max_count: of adapters in the engine.
            loaders: how many adapters are loaded at once.
            load_timeout_s: how long it may take to load one; 0: for ever.
            keep: former revisions of each name to keep.
            reserved: whether a name is taken, by the base model for one.
            observer: told of changes, loads and evictions, to count them.
            changed: told of each change by name: see `Changed`.
            logger: where to say what happens.
        """
        self.contents = contents
        self._observer = observer or Observer()
        self._changed = changed
        self.cache = EngineCache(
            _Fetching(engine, self),
            cache_bytes,
            max_count,
            self._observer,
            loaders=loaders,
            timeout_s=load_timeout_s,
        )
        contents.state.needed = self.cache.reads
        self.entries: dict[str, Entry] = {}
        self.settings = SourceSettings()
        self.ready = False
        self.generation = 0  # grows with every change of what is served
        self._touched: dict[str, None] = {}
        self.counts: Tally[State] = Tally()
        self.rejections = self.served_bytes = 0
        self._fingerprint = 0
        self._failures: Failures[tuple[str, str]] = Failures()
        self._keep = keep
        self._reserved = reserved
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._pins: dict[str, set[int]] = {}  # by name
        self._being_kept: set[str] = set()  # former revisions that are on their way into the history
        self._unchecked: dict[str, None] = {}  # names, in the order in which they are checked
        self._to_check = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = logger or getLogger(__name__)

    # ------------------------------------------------------------------------------------------------ use

    def route(self, asked: str, who: str | None = None) -> str:
        """The NAME or NAME@REVISION that a name stands for: an alias leads to one of its targets.

        Args:
            asked: what a request names.
            who: a word of the client's for whom it asks, who always gets the same target.
        """
        alias = self.settings.aliases.get(asked)
        return asked if alias is None else alias.choose(who)

    def knows(self, asked: str) -> bool:
        """Whether there may be something to serve under this name; nothing is read to find out."""
        if asked in self.settings.aliases:
            return True
        entry = self.entries.get(asked.partition("@")[0])
        return entry is not None and ("@" in asked or entry.state != "rejected")

    async def find(self, asked: str) -> Revision:
        """The revision that NAME or NAME@REVISION stands for; it is checked now if it was not yet.

        Raises:
            AmbiguousRevisionError: if it may be several.
            UnknownAdapterError: if there is none.
            UnavailableError: if that cannot be found out now.
        """
        name, at, digits = asked.partition("@")
        entry = self._known(name)
        if entry.state == "known":
            entry = await self._check(name)
        if at:
            try:
                return await self._former(entry, digits)
            except (UnknownAdapterError, UnavailableError):
                raise
            except AdapterError as error:
                raise UnknownAdapterError(f"adapter {asked!r} cannot be served: {error}") from error
        if entry.current is None:
            raise UnknownAdapterError(f"there is no adapter {name!r}")
        return entry.current

    @asynccontextmanager
    async def use(self, asked: str) -> AsyncIterator[Revision]:
        """Hold the revision that a name stands for now in the engine, for as long as a request needs it.

        Raises:
            UnknownAdapterError: if the name stands for nothing.
            UnavailableError: if the revision is not in the engine and cannot be brought there.
        """
        while True:
            revision = await self.find(asked)
            if self.cache.find(revision) is not None:
                break
            try:
                await self.cache.load(revision)
            except AdapterError as error:
                if await self.find(asked) != revision:
                    continue
                if isinstance(error, EngineRefusedError) and not error.temporary and self.is_current(revision):
                    self.reject(revision.name, error)
                unkept = self.entries[revision.name]
                if unkept.listed is None and isinstance(error, NoSuchRevisionError):
                    await self._forget(unkept, "forget")  # its copy had to make room, and can be had nowhere else
                retry_after_s = self.cache.failures.pause_s(revision) or 5
                message = f"adapter {asked!r} cannot be loaded now: {error}"
                raise UnavailableError(message, retry_after_s) from error
        if (entry := self.entries.get(revision.name)) is not None:
            entry.last_used = time.time()
        with self.cache.hold(revision.int_id):
            yield revision

    async def load(self, asked: str) -> Revision:
        """Bring a revision into the engine, for requests that are to come.

        Raises:
            UnknownAdapterError: if the name stands for nothing.
            AdapterError: if it cannot be loaded.
        """
        revision = await self.find(asked)
        await self.cache.load(revision, again=True)
        return revision

    async def _check(self, name: str, *, background: bool = False) -> Entry:
        """Check what the source has under a name, if nobody has yet."""
        async with self._lock(name):
            entry = self._known(name)
            if entry.listed is None or entry.state != "known":
                return entry
            listed = entry.listed

            async def read() -> tuple[Revision | None, AdapterError | None]:
                try:
                    return await self.contents.check(name, listed, background=background), None
                except AdapterError as error:
                    if error.temporary:
                        raise
                    return await self._last_good(name), error

            revision, error = await self._read(name, listed.version, read)
            if self.entries.get(name) is entry:  # and not removed meanwhile
                if revision is not None:
                    self._switch(entry, revision, listed)
                if entry.new and error is None:
                    self._observer.swapped("published")
                    self._note("publish", name, None, revision)
                entry.new = False
                if error is not None:
                    self.reject(name, error)
            return entry

    async def _read(self, name: str, what: str, read: Callable[[], Awaitable[T]]) -> T:
        """Something of a name's in the source, which is not read again for a while if it cannot be.

        Raises:
            UnavailableError: if it cannot be read now.
            AdapterError: if it is wrong.
        """
        key = (name, what)
        try:
            self._failures.check(key)
            found = await read()
        except AdapterError as error:
            if not self._failures.pause_s(key):
                self._failures.note(key, error)
            if not error.temporary:
                raise
            message = f"adapter {name!r} cannot be read now: {error}"
            raise UnavailableError(message, self._failures.pause_s(key)) from error
        self._failures.forget(key)
        return found

    async def _former(self, entry: Entry, digits: str) -> Revision:
        """A content of a name by its digest, or by the first 12 or more hex digits of it."""
        if len(digits) < 12:
            raise UnknownAdapterError(f"adapter {entry.name!r} has no revision {digits!r}: give 12 digits or more")
        here = {revision.digest: revision for revision in entry.revisions()}
        if digits in here:
            return here[digits]
        found = _matching(entry, digits)
        if entry.history is None or not found:
            await self.history(entry)
            found = _matching(entry, digits)
        if len(found) > 1:
            names = " and ".join(f"{entry.name}@{digest}" for digest in sorted(found))
            raise AmbiguousRevisionError(f"{entry.name}@{digits} may be {names}: give more digits")
        if not found:
            known = ", ".join(digest[:12] for digest in _matching(entry, "")) or "none"
            raise UnknownAdapterError(f"adapter {entry.name!r} has no revision {digits!r}; kept: {known}")
        (digest,) = found
        async with self._lock(f"{entry.name}@{digest}"):  # one reads it for all who ask at once
            if entry.current is not None and entry.current.digest == digest:
                return entry.current
            if entry.former is None or digest not in entry.former:
                revision = await self._read(entry.name, digest, lambda: self.contents.former(entry.name, digest))
                entry.former = {**(entry.former or {}), digest: revision}
                self._note_pins(entry)
            return entry.former[digest]

    async def history(self, entry: Entry) -> list[str]:
        """Digests of a name's former contents, the oldest first, as of some seconds ago.

        Raises:
            UnavailableError: if they cannot be read now, and were not before.
        """
        async with self._lock(f"{entry.name}@"):
            if entry.history is None or time.monotonic() - entry.history_read > _HISTORY_S:
                try:
                    history = await self._read(entry.name, "@", lambda: self.contents.history(entry.name))
                except AdapterError:
                    if entry.history is None:
                        raise
                    history = entry.history  # better than none, until it can be read again
                entry.history, entry.history_read = history, time.monotonic()
                entry.former = {
                    digest: revision
                    for digest, revision in (entry.former or {}).items()
                    if digest in history or revision.engine_name in self._being_kept
                } or None
            return entry.history

    # ------------------------------------------------------------------------------------- changes by the API

    async def publish(self, name: str, content: Path | Fill, condition: Condition = ANY) -> Revision:
        """Put an adapter into the source, and serve it.

        Args:
            name: the public name.
            content: a directory that holds it, or what puts its two files into an empty one; called in a thread.
            condition: what must be so.

        Raises:
            ChangedMeanwhileError: if it is not.
            AdapterError: if it cannot be served or written; what the name stood for goes on.
        """
        try:
            self._check_name(name)
            with suppress(UnavailableError):  # what cannot be read can be replaced
                await self._is_checked(name)
            async with self._lock(name):
                revision = await self.contents.admit(name, content)
                return await self._put(name, revision, condition, "put")
        except AdapterError as error:
            self._observer.rejected(error.kind)
            raise

    async def roll_back(self, name: str, digits: str | None = None, condition: Condition = ANY) -> Revision:
        """Go back to a former content, which the source then has as the name's.

        Args:
            name: the public name; one that was removed comes back.
            digits: the first 12 or more hex digits of the content's digest; None takes the one before the current.
                Two such steps go back two.
            condition: what must be so.

        Raises:
            UnknownAdapterError: if there is no such content.
            ChangedMeanwhileError: if the condition is not met.
            AdapterError: if it cannot be loaded or written; what the name stood for goes on.
        """
        self._check_name(name)
        try:
            await self._is_checked(name)
        except UnavailableError:
            if digits is None:  # which is the one before it?
                raise
        async with self._lock(name):
            entry = self.entries.get(name) or Entry(name, None)
            if digits is None:
                entry.history = None  # another server may have changed it
                current = None if entry.current is None else entry.current.digest
                former = await self.history(entry)
                if current in former:
                    former = former[: former.index(current)]
                if not former:
                    raise UnknownAdapterError(f"adapter {name!r} has no earlier revision to go back to")
                digits = former[-1]
            revision = await self._former(entry, digits)
            return await self._put(name, revision, condition, "rollback", again=True)

    async def adopt(self, name: str, directory: Path) -> None:
        """Serve a directory's content without putting it into the source.

        Raises:
            AdapterError: if it cannot be served.
        """
        self._check_name(name)
        async with self._lock(name):
            if name not in self.entries:
                revision = await self.contents.admit(name, directory)
                self.cache.failures.forget(revision)  # of a copy that was gone
                self._switch(self._enter(Entry(name, None)), revision, None)
                self._note("resolve", name, None, revision)

    async def _is_checked(self, name: str) -> None:
        """Know what a name stands for, if it stands for anything."""
        with suppress(UnknownAdapterError):
            await self.find(name)

    async def _put(
        self, name: str, revision: Revision, condition: Condition, action: str, *, again: bool = False
    ) -> Revision:
        entry = self.entries.get(name)
        expected = condition.expected(entry)
        before = None if entry is None else entry.current
        try:
            if before != revision:
                await self.cache.load(revision, again=True)
            listed = await self.contents.put(
                revision, expected, again=again, keep=self._keep, protected=self.settings.protected(name)
            )
        except BaseException:
            if before != revision:
                await self._retire(revision)
            raise
        entry = entry or self._enter(Entry(name, listed))
        entry.put_at = time.monotonic()
        old = self._switch(entry, revision, listed)
        self._observer.swapped("rolled_back" if again else "published")
        self._note(action, name, before, revision)
        await self._retire(old)
        return revision

    async def remove(self, name: str, condition: Condition = ANY, *, purge: bool = False) -> None:
        """Move an adapter to the source's history, and serve it no more; running requests end as they began.

        Args:
            name: the public name.
            condition: what must be so.
            purge: delete its history too; also that of one that was removed before.

        Raises:
            UnknownAdapterError: if there is no such adapter, nor a history of it that is to be deleted.
            InUseError: if an alias leads to it.
            ChangedMeanwhileError: if the condition is not met.
            AdapterError: if the source cannot be written.
        """
        if purge:
            check_name(name)  # a path comes of it, whatever there is
        if condition.digests is not None:
            await self._is_checked(name)
        async with self._lock(name):
            entry = self.entries.get(name) if purge else self._known(name)
            if entry is None and not await self.contents.history(name):
                raise UnknownAdapterError(f"there is no adapter {name!r}, and no history of one")
            if aliases := self.settings.users(name):
                raise InUseError(f"the alias {aliases[0]!r} leads to {name!r}: change or delete it first")
            expected = condition.expected(entry)
            if entry is None or entry.listed is not None:
                await self.contents.remove(name, expected, purge=purge)
            if entry is None:
                self._note("delete", name, None, None)
            else:
                await self._forget(entry, "delete")

    # ------------------------------------------------------------------------------------- changes of the source

    def begin(self, adapters: Mapping[str, Listed], known: Iterable[tuple[str, str, Verdict]]) -> None:
        """Take over what the source has; may run in a thread, before anybody asks.

        Args:
            adapters: all of them.
            known: names and versions, with what is known of them.
        """
        valid = {name: (version, verdict) for name, version, verdict in known if verdict.reason is None}
        for name, listed in adapters.items():
            entry = self._enter(Entry(name, listed))
            version, verdict = valid.pop(name, ("", None))
            try:
                self._check_name(name)
                if verdict is None or version != listed.version:
                    self._unchecked[name] = None
                else:
                    self._switch(entry, self.contents.known(name, verdict), listed, quiet=True)
            except AdapterError as error:
                self.reject(name, error)

    async def take(self, name: str, listed: Listed) -> None:
        """The source has another content under a name.

        Raises:
            AdapterError: if it cannot be read or loaded now; later it may.
        """
        async with self._lock(name):
            entry = self.entries.get(name)
            if entry is not None and entry.listed is not None and entry.listed.version == listed.version:
                return
            if entry is None or entry.current is None:  # nobody uses it
                self._add(name, listed)
                return
            before = entry.current
            # Whoever put it has kept the former one; what a plugin found was never in the source.
            by_hand = not listed.settled and entry.listed is not None
            try:
                revision = await self.contents.check(name, listed)
                if revision != before and (self.cache.has(before.int_id) or self.settings.pins(name)):
                    await self.cache.load(revision, again=True)
            except AdapterError as error:
                if error.temporary:
                    raise
                entry.listed = listed
                self.reject(name, error)
                if by_hand:
                    self._keep_former(entry, before, before)
                return
            if by_hand and revision != before:
                self._keep_former(entry, before, revision)
            old = self._switch(entry, revision, listed)
            if old is not None:
                self._observer.swapped("published")
                self._note("publish", name, before, revision)
                await self._retire(old)

    def _add(self, name: str, listed: Listed) -> None:
        """A content that nobody uses yet: it is checked when it is asked for, or when it is its turn."""
        self._enter(Entry(name, listed, new=True))
        try:
            self._check_name(name)
        except AdapterError as error:
            self.reject(name, error)
            return
        self._unchecked[name] = None
        self.check_soon()

    async def forget(self, name: str, looked_at: float) -> None:
        """The source has nothing under a name any more.

        Args:
            name: the public name.
            looked_at: when that was seen, by the monotonic clock: it may have been put since.
        """
        async with self._lock(name):
            entry = self.entries.get(name)
            if entry is not None and entry.listed is not None and entry.put_at < looked_at:
                await self._forget(entry, "forget")

    def _keep_former(self, entry: Entry, old: Revision, current: Revision) -> None:
        """Have what somebody replaced in the source in its history, and until then as if it was there."""
        entry.former = {**(entry.former or {}), old.digest: old}
        self._being_kept.add(old.engine_name)

        async def keep() -> None:
            try:
                await self.contents.keep(old, self._keep, self.settings.protected(old.name) | {current.digest})
            finally:
                self._being_kept.discard(old.engine_name)
                entry.history = None

        self._in_background(keep())

    def reject(self, name: str, error: AdapterError) -> None:
        """Note why the newest content of a name is not served; what the name stands for goes on."""
        entry = self.entries[name]
        known, rejection = entry.rejection, Rejection(name, str(error), error.kind)
        with self._counted(entry):
            entry.rejection = rejection
        self._unchecked.pop(name, None)
        if known == rejection:
            return
        self._observer.rejected(error.kind)
        self._log.error("Not serving adapter %r of %s: %s", name, self.contents.source.url, error)
        self._note("reject", name, entry.current, entry.current, str(error))

    async def _last_good(self, name: str) -> Revision | None:
        """The newest former content that can be served, in place of one that cannot."""
        for digest in reversed(await self.contents.history(name)):
            try:
                return await self.contents.former(name, digest)
            except AdapterError as error:
                if error.temporary:  # it may be the one, so no older one is
                    raise
        return None

    def check_soon(self) -> None:
        """There may be something to check in the background, or to load since it is pinned."""
        self._to_check.set()

    async def check_in_background(self, *, lazy: bool = False) -> None:
        """Check what nobody has asked for, one after the other, with as long a pause after each.

        Args:
            lazy: load what is pinned alone.
        """
        put_off: list[str] = []
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._to_check.wait(), _RETRY_S if put_off else None)
            self._to_check.clear()
            self._unchecked.update(dict.fromkeys(name for name in put_off if name in self.entries))
            put_off = []
            while self._unchecked and not lazy:
                name = next(iter(self._unchecked))
                del self._unchecked[name]
                begun = time.monotonic()
                with self._no_matter():
                    await self._check(name, background=True)
                if (entry := self.entries.get(name)) is not None and entry.state == "known":
                    put_off.append(name)
                if self._unchecked:
                    await asyncio.sleep(min(time.monotonic() - begun, 1.0))
            with self._no_matter():
                await self.load_pinned()

    async def load_pinned(self) -> None:
        """Bring into the engine what is pinned."""
        for reference in sorted(self.settings.pinned):
            if self.knows(reference):
                with self._no_matter():
                    revision = await self.find(reference)
                    self._note_pins(self.entries[revision.name])
                    await self.cache.load(revision)

    # ------------------------------------------------------------------------------------------------ settings

    def take_settings(self, settings: SourceSettings) -> None:
        """The source has other pins and aliases."""
        former, self.settings = self.settings, settings
        self.generation += 1
        for reference in former.pinned ^ settings.pinned:
            if (entry := self.entries.get(reference.partition("@")[0])) is not None:
                self._note_pins(entry)
        for name in former.aliases.keys() ^ settings.aliases.keys():
            if name in self.entries:
                self._in_background(self._take_name(name))
        self.check_soon()

    async def _take_name(self, name: str) -> None:
        """Find anew whether an adapter may have its name, which is an alias now, or is no more."""
        async with self._lock(name):
            entry = self.entries.get(name)
            if entry is not None and entry.listed is not None:
                revisions = entry.revisions()
                self._add(name, entry.listed)
                self._note_pins(self.entries[name])
                for revision in revisions:
                    await self.cache.retire(revision)

    async def pin(self, name: str, digits: str | None = None) -> None:
        """Keep a name's current revision, whichever it is, or one certain revision in every server's memory.

        Raises:
            UnknownAdapterError: if there is no such name or revision.
            AdapterError: if it cannot be loaded, or the source not be written.
        """
        revision = await self.find(name if digits is None else f"{name}@{digits}")
        await self.cache.load(revision, again=True)
        reference = name if digits is None else revision.engine_name
        await self._edit(lambda settings: settings.with_pin(reference, True))
        self._note("pin", name, revision, revision)

    async def unpin(self, name: str, digits: str | None = None) -> None:
        """Undo `pin`, also of what is not there any more; does nothing if it is not pinned.

        Raises:
            UnknownAdapterError: if there is no such name or revision, and no such pin.
            AdapterError: if the source cannot be written.
        """
        asked = name if digits is None else f"{name}@{digits}"
        pins = {asked} & self.settings.pinned
        if digits is not None and len(digits) >= 12:
            pins = {pin for pin in self.settings.pinned if "@" in pin and _are_one(pin, asked)}

        def unpinned(settings: SourceSettings) -> SourceSettings:
            for pin in pins:
                settings = settings.with_pin(pin, False)
            return settings

        revision = None
        try:
            revision = await self.find(asked)
        except AdapterError:
            if not pins:
                raise
        if pins:
            await self._edit(unpinned)
            self._note("unpin", name, revision, revision)

    async def set_alias(self, name: str, alias: Alias | None) -> None:
        """Let a name stand for others, or no more.

        Raises:
            NameRefusedError: if it cannot be an alias' name.
            UnknownAdapterError: if there is nothing it could lead to, or no such alias to end.
            AdapterError: if the source cannot be written.
        """
        before = self.settings.aliases.get(name)
        if alias is None and before is None:
            raise UnknownAdapterError(f"there is no alias {name!r}")
        if alias is not None:
            self._check_name(name, alias=True)
            if name in self.entries:
                raise NameRefusedError(f"{name!r} is an adapter: choose another name for the alias")
            shares = {}
            for target, share in alias.shares.items():
                revision = await self.find(target)
                shares[revision.engine_name if "@" in target else target] = share
            alias = Alias(shares)
        await self._edit(lambda settings: settings.with_alias(name, alias))
        before_text, after_text = (
            None if of is None else ", ".join(f"{target}: {share}" for target, share in of.shares.items())
            for of in (before, alias)
        )
        self._changed("alias", name, before_text, after_text)

    async def _edit(self, change: Callable[[SourceSettings], SourceSettings]) -> None:
        """Change the source's settings, whatever other servers change in them meanwhile."""
        source = self.contents.source
        settings = self.settings

        def edit() -> None:
            nonlocal settings
            for left in reversed(range(_TRIES)):
                content, version = source.read_settings()
                settings = change(SourceSettings.parse(content))
                try:
                    source.write_settings(settings.encode(), version)
                    self.contents.index.note_settings(settings.encode())
                    return
                except ChangedMeanwhileError:
                    if not left:
                        raise

        async with self._lock(""):
            await self.contents.run(f"writing the settings of {source.url}", edit)
            self.take_settings(settings)

    # ------------------------------------------------------------------------------------------- internals

    def fingerprint(self) -> str:
        """Of all that is served, by name and content: equal on servers that serve the same. 12 hex digits."""
        return f"{self._fingerprint:012x}"

    def take_touched(self) -> Iterable[str]:
        """Names there are for which something has changed since this was asked last; there is one who asks."""
        touched, self._touched = self._touched, {}
        return touched

    def is_current(self, revision: Revision) -> bool:
        """Whether a name stands for this revision."""
        entry = self.entries.get(revision.name)
        return entry is not None and entry.current == revision

    def version_of(self, revision: Revision) -> str | None:
        """The source's version of what has a revision's name, if that is served; None if it is not."""
        entry = self.entries.get(revision.name)
        return None if entry is None or entry.listed is None or entry.current != revision else entry.listed.version

    def _lock(self, name: str) -> asyncio.Lock:
        """What a change of this name holds; it is kept as long as somebody does or waits for it."""
        return self._locks.setdefault(name, asyncio.Lock())

    def _known(self, name: str) -> Entry:
        if (entry := self.entries.get(name)) is None:
            raise UnknownAdapterError(f"there is no adapter {name!r}")
        return entry

    def _enter(self, entry: Entry) -> Entry:
        """A name's entry, in place of the one that it may have."""
        if (former := self.entries.get(entry.name)) is not None:
            with self._counted(former):
                del self.entries[entry.name]
        with self._counted(entry):
            self.entries[entry.name] = entry
        return entry

    def _check_name(self, name: str, *, alias: bool = False) -> None:
        check_name(name)
        if self._reserved(name):
            raise NameRefusedError(f"{name!r} is the base model's name: choose another one")
        if not alias and name in self.settings.aliases:
            raise NameRefusedError(f"{name!r} is an alias: choose another name, or delete the alias first")

    def _switch(
        self, entry: Entry, revision: Revision, listed: Listed | None, *, quiet: bool = False
    ) -> Revision | None:
        """Let a name stand for a revision; what it stood for, if that was another one."""
        old = entry.current
        with self._counted(entry):
            entry.listed, entry.current, entry.rejection = listed, revision, None
        entry.history = None
        self._unchecked.pop(entry.name, None)
        if old == revision or quiet:
            return None
        if old is not None and old.digest.startswith(tuple(self.settings.pins(entry.name) - {""})):
            entry.former = {**(entry.former or {}), old.digest: old}
        self._note_pins(entry)
        self._log.info(
            "Serving %s adapter %s as %r (rank %d, %d bytes)%s",
            revision.kind, revision.revision, entry.name, revision.rank, revision.nbytes,
            f", instead of {old.revision}" if old else "",
        )  # fmt: skip
        return old

    async def _forget(self, entry: Entry, action: str) -> None:
        """Serve a name no more."""
        old, revisions = entry.current, entry.revisions()
        with self._counted(entry):
            del self.entries[entry.name]
        self._unchecked.pop(entry.name, None)
        entry.current, entry.former = None, None
        self._note_pins(entry)
        if old is not None:
            self._observer.swapped("removed")
            self._note(action, entry.name, old, None)
            self._log.info("Removed adapter %r", entry.name)
        for revision in revisions:
            await self.cache.retire(revision)

    async def _retire(self, old: Revision | None) -> None:
        """Have the engine let go of what a name stood for, unless somebody pinned it."""
        if old is not None and old.int_id not in self.cache.pinned:
            await self.cache.retire(old)

    @contextmanager
    def _counted(self, entry: Entry) -> Iterator[None]:
        """Change what an entry stands for, or whether it is there, with all that is counted of it."""
        for sign in (-1, 1):
            if self.entries.get(entry.name) is entry:
                self.counts[entry.state] += sign
                self.rejections += sign * (entry.rejection is not None)
                if entry.current is not None:
                    self.served_bytes += sign * entry.current.nbytes
                    name = entry.current.engine_name.encode()
                    # As many bits as Prometheus holds in a number.
                    self._fingerprint ^= int.from_bytes(hashlib.sha256(name).digest()[:6])
            if sign < 0:
                yield
        self.generation += 1
        if entry.name in self.entries:
            self._touched[entry.name] = None
        else:  # or new names without end would stay here where nobody asks
            self._touched.pop(entry.name, None)

    def _note_pins(self, entry: Entry) -> None:
        """Pin in the engine's memory what is pinned of a name now."""
        digests = self.settings.pins(entry.name)
        pinned = {
            revision.int_id
            for revision in (entry.revisions() if digests else ())
            if any(
                revision.digest.startswith(digest) if digest else revision == entry.current for digest in digests
            )
        }
        before = self._pins.pop(entry.name, set())
        if pinned:
            self._pins[entry.name] = pinned
        for int_id in pinned - before:
            self.cache.pin(int_id)
        for int_id in before - pinned:
            self.cache.unpin(int_id)

    def _note(
        self, action: str, name: str, before: Revision | None, after: Revision | None, result: str = "ok"
    ) -> None:
        """Tell of a change."""
        old, new = (None if revision is None else revision.revision for revision in (before, after))
        self._changed(action, name, old, new, result)

    @contextmanager
    def _no_matter(self) -> Iterator[None]:
        """Go on whatever happens to one adapter; what is wrong with it has been said, or is said to who asks."""
        try:
            yield
        except AdapterError:
            pass
        except Exception:
            self._log.exception("Unforeseen, while an adapter was checked in the background")

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _are_one(reference: str, other: str) -> bool:
    """Whether two NAME@REVISION may be of one revision, given with more or fewer digits."""
    return reference.startswith(other) or other.startswith(reference)


def _matching(entry: Entry, digits: str) -> dict[str, None]:
    """Digests of a name's contents that begin so: the current one, then the former ones, the newest first."""
    current = [] if entry.current is None else [entry.current.digest]
    former = (*(entry.former or ()), *reversed(entry.history or ()))
    return {d: None for d in (*current, *former) if d.startswith(digits)}


class _Fetching:
    """An engine whose adapters are brought from the source first."""

    def __init__(self, engine: Engine, catalogue: Catalogue):
        self._engine = engine
        self._catalogue = catalogue

    async def load(self, revision: Revision) -> int:
        """As the engine's, once the revision's files are there."""
        await self._catalogue.contents.bring(revision, self._catalogue.version_of(revision))
        return await self._engine.load(revision)

    async def unload(self, revision: Revision) -> None:
        """As the engine's."""
        await self._engine.unload(revision)
