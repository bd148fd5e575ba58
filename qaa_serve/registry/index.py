"""The index of a state directory: what a server has learned, and need not learn again at its next start.

All of it can be had from the source again, at the price of reading every adapter. So nothing here is an error to
those who use it: what cannot be read is not known, and what cannot be written is forgotten.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from logging import Logger, getLogger
from pathlib import Path
from typing import Any, Literal, TypeVar

from qaa_serve import __version__
from qaa_serve.adapters import LinearWidths
from qaa_serve.sources import Listed, Listing

#: Verdicts that are kept though no listed adapter has their content: of former contents, and of other bases.
MAX_UNLISTED = 100_000

#: Files that could not be read and are kept for whoever wants to know why.
MAX_SET_ASIDE = 3

_VERSION = 1
_TABLES = {
    "listed": "CREATE TABLE listed (name TEXT PRIMARY KEY, version TEXT NOT NULL, changed REAL NOT NULL, "
    "nbytes INTEGER NOT NULL, complete INTEGER NOT NULL, settled INTEGER NOT NULL, digest TEXT) WITHOUT ROWID",
    # The number grows with each verdict that is noted: the newest have the largest.
    "verdicts": "CREATE TABLE verdicts (number INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, "
    "digest TEXT NOT NULL, kind TEXT, rank INTEGER NOT NULL, nbytes INTEGER NOT NULL, base TEXT NOT NULL, "
    "details TEXT NOT NULL, reason TEXT, error TEXT, UNIQUE (digest, fingerprint))",
    "meta": "CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID",
}
#: The digest stays as long as the version does.
_NOTE = """
    INSERT INTO listed VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET
    version = excluded.version, changed = excluded.changed, nbytes = excluded.nbytes,
    complete = excluded.complete, settled = excluded.settled,
    digest = ifnull(excluded.digest, iif(version = excluded.version, digest, NULL))
"""
_VERDICT = "verdicts.digest, kind, rank, verdicts.nbytes, base, details, reason, error"
_AT_ONCE = 1000  # rows that are read with the lock held; new verdicts after which old ones are deleted
#: Errors that are the file's own fault; others, such as a full disk, may pass.
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found when a content was checked.

    Attributes:
        digest: of the content.
        kind: QAA or LORA; None if it was refused before that was known.
        rank: the largest over its layers; 0 if not known.
        nbytes: of its weights.
        base: the base model it names, as written; empty if it names none.
        details: for people, as JSON can hold them.
        reason: why it cannot be served; None if it can.
        error: AdapterError's kind; None if it can be served.
    """

    digest: str
    kind: Literal["QAA", "LORA"] | None
    rank: int
    nbytes: int
    base: str
    details: dict[str, Any]
    reason: str | None
    error: str | None


class _UnreadableError(Exception):
    """The file is no index of this version."""


class Index:
    """What is known of adapters over restarts; any thread may ask, and may have to wait for another.

    A file that cannot be read is moved aside, and a new one begun. Later errors are logged once.
    """

    def __init__(self, path: Path, base: str, logger: Logger | None = None):
        """Open the index, or begin one; never raises.

        Args:
            path: its file, which no other process may write.
            base: what verdicts depend on besides the content (`base_fingerprint`): those of another are not seen.
            logger: where to say what happens.
        """
        self._path = path
        self._base = base
        self._log = logger or getLogger(__name__)
        self._lock = threading.Lock()
        self._complained = False
        self._connection: sqlite3.Connection | None = None
        try:
            self._open()
        except Exception as error:
            self._failed(error)

    def close(self) -> None:
        """Write everything to the file; from now on nothing is known."""
        with self._lock:
            self._close()

    # ------------------------------------------------------------------------------------------ the source

    def listed(self) -> tuple[dict[str, Listed], str | None]:
        """The last listing, by name, and its identity; None if there was none."""

        def read(connection: sqlite3.Connection) -> tuple[dict[str, Listed], str | None]:
            rows = connection.execute("SELECT name, version, changed, nbytes, complete, settled FROM listed")
            found = {name: Listed(v, changed, n, bool(c), bool(s)) for name, v, changed, n, c, s in rows}
            return found, _meta(connection, "identity")

        nothing: tuple[dict[str, Listed], str | None] = ({}, None)
        return self._try(read, nothing)

    def note_listing(self, listing: Listing) -> None:
        """Replace the last listing, all at once. What was known of names whose version is the same stays."""

        def write(connection: sqlite3.Connection) -> None:
            rows = (_row(name, listed, None) for name, listed in listing.adapters.items() if _is_text(name))
            connection.executemany(_NOTE, rows)
            names = {name for (name,) in connection.execute("SELECT name FROM listed")}
            gone = ((name,) for name in names - listing.adapters.keys())
            connection.executemany("DELETE FROM listed WHERE name = ?", gone)
            _set_meta(connection, "identity", listing.identity)
            _forget_old_verdicts(connection)

        self._try(write, None)

    def note(self, name: str, listed: Listed, digest: str | None) -> None:
        """What is there under a name, and the digest of its content; None if that is not known."""
        self._try(lambda connection: connection.execute(_NOTE, _row(name, listed, digest)), None)

    def forget(self, name: str) -> None:
        """There is nothing under a name any more."""
        self._try(lambda connection: connection.execute("DELETE FROM listed WHERE name = ?", (name,)), None)

    def digest_of(self, name: str, version: str) -> str | None:
        """The digest of what is there under a name in this version; None if it is not known."""
        query = "SELECT digest FROM listed WHERE name = ? AND version = ?"
        row = self._try(lambda connection: connection.execute(query, (name, version)).fetchone(), None)
        return None if row is None else row[0]

    # -------------------------------------------------------------------------------------------- verdicts

    def known(self) -> Iterator[tuple[str, str, Verdict]]:
        """Name, version and verdict of everything that is listed and was checked, in the order of the names."""
        query = (
            f"SELECT name, version, {_VERDICT} FROM listed CROSS JOIN verdicts USING (digest) "
            "WHERE fingerprint = ? AND name > ? ORDER BY name LIMIT ?"
        )

        def read(connection: sqlite3.Connection) -> list[tuple[str, str, Verdict]]:
            rows = connection.execute(query, (self._base, after, _AT_ONCE))
            return [(name, version, _verdict(fields)) for name, version, *fields in rows]

        after, nothing = "", list[tuple[str, str, Verdict]]()
        while found := self._try(read, nothing):
            yield from found
            after = found[-1][0]

    def verdict(self, digest: str) -> Verdict | None:
        """What was found when a content was checked; None if it was not."""
        query = f"SELECT {_VERDICT} FROM verdicts WHERE digest = ? AND fingerprint = ?"

        def read(connection: sqlite3.Connection) -> Verdict | None:
            row = connection.execute(query, (digest, self._base)).fetchone()
            return None if row is None else _verdict(row)

        return self._try(read, None)

    def note_verdict(self, verdict: Verdict) -> None:
        """A content was checked."""
        v = verdict
        row = (self._base, v.digest, v.kind, v.rank, v.nbytes, v.base, json.dumps(v.details), v.reason, v.error)
        query = "INSERT OR REPLACE INTO verdicts VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

        def write(connection: sqlite3.Connection) -> None:
            number = connection.execute(query, row).lastrowid or 0
            if number % _AT_ONCE == 0:  # the API may replace contents for ever, and no listing differs
                _forget_old_verdicts(connection)

        self._try(write, None)

    # -------------------------------------------------------------------------------------------- settings

    def settings(self) -> bytes | None:
        """The source's settings as they were read last; None if they never were."""
        content: bytes | None = self._try(lambda connection: _meta(connection, "settings"), None)
        return content

    def note_settings(self, content: bytes) -> None:
        """The source's settings were read."""
        self._try(lambda connection: _set_meta(connection, "settings", content), None)

    # ------------------------------------------------------------------------------------------------ file

    def _try(self, work: Callable[[sqlite3.Connection], _T], otherwise: _T) -> _T:
        """Do something with the index in one transaction."""
        with self._lock:
            if self._connection is None:
                return otherwise
            try:
                with self._connection:
                    return work(self._connection)
            except UnicodeEncodeError:  # no text, so never written: see `_is_text`
                return otherwise
            except Exception as error:  # whatever is wrong with a cache, no request may fail of it
                self._failed(error)
                return otherwise

    def _failed(self, error: Exception) -> None:
        """Begin a new file if this one is at fault; else go on with it, in case that its disk recovers."""
        if not _is_damage(error):
            if not self._complained:
                self._log.warning("What is learned of adapters is not kept for the next start: %s", error)
            self._complained = True
            return
        self._close()
        try:
            aside = self._set_aside()
            self._log.warning(
                "%s cannot be read (%s); it is now %s, and a new one is begun", self._path, error, aside
            )
            self._open()
        except Exception as trouble:
            self._log.warning(
                "%s cannot be begun anew, so nothing is kept for the next start: %s", self._path, trouble
            )
            self._close()

    def _open(self) -> None:
        """Raises whatever is wrong with the file."""
        if self._path.exists() and not self._path.is_file():
            raise _UnreadableError("it is no file")
        # A request may wait for the lock of somebody who looks at the file, but not for long.
        connection = sqlite3.connect(self._path, timeout=1, check_same_thread=False)
        try:
            tables = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if (tables or version) and (version != _VERSION or tables != _TABLES):
                raise _UnreadableError(f"it is of version {version} or not an index; version {_VERSION} is read")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            if not tables:
                statements = ";".join(_TABLES.values())
                connection.executescript(f"BEGIN; {statements}; PRAGMA user_version = {_VERSION}; COMMIT")
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise _UnreadableError(found)
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _close(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
        self._connection = None

    def _set_aside(self) -> Path:
        """Move the file, and what SQLite keeps beside it, out of the way; the oldest of such are deleted."""
        aside = self._path.with_name(f"{self._path.name}.unreadable-{time.time_ns()}")
        self._path.rename(aside)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                _beside(self._path, suffix).rename(_beside(aside, suffix))
        found = self._path.parent.glob(f"{self._path.name}.unreadable-*[0-9]")
        for old in sorted(found, key=lambda path: path.name)[:-MAX_SET_ASIDE]:
            for path in (old, _beside(old, "-wal"), _beside(old, "-shm")):
                with suppress(OSError):  # a directory stays: it is not ours
                    path.unlink()
        return aside


def base_fingerprint(widths: LinearWidths | None, max_adapter_bytes: int) -> str:
    """SHA-256, in hex, of all that a verdict depends on besides the content.

    Args:
        widths: the base model's linear layers; None if adapters are not checked against them.
        max_adapter_bytes: of one adapter's weights.
    """
    facts = [None if widths is None else sorted(widths.items()), max_adapter_bytes, __version__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _row(name: str, listed: Listed, digest: str | None) -> tuple[Any, ...]:
    return (
        name, listed.version, listed.changed, listed.nbytes, listed.complete, listed.settled, digest
    )  # fmt: skip


def _is_text(name: str) -> bool:
    """Whether a name can be written; that of a directory may be anything. No such adapter is ever served."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _verdict(row: Sequence[Any]) -> Verdict:
    digest, kind, rank, nbytes, base, details, reason, error = row
    try:
        return Verdict(digest, kind, rank, nbytes, base, json.loads(details), reason, error)
    except (TypeError, ValueError) as trouble:
        raise _UnreadableError(f"the details of {digest} are no JSON: {trouble}") from trouble


def _forget_old_verdicts(connection: sqlite3.Connection) -> None:
    """Delete those of contents that no listed adapter has, but for the newest."""
    connection.execute(
        "DELETE FROM verdicts WHERE number <= (SELECT max(number) FROM verdicts) - ? "
        "AND digest NOT IN (SELECT digest FROM listed WHERE digest IS NOT NULL)",
        (MAX_UNLISTED,),
    )


def _meta(connection: sqlite3.Connection, key: str) -> Any:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]


def _set_meta(connection: sqlite3.Connection, key: str, value: str | bytes) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _is_damage(error: Exception) -> bool:
    if type(error) in (sqlite3.DatabaseError, sqlite3.OperationalError):
        # Text that is none has no code.
        return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _DAMAGED
    return isinstance(error, _UnreadableError)
