"""A history of adapters in a directory.

HISTORY/NAME/DIGEST/       former contents; the order of their modification times is that of the history
HISTORY/NAME/other-TIME/   what has no digest of its own: it was not complete, or its two files are kept already
HISTORY/.changing/NAME/    what a change of NAME is at; empty or not there in between
HISTORY/.locks/            a fixed number of files that are locked while names are changed
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError, copy_adapter, digest_of
from qaa_serve.sources.base import NoSuchRevisionError, SourceError
from qaa_serve.sources.disk import locked, sync, writing

#: How long a change waits for another one of the same name, in seconds.
LOCK_S = 10.0

CHANGING, _LOCKS, _OTHER = ".changing", ".locks", "other-"
_OWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shelf:
    """The history of one name. What changes it is called with its lock held, and leaves OSErrors as they are.

    Attributes:
        history: the directory with all of them, without a link in its path, as that may be turned.
        name: the adapter.
    """

    history: Path
    name: str

    @property
    def place(self) -> Path:
        """Where its former contents are."""
        return self.history / self.name

    @property
    def work(self) -> Path:
        """Where a change of it prepares things."""
        return self.history / CHANGING / self.name

    @property
    def junk(self) -> Path:
        """Part of `work`: what is not complete yet, or not any more; whoever finds it clears it away."""
        return self.work / "junk"

    @contextmanager
    def locked(self, wait_s: float) -> Iterator[None]:
        """Keep others from changing this name, and some others.

        Raises:
            SourceError: if somebody else does so for longer than `wait_s` seconds.
            OSError: if it cannot be locked.
        """
        # One file for each name would stay for each name; files that are deleted make bad locks.
        lock = hashlib.sha256(os.fsencode(self.name)).hexdigest()[:2]
        with locked(lock_file(self.history, lock), wait_s, f"the adapter {self.name!r}"):
            yield

    def revisions(self) -> list[str]:
        """Digests of the whole contents that are kept, the oldest first."""
        found = []
        for path in self._entries():
            with suppress(OSError):  # gone meanwhile
                if _DIGEST.fullmatch(path.name) and all((path / f).is_file() for f in (CONFIG_FILE, WEIGHTS_FILE)):
                    found.append((path.stat().st_mtime_ns, path.name))
        return [digest for _, digest in sorted(found)]

    def staged(self, directory: Path, digest: str) -> Path:
        """A durable copy of a content, beside where it is to go: it lies in `junk` until it is renamed.

        Raises:
            AdapterError: if it cannot be read, or is another content.
        """
        self.clear()
        self.junk.mkdir(parents=True)
        try:
            copy_adapter(directory, self.junk, max_bytes=(directory / WEIGHTS_FILE).stat().st_size)
            if digest_of(self.junk) != digest:
                raise AdapterError(
                    f"{directory} has not the digest {digest[:12]} that it should have: it was damaged, or changed"
                )
            sync(self.junk / CONFIG_FILE, self.junk / WEIGHTS_FILE, self.junk)
        except BaseException:
            with suppress(OSError):
                self.clear()
            raise
        return self.junk

    def keep(self, digest: str, directory: Path) -> None:
        """Add a copy of a content as the newest, unless it is kept already."""
        if not self._has(digest):
            self.take_out(digest)  # a damaged one
            self._add(digest, self.staged(directory, digest))

    def touch(self, digest: str) -> None:
        """Make a content the newest, if it is kept."""
        if (self.place / digest).is_dir():
            self._make_newest(self.place / digest)

    def take_out(self, digest: str) -> None:
        """Delete a content, if it is kept."""
        if os.path.lexists(self.place / digest):
            self._discard(self.place / digest)

    def retire(self, old: Path, *, again: bool = False) -> None:
        """Move what an adapter's name led to here; nothing that is not kept is deleted.

        Args:
            old: a directory; or a link, of whose content a copy was kept; or anything else.
            again: it keeps its place if it is kept already, else it becomes the newest in any case.
        """
        if old.is_symlink():
            old.unlink()
        elif (digest := digest_if_any(old)) is None:
            old.rename(self._another())
        elif self._has(digest):
            if not again:
                self.touch(digest)
            self._discard(old)
        else:
            self.take_out(digest)
            self._add(digest, old)
        if self.place.is_dir():
            sync(self.place, self.history)

    def prune(self, keep: int, protected: Collection[str] = ()) -> None:
        """Delete the oldest contents beyond a number; what else was moved here has the same number of its own."""
        digests = [digest for digest in self.revisions() if digest not in protected]
        for digest in digests[: max(0, len(digests) - keep)]:
            self._discard(self.place / digest)
        others = sorted(path for path in self._entries() if path.name.startswith(_OTHER))
        for path in others[: max(0, len(others) - keep)]:
            _delete_own_files(path)
            with suppress(OSError):
                path.rmdir()

    def clear(self) -> None:
        """Delete `junk`, where a change that was not finished may have left something."""
        if not os.path.lexists(self.junk):
            return
        _delete_own_files(self.junk)
        try:
            self.junk.rmdir()
        except OSError:  # somebody's other files are in it
            self.junk.rename(self._another())

    def tidy(self) -> None:
        """Delete what is empty."""
        for directory in (self.work, self.place):
            with suppress(OSError):
                directory.rmdir()

    def _entries(self) -> list[Path]:
        try:
            return [self.place / name for name in os.listdir(self.place)]
        except FileNotFoundError:
            return []

    def _has(self, digest: str) -> bool:
        return digest_if_any(self.place / digest) == digest

    def _add(self, digest: str, directory: Path) -> None:
        self.place.mkdir(exist_ok=True)
        self._make_newest(directory)
        directory.rename(self.place / digest)
        sync(self.place, self.history)

    def _make_newest(self, directory: Path) -> None:
        """Set a directory's modification time to now, or later if a content seems to be of the future."""
        newest = 0
        for path in self._entries():
            if path != directory and _DIGEST.fullmatch(path.name):
                newest = max(newest, path.stat().st_mtime_ns)
        for step in (1, 1_000, 1_000_000, 2_000_000_000):  # file systems round differently
            when = max(time.time_ns(), newest + step)
            try:
                os.utime(directory, ns=(when, when))
            except PermissionError:  # who may write another user's directory may set no other time than this one
                os.utime(directory)
            if directory.stat().st_mtime_ns > newest:
                return

    def _another(self) -> Path:
        """A new place for what has no digest."""
        self.place.mkdir(exist_ok=True)
        return self.place / f"{_OTHER}{time.time_ns()}"

    def _discard(self, directory: Path) -> None:
        """Delete an adapter's files, so that nobody ever sees half of it."""
        self.clear()
        self.work.mkdir(parents=True, exist_ok=True)
        directory.rename(self.junk)
        self.clear()


class DirectoryHistory:
    """Former contents of each name, in directories; see the module's docstring for the layout."""

    def __init__(self, root: Path, *, lock_s: float = LOCK_S):
        """Nothing is made or read yet.

        Args:
            root: the directory; made when it is needed, in a directory that exists.
            lock_s: how long a change waits for another one of the same name, in seconds.
        """
        self._root = root
        self._where = str(root)
        self._lock_s = lock_s

    def revisions(self, name: str) -> list[str]:
        """As History has it.

        Raises:
            SourceError: if it cannot be read.
        """
        try:
            return self._shelf(name).revisions()
        except OSError as error:
            raise SourceError(
                f"the history in {self._where} cannot be read ({error.strerror}): try again"
            ) from error

    def fetch_revision(self, name: str, digest: str, target: Path, *, max_bytes: int) -> None:
        """As History has it; a copy that has another digest is an AdapterError."""
        place = self._shelf(name).place / digest
        unknown = f"{name!r} has no former content {digest[:12]!r}: ask for the list of what there is"
        if not _DIGEST.fullmatch(digest) or not place.is_dir():
            raise NoSuchRevisionError(unknown)
        try:
            copy_adapter(place, target, max_bytes=max_bytes)
        except OSError as error:
            raise SourceError(f"{target} cannot be written ({error.strerror}): try again") from error
        except AdapterError as error:
            if not place.is_dir():
                raise NoSuchRevisionError(unknown) from error
            raise
        if digest_of(target) != digest:
            raise AdapterError(f"the former content {place} is damaged: put the adapter anew")

    def keep(self, name: str, digest: str, directory: Path) -> None:
        """As History has it."""
        if digest in self.revisions(name):
            return
        with self._changing(name) as shelf:
            shelf.keep(digest, directory)

    def prune(self, name: str, keep: int, protected: Collection[str] = ()) -> None:
        """As History has it; a directory with other files in it stays, under another name."""
        shelf = self._shelf(name)
        if shelf.place.is_dir():
            with self._changing(name) as shelf:
                shelf.prune(keep, protected)

    def _history(self) -> Path:
        """The directory now: a link to it may be turned."""
        return Path(os.path.realpath(self._root))

    def _shelf(self, name: str) -> Shelf:
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise AdapterError(f"{name!r} cannot be an adapter's name: give the name of a directory, not hidden")
        return Shelf(self._history(), name)

    @contextmanager
    def _changing(self, name: str, wait_s: float | None = None) -> Iterator[Shelf]:
        """A name's history, locked, and with what an earlier change left cleared away before and after.

        Raises:
            ReadOnlyError, SourceError: if it cannot be written.
        """
        shelf = self._shelf(name)
        with writing(self._where), shelf.locked(self._lock_s if wait_s is None else wait_s):
            try:
                self._recover(shelf)
                yield shelf
            finally:
                shelf.tidy()

    def _recover(self, shelf: Shelf) -> None:
        """Finish or undo a change that was not finished."""
        shelf.clear()


def lock_file(history: Path, lock: str) -> Path:
    """Where a lock of a history is, in directories that are made here.

    Raises:
        OSError: if they cannot be made.
    """
    if not history.is_dir():
        history.mkdir(exist_ok=True)
        sync(history.parent)
    (history / _LOCKS).mkdir(exist_ok=True)
    return history / _LOCKS / lock


def digest_if_any(directory: Path) -> str | None:
    """Of an adapter's content; None if it is not complete or cannot be read."""
    try:
        return digest_of(directory)
    except AdapterError:
        return None


def _delete_own_files(directory: Path) -> None:
    """Delete what adapters are made of; nothing happens if it is no directory."""
    for name in _OWN_FILES:
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            (directory / name).unlink()
