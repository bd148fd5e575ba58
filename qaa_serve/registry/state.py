"""The state directory: one server's cache of adapters' contents. What is in it can be fetched again.

STATE/lock                held by the server that uses the directory
STATE/objects/DIGEST/     adapter_config.json and adapter_model.safetensors of one content, whatever its names
STATE/index.sqlite        what was learned of contents and their source: see the module `index`
STATE/.staging-*/         what is being fetched or uploaded now
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError, digest_of

_OBJECTS, _STAGING = "objects", ".staging-"
_DIGEST = re.compile("[0-9a-f]{64}")


class NoRoomError(AdapterError):
    """The state directory cannot take an adapter: it is full, or cannot be written."""

    kind, temporary = "store", True


class StoreError(Exception):
    """The state directory cannot be used; the message says why and what to do."""


class State:
    """Contents of adapters, each at a path of its own that no other content ever has.

    Nothing is flushed to the disk and nothing is taken on trust: a content is checked each time it is asked for.
    When there is no room, the contents go whose last use is longest ago. Any thread may call anything.

    Attributes:
        directory: STATE.
        max_bytes: of all files in it.
        needed: whether a content may be read now and must not go, by its digest. It is asked often, with a lock
            held: it has to be quick and may not call this object. A content that is needed from before it is
            added or asked for stays for as long as it is needed.
    """

    def __init__(self, directory: Path, *, max_bytes: int, needed: Callable[[str], bool] = lambda digest: False):
        """Take hold of the directory, which is made if it does not exist.

        Raises:
            StoreError: if it cannot be written, or another server uses it.
        """
        self.directory = directory.resolve()
        self.max_bytes = max_bytes
        self.needed = needed
        self._objects = self.directory / _OBJECTS
        self._mutex = threading.Lock()
        self._reserved: dict[Path, int] = {}  # bytes, by staging directory
        self._busy: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()  # by digest
        try:
            self._objects.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / "lock").open("w")
        except OSError as error:
            raise _unusable(directory, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in self.directory.glob(f"{_STAGING}*"):  # of a server that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            self._sizes = _sizes(self._objects)
        except OSError as error:
            self._lock.close()
            raise _unusable(directory, error) from error

    def close(self) -> None:
        """Let another server use the directory."""
        self._lock.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all contents, without those in staging directories."""
        with self._mutex:
            return sum(self._sizes.values())

    @contextmanager
    def staging(self, nbytes: int = 0) -> Iterator[Path]:
        """A new, empty directory to put an adapter in; what is still there at the end is deleted.

        Args:
            nbytes: that the adapter will have, as far as that is known: room is made for them now.

        Raises:
            NoRoomError: if there is no room, and in place of any OSError of what is done in it.
        """
        place = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            place = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.directory))
            with self._mutex:
                self._make_room(nbytes)
                self._reserved[place] = nbytes
            yield place
        except OSError as error:
            raise self._no_room(error) from error
        finally:
            if place is not None:
                shutil.rmtree(place, ignore_errors=True)
                with self._mutex:
                    self._reserved.pop(place, None)

    def add(self, staged: Path, digest: str) -> Path:
        """Move a staging directory to where its content belongs; if that is there already, it stays as it is.

        Args:
            staged: holds the adapter's two files and nothing else.
            digest: of its content; it is believed.

        Returns:
            where the content is.

        Raises:
            NoRoomError: if there is no room, or it cannot be written.
        """
        place = self.place(digest)
        with self._alone(digest):
            if not _intact(place, digest):
                try:
                    with self._mutex:
                        self._delete(digest)
                        self._reserved.pop(staged, None)
                        nbytes = _nbytes(staged)
                        self._make_room(nbytes)
                        self._objects.mkdir(parents=True, exist_ok=True)
                        staged.rename(place)
                        self._sizes[digest] = nbytes
                except OSError as error:
                    raise self._no_room(error) from error
            self._note_use(digest)
        return place

    def get(self, digest: str) -> Path | None:
        """Where a content is; None if it is not there, or is not what it was, in which case it is deleted.

        All of it is read to know that.
        """
        place = self.place(digest)
        with self._alone(digest):
            if _intact(place, digest):
                self._note_use(digest)
                return place
            with self._mutex:
                self._delete(digest)
        return None

    def place(self, digest: str) -> Path:
        """Where a content is, if it is there."""
        if not _DIGEST.fullmatch(digest):  # what is at a wrong path might be deleted
            raise ValueError(f"{digest!r} is no digest: 64 hex digits are needed")
        return self._objects / digest

    @contextmanager
    def _alone(self, digest: str) -> Iterator[None]:
        """Let no other thread read, replace or delete a content."""
        with self._mutex:
            lock = self._busy.setdefault(digest, threading.Lock())
        with lock:
            yield

    def _note_use(self, digest: str) -> None:
        """A content was used now: the newest is the last of `_sizes`, and after a restart by its own time."""
        place, now = self.place(digest), time.time_ns()
        with suppress(OSError):
            os.utime(place, ns=(now, now))
        with self._mutex:
            self._sizes.pop(digest, None)
            self._sizes[digest] = _nbytes(place)

    def _make_room(self, nbytes: int) -> None:
        """Delete contents until as many bytes are free; with the lock held.

        Raises:
            NoRoomError: if that is not enough; then nothing is deleted.
        """
        victims = self._victims(nbytes)
        if victims is None:  # somebody may have deleted contents, which are still counted
            self._sizes = {digest: n for digest, n in self._sizes.items() if self.place(digest).exists()}
            victims = self._victims(nbytes)
        if victims is None:
            used = sum(self._sizes.values()) + sum(self._reserved.values())
            raise NoRoomError(
                f"the state directory has {used:,} of {self.max_bytes:,} bytes in use, by adapters that are "
                f"needed now, and this one needs {nbytes:,}: unpin adapters, or start with a larger --state-bytes"
            )
        for digest in victims:
            self._delete(digest)

    def _victims(self, nbytes: int) -> list[str] | None:
        """What to delete, the longest unused first, for as many bytes to be free; None if that is not enough."""
        excess = sum(self._sizes.values()) + sum(self._reserved.values()) + nbytes - self.max_bytes
        victims = []
        for digest, size in self._sizes.items():
            if excess <= 0:
                break
            if digest not in self._busy and not self.needed(digest):
                victims.append(digest)
                excess -= size
        return victims if excess <= 0 else None

    def _delete(self, digest: str) -> None:
        """With the lock held."""
        place = self.place(digest)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:  # nothing, as a rule
            with suppress(OSError):
                place.unlink()
        self._sizes.pop(digest, None)

    def _no_room(self, error: OSError) -> NoRoomError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return NoRoomError(
            f"the adapter cannot be copied to the state directory {self.directory}: {error.strerror or error}. "
            + ("Free some space there, or give another --state-dir" if full else "Look at its permissions")
        )


def _unusable(directory: Path, error: OSError) -> StoreError:
    if isinstance(error, BlockingIOError):
        return StoreError(f"--state-dir {directory} is in use by another server: give each server its own")
    return StoreError(f"--state-dir {directory} cannot be written ({error.strerror}): give a directory that can")


def _sizes(objects: Path) -> dict[str, int]:
    """Bytes of each content by digest, in the order of their last use; what is no content is passed over."""
    found = []
    with os.scandir(objects) as entries:
        for entry in entries:
            if _DIGEST.fullmatch(entry.name):
                with suppress(OSError):
                    found.append((entry.stat().st_mtime_ns, entry.name, _nbytes(entry.path)))
    return {digest: nbytes for _, digest, nbytes in sorted(found)}


def _nbytes(place: Path | str) -> int:
    """Of the files in a directory, as far as they can be seen."""
    total = 0
    with suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            total += entry.stat().st_size
    return total


def _intact(place: Path, digest: str) -> bool:
    try:
        return sorted(os.listdir(place)) == [CONFIG_FILE, WEIGHTS_FILE] and digest_of(place) == digest
    except (AdapterError, OSError):
        return False
