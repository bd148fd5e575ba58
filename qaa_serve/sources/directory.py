"""A directory of adapters.

SOURCE/NAME/              adapter_config.json and adapter_model.safetensors; hidden names are no adapters
SOURCE/.qaa-serve.json    pins and aliases
SOURCE/.revisions/        former contents: see history.py

A put makes its copy in the history's working place and exchanges it with what NAME leads to, in one step. Until
the replaced one is in the history, that place is called so that whoever comes next can tell what was going on:

swap.DIGEST[.again]       has this digest: NAME is as it was. Has another: it is what NAME was before
old.DIGEST[.again]        what NAME was, where a file system needs two steps: NAME -> old, swap -> NAME
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from logging import Logger, getLogger
from pathlib import Path

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError, copy_adapter
from qaa_serve.sources.base import (
    HISTORY,
    SETTINGS_FILE,
    ChangedMeanwhileError,
    Listed,
    Listing,
    ReadOnlyError,
    SourceError,
)
from qaa_serve.sources.disk import exchange, locked, sync, writing
from qaa_serve.sources.history import CHANGING, LOCK_S, DirectoryHistory, Shelf, digest_if_any, lock_file
from qaa_serve.sources.watch import follow

_SWAP, _OLD, _AGAIN = "swap.", "old.", ".again"
#: What a file that is not there, and one that may not be looked at, has in a version.
_MISSING, _UNREADABLE = "none", "unreadable"
#: If so many names take longer than so many seconds each, so many are looked at together.
_TRIED, _SLOW_S, _AT_ONCE = 50, 0.0005, 32
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def check_directory(directory: Path) -> None:
    """Raise AdapterError if ``directory`` is not a directory, or is itself an adapter."""
    if not directory.is_dir():
        raise AdapterError(f"--adapters {directory} is not a directory")
    if (directory / CONFIG_FILE).is_file():
        raise AdapterError(
            f"--adapters {directory} is itself an adapter; give the directory that holds adapter directories"
        )


class DirectorySource(DirectoryHistory):
    """The source that a directory is; see the module's docstring for the layout.

    The directory may be a link that is turned to another one: each call follows it anew, and then stays with what
    it found.

    Attributes:
        url: the directory's path.
        root: the same.
    """

    def __init__(
        self, root: Path, *, rescan_s: float = 10.0, lock_s: float = LOCK_S, logger: Logger | None = None
    ):
        """Nothing is made or read yet.

        Args:
            root: the directory.
            rescan_s: how often `changes` says that everything is to be looked at, in seconds.
            lock_s: how long a change waits for another one of the same name, in seconds.
            logger: where to say that the directory cannot be watched.
        """
        super().__init__(root / HISTORY, lock_s=lock_s)
        self.url = self._where = str(root)
        self.root = root
        self._rescan_s = rescan_s
        self._log = logger or getLogger(__name__)

    # ------------------------------------------------------------------------------------------------ reading

    def list(self) -> Listing:
        """As Source has it; changes that nobody finished are finished or undone first."""
        root = self._real_root()
        try:
            status = os.stat(root)
            changing = set(self._recover_all(root))
            with os.scandir(root) as entries:
                names = [entry.name for entry in entries if not entry.name.startswith(".")]
            adapters = _see_all(str(root), names)
            # Between the two steps of a replacement a name leads nowhere, and is there nonetheless.
            for name in (changing | set(_changing_in(root))) - adapters.keys():
                if found := _see_amid_change(root, name):
                    adapters[name] = found
            return Listing(adapters, f"{status.st_dev:x}:{status.st_ino:x}", _version_of_settings(root))
        except OSError as error:
            raise self._unreadable(error) from error

    def look(self, name: str) -> Listed | None:
        """As Source has it."""
        shelf = self._shelf(name)
        target = shelf.history.parent / name
        if found := _see(str(target)):
            return found
        try:
            os.stat(target.parent)
        except OSError as error:
            raise self._unreadable(error) from error
        if not shelf.work.exists():
            return _see(str(target))  # unless it was exchanged just between both looks, it is not there
        try:
            with self._changing(name, wait_s=0.0):
                pass  # whatever was left half done is not any more
        except ReadOnlyError as error:
            if _old_of(shelf):
                raise SourceError(
                    f"the adapter {name!r} is being replaced, or that was never finished: a server that may write "
                    f"{self.url} finishes it"
                ) from error
        return _see(str(target))

    def fetch(self, name: str, version: str, target: Path, *, max_bytes: int) -> None:
        """As Source has it."""
        source = self._real_root() / name
        self._check_version(name, self.look(name), version)
        try:
            copy_adapter(source, target, max_bytes=max_bytes)
        except OSError as error:
            raise SourceError(f"{target} cannot be written ({error.strerror}): try again") from error
        except AdapterError:
            self._check_version(name, self.look(name), version)
            raise
        self._check_version(name, self.look(name), version)

    def read_settings(self) -> tuple[bytes, str | None]:
        """As Source has it.

        Raises:
            SourceError: if it cannot be read.
        """
        root = self._real_root()
        try:
            with open(root / SETTINGS_FILE, "rb") as file:
                return file.read(), _version(os.fstat(file.fileno()))
        except OSError as error:
            if error.errno == errno.ENOENT and root.is_dir():  # or it may only not be mounted
                return b"", None
            raise self._unreadable(error) from error

    def changes(self) -> AsyncGenerator[Mapping[str, bool] | None, None]:
        """As Source has it: everything every `rescan_s`, and at once when a watch has begun."""
        return follow(self.root, self._rescan_s, self._log)

    # ------------------------------------------------------------------------------------------------ writing

    def put(
        self, name: str, directory: Path, digest: str, *, expected: str | None = None, again: bool = False
    ) -> Listed:
        """As Source has it; a link gives way to a directory, and what it led to stays."""
        with self._changing(name) as shelf:
            target = shelf.history.parent / name
            if expected is not None:
                self._check_version(name, _see(str(target)), expected)
            current = digest_if_any(target)
            if current != digest:
                if os.path.lexists(target):
                    self._replace(shelf, target, current, directory, digest, again)
                else:
                    self._place(shelf, target, directory, digest, again)
            if (found := _see(str(target))) is None:
                raise ChangedMeanwhileError(f"the adapter {name!r} was taken away while it was put")
            return Listed(found.version, found.changed, found.nbytes, found.complete, settled=True)

    def remove(self, name: str, *, expected: str | None = None, purge: bool = False) -> None:
        """As Source has it; nothing happens if it is not there. Of a link, what it led to stays."""
        with self._changing(name) as shelf:
            target = shelf.history.parent / name
            found = _see(str(target))
            if expected is not None:
                self._check_version(name, found, expected)
            if found is not None:
                self._keep_what_a_link_leads_to(shelf, target, digest_if_any(target), again=False)
                shelf.retire(target)
                sync(target.parent)
            if purge:
                shelf.prune(0)

    def write_settings(self, content: bytes, expected: str | None) -> str:
        """As Source has it."""
        root = self._real_root()
        place, beside = root / SETTINGS_FILE, root / f"{SETTINGS_FILE}.new"
        where = f"{self.url}/{SETTINGS_FILE}"
        with writing(where), locked(lock_file(root / HISTORY, "settings"), self._lock_s, SETTINGS_FILE):
            if _version_of_settings(root) != expected:
                raise ChangedMeanwhileError(f"{where} was changed by somebody else: read it again, then try again")
            beside.write_bytes(content)
            sync(beside)
            beside.replace(place)
            sync(root)
            return _version(os.stat(place))

    def _place(self, shelf: Shelf, target: Path, directory: Path, digest: str, again: bool) -> None:
        """Put a content where nothing is."""
        staged = shelf.staged(directory, digest)
        if not again:
            shelf.touch(digest)  # should this end before it is taken out, a step back leads to the others
        staged.rename(target)
        sync(target.parent)
        if not again:
            shelf.take_out(digest)

    def _replace(
        self, shelf: Shelf, target: Path, current: str | None, directory: Path, digest: str, again: bool
    ) -> None:
        """Put a content in the place of another, which goes to the history."""
        self._keep_what_a_link_leads_to(shelf, target, current, again)
        what = digest + (_AGAIN if again else "")
        swap, old = shelf.work / (_SWAP + what), shelf.work / (_OLD + what)
        shelf.staged(directory, digest).rename(swap)
        if exchange(swap, target):
            old = swap
        else:
            target.rename(old)
            try:
                swap.rename(target)
            except OSError:
                old.rename(target)
                raise
        sync(target.parent, shelf.work)
        self._finish(shelf, old, digest, again)

    def _keep_what_a_link_leads_to(self, shelf: Shelf, target: Path, current: str | None, again: bool) -> None:
        if target.is_symlink() and current is not None:
            shelf.keep(current, target)
            if not again:
                shelf.touch(current)

    def _finish(self, shelf: Shelf, old: Path, digest: str, again: bool) -> None:
        """Bring the history up to date after `digest` took the place of what is now `old`."""
        if not again:
            shelf.take_out(digest)
        shelf.retire(old, again=again)

    # ------------------------------------------------------------------------------ what others left half done

    def _recover(self, shelf: Shelf) -> None:
        super()._recover(shelf)
        target = shelf.history.parent / shelf.name
        for old in _old_of(shelf):
            digest, again = _parse(old)
            if (shelf.work / old.name.replace(_OLD, _SWAP, 1)).is_dir() and not os.path.lexists(target):
                old.rename(target)  # the other step was never taken
                sync(target.parent)
            else:
                self._finish(shelf, old, digest, again)
        for swap in _paths(shelf, _SWAP):
            digest, again = _parse(swap)
            if not swap.is_symlink() and digest_if_any(swap) == digest:
                swap.rename(shelf.junk)
                shelf.clear()
            else:
                self._finish(shelf, swap, digest, again)

    def _recover_all(self, root: Path) -> Collection[str]:
        """Recover every name that is not being changed in this moment; all that were found."""
        names = _changing_in(root)
        for name in names:
            with suppress(AdapterError), self._changing(name, wait_s=0.0):
                pass
        return names

    # ------------------------------------------------------------------------------------------------- details

    def _real_root(self) -> Path:
        return Path(os.path.realpath(self.root))

    def _history(self) -> Path:
        return self._real_root() / HISTORY

    def _check_version(self, name: str, found: Listed | None, expected: str) -> None:
        if expected == (found.version if found else ""):
            return
        there = "is not there any more" if found is None else "is another one now" if expected else "is there now"
        raise ChangedMeanwhileError(f"the adapter {name!r} {there}: look at it again, then try again")

    def _unreadable(self, error: OSError) -> SourceError:
        return SourceError(
            f"{self.url} cannot be read ({error.strerror}): look whether it is there, mounted, and readable for "
            "the server's user"
        )


def _see_all(root: str, names: Sequence[str]) -> dict[str, Listed]:
    """What of these is an adapter; where looking is slow, as on a network, many are looked at together."""
    found: dict[str, Listed | None] = {}
    begun, rest = time.perf_counter(), len(names)
    for count, name in enumerate(names, 1):
        found[name] = _see(f"{root}/{name}")
        if count == _TRIED and time.perf_counter() - begun > _TRIED * _SLOW_S:
            rest = count
            break
    if rest < len(names):
        with ThreadPoolExecutor(_AT_ONCE) as looking:
            found.update(
                zip(names[rest:], looking.map(_see, (f"{root}/{name}" for name in names[rest:])), strict=True)
            )
    return {name: listed for name, listed in found.items() if listed is not None}


def _see(path: str) -> Listed | None:
    """What a directory holds of an adapter; None if it is none.

    This is asked for each of a hundred thousand: three looks, and no objects for paths.
    """
    try:
        directory = os.stat(path)
        if not stat.S_ISDIR(directory.st_mode):
            return None
        files = [_stat_if_any(f"{path}/{CONFIG_FILE}"), _stat_if_any(f"{path}/{WEIGHTS_FILE}")]
        if files == [None, None] and not any(name.startswith("adapter_model.") for name in os.listdir(path)):
            return None
    except OSError as error:
        return None if error.errno in _NOT_THERE else Listed(_UNREADABLE, 0.0, 0, complete=False)
    parts = [_MISSING if file is None else _version(file) for file in files]
    weights = files[1]
    return Listed(
        version=":".join([f"{directory.st_ino:x}", *parts]),
        changed=max((file.st_mtime for file in files if file is not None), default=directory.st_mtime),
        nbytes=0 if weights is None else weights.st_size,
        complete=None not in files,
    )


def _stat_if_any(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise


def _version(file: os.stat_result) -> str:
    """Changes when a file does; the same on all machines, as the number of a device is not."""
    return f"{file.st_size:x}:{file.st_mtime_ns:x}:{file.st_ino:x}"


def _version_of_settings(root: Path) -> str | None:
    file = _stat_if_any(f"{root}/{SETTINGS_FILE}")
    return None if file is None else _version(file)


def _changing_in(root: Path) -> list[str]:
    """Names that are being changed, or were when a process died."""
    try:
        return [name for name in os.listdir(root / HISTORY / CHANGING) if not name.startswith(".")]
    except OSError:
        return []


def _see_amid_change(root: Path, name: str) -> Listed | None:
    """What a name has, or had if it is between the two steps of a replacement."""
    shelf = Shelf(root / HISTORY, name)
    for path in (root / name, *_old_of(shelf), root / name):
        if found := _see(str(path)):
            return found
    return None


def _old_of(shelf: Shelf) -> list[Path]:
    return _paths(shelf, _OLD)


def _paths(shelf: Shelf, prefix: str) -> list[Path]:
    try:
        return [shelf.work / name for name in os.listdir(shelf.work) if name.startswith(prefix)]
    except FileNotFoundError:
        return []


def _parse(path: Path) -> tuple[str, bool]:
    """The digest that was put, and whether it was put again, from swap.DIGEST or old.DIGEST."""
    what = path.name.partition(".")[2]
    return what.removesuffix(_AGAIN), what.endswith(_AGAIN)
