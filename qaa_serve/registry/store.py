"""The revision store: private, immutable copies of the adapters that were found valid.

STATE/lock                       held by the server that uses the directory
STATE/state.json                 which revision each name stands for, over restarts
STATE/revisions/NAME@DIGEST/     adapter_config.json and adapter_model.safetensors; DIGEST has 64 hex digits, or 12
                                 if an older version wrote it
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from qaa_serve.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterError,
    LinearWidths,
    copy_adapter,
    digest_of,
    only_refusals,
)
from qaa_serve.registry.revisions import Revision, read_revision

_STATE_FILE, _STATE_VERSION, _COPIES = "state.json", 1, "revisions"


class NoRoomError(AdapterError):
    """The store cannot take an adapter: it is full, or cannot be written."""

    kind, temporary = "store", True


class StoreError(Exception):
    """The state directory cannot be used; the message says why and what to do."""


class RevisionStore:
    """Copies of adapters that nobody else changes; see the module's docstring for the layout.

    Adapters are checked after they were copied, so what is served is what was checked, whatever happens to the
    directory they came from.
    """

    def __init__(
        self, directory: Path, *, max_bytes: int, max_adapter_bytes: int, base: LinearWidths | None = None
    ):
        """Take hold of the directory.

        Args:
            directory: made if it does not exist.
            max_bytes: of all weights in the store.
            max_adapter_bytes: of one adapter's weights.
            base: the base model's linear layers, which QAA adapters must fit; None leaves that to the engine.

        Raises:
            StoreError: if it cannot be written, or another server uses it.
        """
        self.directory = directory
        self.max_bytes = max_bytes
        self.max_adapter_bytes = max_adapter_bytes
        self.base = base
        self._revisions = directory / _COPIES
        self._counting = threading.Lock()
        try:
            self._revisions.mkdir(parents=True, exist_ok=True)
            self._lock = (directory / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"--state-dir {directory} is in use by another server: give each server its own"
            ) from error
        except OSError as error:
            raise StoreError(
                f"--state-dir {directory} cannot be written ({error.strerror}): give a directory that can"
            ) from error
        for leftover in (*self._revisions.glob(".*"), *directory.glob(".upload-*")):  # of a server that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        # Counted anew only when it says that the store is full: looking at thousands of copies takes long.
        self._used = self.nbytes()

    def close(self) -> None:
        """Let another server use the directory."""
        self._lock.close()

    @only_refusals("the adapter")
    def admit(self, source: Path, name: str) -> Revision:
        """Copy an adapter into the store and check the copy; several threads may, each for another name.

        Raises:
            AdapterError: if it cannot be served, or there is no room; the store is as it was then.
        """
        try:
            self._revisions.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            copy = Path(tempfile.mkdtemp(prefix=".incoming-", dir=self._revisions))
        except OSError as error:
            raise self._no_room(error) from error
        try:
            copy_adapter(source, copy, max_bytes=self.max_adapter_bytes)
            revision = self._judged(copy, name, origin=source)
            for place in self._places(name, revision.digest):
                if place.exists() and _intact(place, revision.digest):
                    return self._at(revision, place)
            place, _ = self._places(name, revision.digest)
            shutil.rmtree(place, ignore_errors=True)  # a damaged one
            with self._counting:
                if self._used + revision.nbytes > self.max_bytes:
                    self._used = self.nbytes()
                if self._used + revision.nbytes > self.max_bytes:
                    raise NoRoomError(
                        f"the revision store has {self._used:,} of {self.max_bytes:,} bytes in use and the "
                        f"adapter needs {revision.nbytes:,}: delete adapters, or start with a larger --state-bytes"
                    )
                for name in (CONFIG_FILE, WEIGHTS_FILE):
                    _sync(copy / name)
                copy.rename(place)
                _sync(self._revisions)
                self._used += revision.nbytes
            return self._at(revision, place)
        except OSError as error:
            raise self._no_room(error) from error
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def recall(self, name: str, digest: str) -> Revision:
        """A revision that an earlier server left, checked anew.

        Args:
            name: the adapter's public name.
            digest: of its content.

        Raises:
            AdapterError: if it is gone or no longer what it was.
        """
        place, older = self._places(name, digest)
        return self._read(place if place.exists() or not older.exists() else older, name, digest)

    def remove(self, revision: Revision) -> None:
        """Delete a revision's files; nothing happens if they are gone already."""
        if revision.path.exists():
            with self._counting:
                self._used -= revision.nbytes
        shutil.rmtree(revision.path, ignore_errors=True)

    def copies(self) -> dict[str, list[str]]:
        """Digests of what is there, by name, the newest last; nothing is checked."""
        found: dict[str, list[str]] = {}
        for path in sorted(self._revisions.glob("[!.]*@*"), key=lambda path: path.stat().st_mtime_ns):
            name, _, digest = path.name.partition("@")
            found.setdefault(name, []).append(digest)
        return found

    def keep_only(self, mentioned: Iterable[tuple[str, str]]) -> None:
        """Delete all copies but those of these (name, digest)."""
        kept = {place.name for name, digest in mentioned for place in self._places(name, digest)}
        for path in self._revisions.glob("*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
        self._used = self.nbytes()

    def nbytes(self) -> int:
        """Bytes of all weights in the store, without those that are still being checked."""
        total = 0
        for path in self._revisions.glob(f"[!.]*/{WEIGHTS_FILE}"):
            try:
                total += path.stat().st_size
            except OSError:  # removed meanwhile
                continue
        return total

    def read_state(self) -> dict[str, Any] | None:
        """The adapters that `write_state` wrote last, by name; None if there is none that this version reads."""
        try:
            state = json.loads((self.directory / _STATE_FILE).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
            return None
        adapters = state.get("adapters")
        return adapters if isinstance(adapters, dict) else None

    def set_state_aside(self) -> Path | None:
        """Move a state that cannot be read out of the way; None if there is none.

        Raises:
            OSError: if it cannot be moved.
        """
        state = self.directory / _STATE_FILE
        if not state.exists():
            return None
        aside = state.with_name(f"{_STATE_FILE}.unreadable-{time.time_ns()}")
        state.rename(aside)
        return aside

    def write_state(self, adapters: dict[str, Any]) -> None:
        """Replace the state in one step; when this returns it is on the disk.

        Args:
            adapters: by name.

        Raises:
            OSError: if it cannot be written; the old one stays.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        beside = self.directory / f".{_STATE_FILE}"
        state = {"version": _STATE_VERSION, "adapters": adapters}
        beside.write_text(json.dumps(state, indent=1), encoding="utf-8")
        _sync(beside)
        beside.replace(self.directory / _STATE_FILE)
        _sync(self.directory)

    def _judged(self, directory: Path, name: str, origin: Path | None = None) -> Revision:
        return read_revision(directory, name, origin=origin, base=self.base, max_bytes=self.max_adapter_bytes)

    def _at(self, revision: Revision, place: Path) -> Revision:
        return replace(revision, path=place.resolve())

    def _places(self, name: str, digest: str) -> tuple[Path, Path]:
        """Where a revision's copy is, and where an older version put it."""
        return self._revisions / f"{name}@{digest}", self._revisions / f"{name}@{digest[:12]}"

    def _read(self, place: Path, name: str, digest: str) -> Revision:
        """A copy, checked anew; of its digest at least the first 12 hex digits are known."""
        revision = self._judged(place, name)
        if not revision.digest.startswith(digest):
            raise AdapterError(f"the copy {place.name} in the revision store is damaged")
        return revision

    def _no_room(self, error: OSError) -> NoRoomError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return NoRoomError(
            f"the adapter cannot be copied to the state directory {self.directory}: {error.strerror or error}. "
            + ("Free some space there, or give another --state-dir" if full else "Look at its permissions")
        )


def revisions_left(state: Path, max_adapter_bytes: int) -> list[Revision]:
    """The valid revisions that an earlier server left in a state directory; nothing is locked."""
    found = []
    for path in sorted((state / _COPIES).glob("[!.]*@*")):
        name, _, digest = path.name.partition("@")
        with suppress(AdapterError):
            revision = read_revision(path, name, max_bytes=max_adapter_bytes)
            if revision.digest.startswith(digest):
                found.append(revision)
    return found


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _intact(place: Path, digest: str) -> bool:
    try:
        return sorted(os.listdir(place)) == [CONFIG_FILE, WEIGHTS_FILE] and digest_of(place) == digest
    except (AdapterError, OSError):
        return False
