"""Contents of adapters: fetched from the source, checked, and held in STATE for the engine to read."""

from __future__ import annotations

from collections.abc import Callable
from logging import Logger
from pathlib import Path
from typing import TypeAlias, cast

from qaa_serve.adapters import WEIGHTS_FILE, AdapterError, Kind, LinearWidths, copy_adapter, digest_of, judge
from qaa_serve.registry.index import Index, Verdict
from qaa_serve.registry.revisions import Revision
from qaa_serve.registry.state import State
from qaa_serve.registry.threads import Threads
from qaa_serve.sources import (
    ChangedMeanwhileError,
    History,
    Listed,
    NoSuchRevisionError,
    ReadOnlyError,
    Source,
    SourceError,
)

#: Puts an adapter's two files into an empty directory.
Fill: TypeAlias = Callable[[Path], None]


class RefusedContentError(AdapterError):
    """A content that was checked before and cannot be served."""

    def __init__(self, message: str, kind: Kind):
        super().__init__(message)
        self.kind = kind


class Contents:
    """Gets adapters' contents; what has been checked once is not read again to know what it is.

    Adapters are checked after they were copied, so what is served is what was checked, whatever happens to the
    place that they came from. All that blocks runs in threads.

    Attributes:
        source: where adapters are kept.
        state: where their copies are.
        index: what is known of them.
    """

    def __init__(
        self,
        source: Source,
        state: State,
        index: Index,
        local_history: History,
        *,
        base: LinearWidths | None,
        max_bytes: int,
        loaders: int,
        timeout_s: float,
        logger: Logger,
    ):
        """Begin.

        Args:
            source: where adapters are kept.
            state: where copies are held.
            index: what is known of contents.
            local_history: where replaced contents are kept if the source cannot be written.
            base: the base model's linear layers, which adapters must fit; None leaves that to the engine.
            max_bytes: of one adapter's weights.
            loaders: how many are read at once.
            timeout_s: how long reading one may take; 0: for ever.
            logger: where to say what happens.
        """
        self.source = source
        self.state = state
        self.index = index
        self._in_background = Threads(1, timeout_s)
        self._local_history = local_history
        self._base = base
        self._max_bytes = max_bytes
        self._threads = Threads(loaders, timeout_s)
        self._keeping = Threads(1, timeout_s)
        self._changes = Threads(2 * loaders, timeout_s)  # whoever changes something does not wait for who reads
        self._told_read_only = False
        self._log = logger

    def close(self) -> None:
        """Let another server use STATE."""
        self.index.close()
        self.state.close()

    # ------------------------------------------------------------------------------------------------ reading

    def known(self, name: str, verdict: Verdict) -> Revision:
        """The revision that a verdict speaks of.

        Raises:
            RefusedContentError: if it cannot be served.
        """
        if verdict.reason is not None:
            raise RefusedContentError(verdict.reason, cast(Kind, verdict.error))
        assert verdict.kind is not None  # as of all that can be served
        return Revision(
            name=name,
            digest=verdict.digest,
            path=self.state.place(verdict.digest),
            kind=verdict.kind,
            rank=verdict.rank,
            nbytes=verdict.nbytes,
            base=verdict.base,
            details=verdict.details,
        )

    async def check(self, name: str, listed: Listed, *, background: bool = False) -> Revision:
        """What the source has under a name, read only if nothing is known of it.

        Raises:
            AdapterError: if it cannot be served, or not read now.
        """
        threads = self._in_background if background else self._threads
        return await threads.run(f"reading the adapter {name!r}", self.check_now, name, listed)

    def check_now(self, name: str, listed: Listed) -> Revision:
        """As `check`, in this thread."""
        digest = self.index.digest_of(name, listed.version)
        verdict = None if digest is None else self.index.verdict(digest)
        if verdict is None:
            verdict = self._read(
                listed.nbytes,
                lambda staged: self.source.fetch(name, listed.version, staged, max_bytes=self._max_bytes),
            )
            self.index.note(name, listed, verdict.digest)
        return self.known(name, verdict)

    async def admit(self, name: str, content: Path | Fill) -> Revision:
        """Take an adapter from anywhere.

        Args:
            name: the public name.
            content: a directory that holds it, or what puts its two files into an empty one; called in a thread.

        Raises:
            AdapterError: if it cannot be served, or there is no room.
        """

        def copy(staged: Path) -> None:
            assert isinstance(content, Path)
            copy_adapter(content, staged, max_bytes=self._max_bytes)

        fill = copy if isinstance(content, Path) else content
        return self.known(name, await self._changes.run(f"checking {name!r}", self._read, 0, fill))

    async def former(self, name: str, digest: str) -> Revision:
        """A content of a name's history.

        Raises:
            AdapterError: if it is not there, or cannot be served.
        """

        def read() -> Verdict:
            return self.index.verdict(digest) or self._read(
                0, lambda staged: self._fetch_former(name, digest, staged), digest
            )

        return self.known(name, await self._threads.run(f"reading {name}@{digest[:12]}", read))

    async def bring(self, revision: Revision, version: str | None) -> None:
        """Have a revision's copy in STATE, whole.

        Args:
            revision: the revision.
            version: of what the source has under its name, which may be the same; None: it is a former one.

        Raises:
            AdapterError: if it cannot be had.
        """

        def fetch(staged: Path) -> None:
            if version is not None and self.index.digest_of(revision.name, version) in (None, revision.digest):
                try:
                    self.source.fetch(revision.name, version, staged, max_bytes=self._max_bytes)
                except ChangedMeanwhileError:
                    pass  # replaced, and kept by whoever did
                else:
                    return
            self._fetch_former(revision.name, revision.digest, staged)

        def bring() -> None:
            if self.state.get(revision.digest) is None:
                self._read(revision.nbytes, fetch, revision.digest)

        await self._threads.run(f"reading {revision.revision}", bring)

    def _read(self, nbytes: int, fetch: Fill, expected: str | None = None) -> Verdict:
        """Fetch a content and keep it if it can be served; nothing of it is left otherwise."""
        with self.state.staging(nbytes) as staged:
            fetch(staged)
            digest = digest_of(staged, max_bytes=self._max_bytes)
            if expected not in (None, digest):
                raise SourceError(f"the copy of {str(expected)[:12]} in {self.source.url} is damaged")
            verdict = self.index.verdict(digest) or self._judge(staged, digest)
            if verdict.reason is None:
                self.state.add(staged, digest)
            return verdict

    def _judge(self, staged: Path, digest: str) -> Verdict:
        try:
            found = judge(staged, base=self._base, max_bytes=self._max_bytes)
        except AdapterError as error:
            if error.temporary or isinstance(error.__cause__, (OSError, MemoryError)):
                raise  # that may be otherwise another time
            verdict = Verdict(digest, None, 0, 0, "", {}, str(error), error.kind)
        else:
            nbytes = (staged / WEIGHTS_FILE).stat().st_size
            verdict = Verdict(digest, found.kind, found.rank, nbytes, found.base, found.details, None, None)
        self.index.note_verdict(verdict)
        return verdict

    def _fetch_former(self, name: str, digest: str, target: Path) -> None:
        try:
            self.source.fetch_revision(name, digest, target, max_bytes=self._max_bytes)
        except NoSuchRevisionError:
            self._local_history.fetch_revision(name, digest, target, max_bytes=self._max_bytes)

    # ------------------------------------------------------------------------------------------------ history

    async def history(self, name: str) -> list[str]:
        """Digests of a name's former contents, the oldest first.

        Raises:
            SourceError: if they cannot be read now.
        """

        def read() -> list[str]:
            kept = self.source.revisions(name)
            return [*(d for d in self._local_history.revisions(name) if d not in kept), *kept]

        return await self._threads.run(f"reading the history of {name!r}", read)

    async def keep(self, old: Revision, count: int, protected: frozenset[str]) -> None:
        """Keep a content that somebody replaced in the source by hand, as far as that goes.

        Args:
            old: the content.
            count: former contents to keep of each name.
            protected: digests, or beginnings of them, that are kept besides.
        """

        def keep() -> None:
            copy = self.state.get(old.digest)
            try:
                if copy is not None:
                    self.source.keep(old.name, old.digest, copy)
                self.prune(self.source, old.name, count, protected)
            except ReadOnlyError as error:
                if not self._told_read_only:
                    self._told_read_only = True
                    self._log.warning("Former contents are kept by this server alone: %s", error)
                if copy is not None:
                    self._local_history.keep(old.name, old.digest, copy)
                self.prune(self._local_history, old.name, count, protected)

        try:
            await self._keeping.run(f"keeping {old.revision}", keep)
        except (AdapterError, OSError) as error:
            self._log.warning("%s is not kept: %s", old.revision, error)

    @staticmethod
    def prune(history: History, name: str, count: int, protected: frozenset[str]) -> None:
        """Let go of a name's oldest contents."""
        kept = history.revisions(name)
        history.prune(name, count, [d for d in kept if d.startswith(tuple(protected))])

    # ------------------------------------------------------------------------------------------------ changes

    async def put(
        self,
        revision: Revision,
        expected: str | None,
        *,
        again: bool,
        keep: int,
        protected: frozenset[str],
    ) -> Listed:
        """Write a revision into the source as its name's content; durable when this returns.

        Raises:
            AdapterError: if it cannot be written, or something else than `expected` is there.
        """

        def put() -> Listed:
            copy = self.state.get(revision.digest)
            if copy is None:
                raise SourceError(
                    f"the copy of {revision.revision} is gone from {self.state.directory}: send it again"
                )
            listed = self.source.put(revision.name, copy, revision.digest, expected=expected, again=again)
            self.index.note(revision.name, listed, revision.digest)
            try:
                self.prune(self.source, revision.name, keep, protected | {revision.digest})
            except AdapterError as error:  # it is published all the same
                self._log.warning("Old revisions of %r stay: %s", revision.name, error)
            return listed

        return await self._changes.run(f"writing {revision.revision} to {self.source.url}", put)

    async def remove(self, name: str, expected: str | None, *, purge: bool) -> None:
        """Move an adapter to the history of the source, or with that history out of it.

        Raises:
            AdapterError: if that cannot be done, or something else than `expected` is there.
        """

        def remove() -> None:
            self.source.remove(name, expected=expected, purge=purge)
            self.index.forget(name)

        await self._changes.run(f"removing {name!r} from {self.source.url}", remove)

    async def run(self, what: str, function: Callable[[], object]) -> None:
        """Do something else that changes the source."""
        await self._changes.run(what, function)
