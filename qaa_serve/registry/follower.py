"""Following a source: what appears in it is served, what changes replaces, what goes is served no more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from logging import Logger, getLogger

from qaa_serve.adapters import AdapterError
from qaa_serve.registry.catalogue import Catalogue
from qaa_serve.registry.failures import Failures
from qaa_serve.registry.index import Index
from qaa_serve.registry.settings import SourceSettings
from qaa_serve.registry.threads import Threads
from qaa_serve.sources import ChangedMeanwhileError, Listed, Listing, Source, SourceError

#: How long to wait before a source that cannot be read at the start is tried again, in seconds.
_RETRY_S = 5.0

#: How long a listing may take at least before it is given up, in seconds.
_LISTING_S = 600.0


class Follower:
    """Tells a catalogue what a source has, and what changes in it.

    Events of the source say when to look and whether something came in one step; what is there is always found by
    looking, and everything is looked at now and then, so that a lost event only costs time. All looking happens in
    threads: here only what differs is handled.
    """

    def __init__(
        self,
        source: Source,
        catalogue: Catalogue,
        index: Index,
        *,
        quiet_s: float = 1.0,
        takers: int = 4,
        timeout_s: float = 60.0,
        logger: Logger | None = None,
    ):
        """Prepare to follow.

        Args:
            source: what to follow.
            catalogue: told of what is there.
            index: what earlier servers saw, for a source that cannot be read at the start.
            quiet_s: how long an adapter must not change before it is read, in seconds; one that came in one step
                is read at once.
            takers: adapters that are read at once.
            timeout_s: how long looking may take; 0: for ever.
            logger: where to say what happens.
        """
        self._source = source
        self._catalogue = catalogue
        self._index = index
        self._quiet_s = quiet_s
        self._takers = asyncio.Semaphore(takers)
        self._threads = Threads(4, timeout_s)
        self._lister = Threads(1, max(timeout_s, _LISTING_S) if timeout_s else 0)
        self._listing: asyncio.Task[None] | None = None
        self._log = logger or getLogger(__name__)
        self._seen: dict[str, str] = {}  # the version of each name that has been handled
        self._waiting: dict[str, tuple[str, float]] = {}  # name -> a version, and when it is to be read
        self._taking: dict[str, asyncio.Task[None]] = {}
        self._failures: Failures[str] = Failures()
        self._identity = ""
        self._settings: str | None = ""  # no version: they were not read yet
        self._trouble = ""
        self._listed_at = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the whole source was seen last."""
        return time.monotonic() - self._listed_at

    async def start(self) -> None:
        """Take over what is there; without a source that can be read, what was there last, or wait for it."""
        last, identity = await self._threads.run("reading the index", self._index.listed)
        while True:
            try:
                listing = await self._lister.run(f"listing {self._source.url}", self._source.list)
                if last and not listing.adapters and listing.identity != identity:
                    raise SourceError(f"{self._source.url} is empty, as if it were not mounted")
                self._listed_at = time.monotonic()
                await self._threads.run("writing the index", self._index.note_listing, listing)
                self._trouble = ""
                break
            except SourceError as error:
                self._note_lost(str(error))
                if last:
                    listing = Listing(last, identity or "")
                    break
            await asyncio.sleep(_RETRY_S)
        self._identity = listing.identity
        content = await self._threads.run("reading the index", self._index.settings)
        if content is not None:
            self._take_settings(content)
        try:
            if not self._trouble:
                await self._read_settings()
        except SourceError as error:
            self._note_lost(str(error))

        def begin() -> dict[str, str]:
            self._catalogue.begin(listing.adapters, self._index.known())
            return {name: listed.version for name, listed in listing.adapters.items()}

        self._seen = await asyncio.to_thread(begin)
        self._catalogue.check_soon()

    async def run(self) -> None:
        """Follow until cancelled."""
        changes = self._source.changes()
        coming: asyncio.Future[Mapping[str, bool] | None] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(changes))
                await asyncio.wait(
                    (coming,), timeout=min(self._quiet_s / 4, 0.25) + 0.01 if self._waiting else None
                )
                names: Mapping[str, bool] | None = {}
                if coming.done():
                    names, coming = coming.result(), None
                try:
                    if names is None:
                        self._begin_listing()
                    elif names or coming is not None:
                        await self._look_at(names)
                    else:  # the settings alone
                        await self._read_settings()
                except AdapterError as error:
                    self._note_lost(str(error))
                except Exception:
                    self._log.exception("Looking at %s", self._source.url)
        finally:
            tasks = [task for task in (coming, self._listing, *self._taking.values()) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------ looking

    def _begin_listing(self) -> None:
        """Look at everything beside what happens meanwhile: it may take long."""

        async def look() -> None:
            try:
                await self._look_at_everything()
            except AdapterError as error:
                self._note_lost(str(error))
            except Exception:
                self._log.exception("Looking at %s", self._source.url)

        if self._listing is None or self._listing.done():
            self._listing = asyncio.create_task(look())

    async def _look_at_everything(self) -> None:
        """Find what differs from what has been handled."""
        url = self._source.url

        def look() -> tuple[Listing, dict[str, Listed], list[str]]:
            listing = self._source.list()
            seen = self._seen.get
            changed = {name: listed for name, listed in listing.adapters.items() if seen(name) != listed.version}
            gone = [name for name in list(self._seen) if name not in listing.adapters]
            if listing.adapters:  # one that was just being replaced may be missing
                found, busy = self._look(gone)
                gone = [name for name in gone if name not in busy and found[name] is None]
            return listing, changed, gone

        begun = time.monotonic()
        listing, changed, gone = await self._lister.run(f"listing {url}", look)
        if gone and not listing.adapters and listing.identity != self._identity:
            raise SourceError(f"{url} is another one now, and empty, as if it were not mounted")
        if self._trouble:
            self._log.warning("%s is back", url)
        self._trouble, self._identity, self._listed_at = "", listing.identity, time.monotonic()
        await self._look_at_settings(listing.settings)
        for name, listed in changed.items():
            self._consider(name, listed, whole=False)
        for name in self._waiting.keys() - listing.adapters.keys():
            del self._waiting[name]
        for name in gone:
            await self._catalogue.forget(name, begun)
            self._seen.pop(name, None)
        if gone or changed:
            await self._threads.run("writing the index", self._index.note_listing, listing)

    async def _look_at(self, names: Mapping[str, bool]) -> None:
        """Look at what may have changed, and at what is due.

        Args:
            names: with whether each came in one step.
        """
        now = time.monotonic()
        due = {name: False for name, (_, when) in self._waiting.items() if when <= now}
        wanted = {**due, **names}
        if not wanted:
            return

        found, busy = await self._threads.run(f"looking at {self._source.url}", self._look, wanted)
        for name in busy:
            self._waiting.setdefault(name, ("", time.monotonic() + self._quiet_s))
        for name, listed in found.items():
            if listed is not None:
                self._consider(name, listed, whole=wanted[name])
        if any(listed is None and (name in self._seen or name in self._waiting) for name, listed in found.items()):
            self._begin_listing()  # is it gone, or is the whole source?

    def _look(self, names: Iterable[str]) -> tuple[dict[str, Listed | None], set[str]]:
        """What there is under names, and those of them that are just being changed; blocks."""
        found: dict[str, Listed | None] = {}
        busy = set()
        for name in names:
            try:
                found[name] = self._source.look(name)
            except ChangedMeanwhileError:  # of one name: it says nothing of the source
                busy.add(name)
        return found, busy

    def _consider(self, name: str, listed: Listed, *, whole: bool) -> None:
        """Take what has changed, as soon as it does not change any more."""
        if self._seen.get(name) == listed.version:
            self._waiting.pop(name, None)
            return
        version, when = self._waiting.get(name, ("", 0.0))
        now = time.monotonic()
        at_once = listed.complete and (whole or listed.settled) and version in ("", listed.version)
        if name in self._taking:  # looked at again when that has ended
            self._waiting[name] = (listed.version, now if at_once else now + self._quiet_s)
        elif at_once or (version == listed.version and when <= now):
            self._waiting.pop(name, None)
            task = self._taking[name] = asyncio.create_task(self._take(name, listed))
            task.add_done_callback(lambda _: self._taking.pop(name, None))
        elif version != listed.version:
            self._waiting[name] = (listed.version, now + self._quiet_s)

    async def _take(self, name: str, listed: Listed) -> None:
        """Have the catalogue serve another content of a name."""
        try:
            async with self._takers:
                await self._catalogue.take(name, listed)
            self._failures.forget(name)
            self._seen[name] = listed.version
        except AdapterError as error:
            self._failures.note(name, error)
            self._waiting[name] = (listed.version, time.monotonic() + self._failures.pause_s(name))
            if not isinstance(error, ChangedMeanwhileError):
                self._log.warning("Adapter %r of %s is tried again later: %s", name, self._source.url, error)
        except Exception:
            self._log.exception("Taking the adapter %r of %s", name, self._source.url)
            self._seen[name] = listed.version

    def _note_lost(self, why: str) -> None:
        if why != self._trouble:
            self._log.error("%s. The adapters from it stay as they are until it is back", why.rstrip("."))
        self._trouble = why

    # ------------------------------------------------------------------------------------------------ settings

    async def _look_at_settings(self, version: str | None) -> None:
        """Read the pins and aliases anew if they have changed."""
        if version != self._settings:
            await self._read_settings()

    async def _read_settings(self) -> None:
        content, self._settings = await self._threads.run("reading the settings", self._source.read_settings)
        if self._take_settings(content):
            await self._threads.run("writing the index", self._index.note_settings, content)

    def _take_settings(self, content: bytes) -> bool:
        try:
            self._catalogue.take_settings(SourceSettings.parse(content))
        except AdapterError as error:
            self._log.error("The pins and aliases of %s stay as they were: %s", self._source.url, error)
            return False
        return True
