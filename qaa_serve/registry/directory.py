"""The adapters directory: finding adapters in it, and following its changes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from logging import Logger, getLogger
from pathlib import Path
from typing import TypeAlias

from watchfiles import awatch

from qaa_serve.adapters import CONFIG_FILE, MAX_ADAPTER_BYTES, WEIGHTS_FILE, AdapterError, only_refusals
from qaa_serve.registry.catalogue import Catalogue
from qaa_serve.registry.revisions import Rejection, Revision, read_revision


def check_directory(directory: Path) -> None:
    """Raise AdapterError if ``directory`` is not a directory, or is itself an adapter."""
    if not directory.is_dir():
        raise AdapterError(f"--adapters {directory} is not a directory")
    if (directory / CONFIG_FILE).is_file():
        raise AdapterError(
            f"--adapters {directory} is itself an adapter; give the directory that holds adapter directories"
        )


def scan(directory: Path, *, max_bytes: int = MAX_ADAPTER_BYTES) -> tuple[list[Revision], list[Rejection]]:
    """Read every adapter directory in a directory, in the order of their names.

    Hidden directories and those that hold neither an adapter config nor weights are passed over. Whatever goes
    wrong with one of them is its rejection.

    Args:
        directory: the adapters directory.
        max_bytes: of one adapter's weights: a larger file is refused before it is read.

    Raises:
        AdapterError: if ``directory`` cannot be read, or is itself an adapter.
    """
    check_directory(directory)
    revisions: list[Revision] = []
    rejections: list[Rejection] = []
    with only_refusals(f"--adapters {directory}"):
        paths = list(_adapter_directories(directory))
    for path in paths:
        try:
            with only_refusals(f"the adapter {path.name!r}"):
                revisions.append(read_revision(path, max_bytes=max_bytes))
        except AdapterError as error:
            rejections.append(Rejection(path.name, path, str(error), error.kind))
    return revisions, rejections


def _adapter_directories(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if not path.name.startswith(".") and _looks_like_an_adapter(path):
            yield path


def _looks_like_an_adapter(path: Path) -> bool:
    try:
        return any(name == CONFIG_FILE or name.startswith("adapter_model.") for name in os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # what may not be read is an adapter that is refused


#: What changes when an adapter's directory or one of its two files does.
Signature: TypeAlias = tuple[tuple[int, ...] | None, ...]


def signature_of(path: Path) -> Signature:
    """Inode, size and modification time of an adapter's directory and files; None for what is not there."""
    parts: list[tuple[int, ...] | None] = []
    for file in (path, path / CONFIG_FILE, path / WEIGHTS_FILE):
        try:
            status = file.stat()
            parts.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode))
        except OSError:
            parts.append(None)
    if parts[0] is not None:  # of a directory, only which one it is: other files in it do not matter
        parts[0] = parts[0][:2]
    return tuple(parts)


class DirectoryWatcher:
    """Publishes what appears in a directory, and removes what goes.

    Events of the file system say when to look and whether a directory came by a rename; what is there is
    always found by looking, and everything is looked at now and then, so that a lost event, a link that was
    turned, or a file system without events only cost time.
    """

    def __init__(
        self,
        directory: Path,
        catalogue: Catalogue,
        *,
        quiet_s: float = 1.0,
        rescan_s: float = 10.0,
        logger: Logger | None = None,
    ):
        """Prepare to watch.

        Args:
            directory: the adapters directory.
            catalogue: what its adapters are published in.
            quiet_s: how long a directory must not change before it is read, in seconds.
            rescan_s: how often everything is looked at, in seconds.
            logger: where to say what happens.
        """
        self.directory = directory
        self._catalogue = catalogue
        self._quiet_s = quiet_s
        self._rescan_s = rescan_s
        self._log = logger or getLogger(__name__)
        self._handled: dict[str, Signature] = {}
        self._waiting: dict[str, tuple[Signature, float]] = {}  # name -> what was seen, and since when
        self._identity = _identity(directory)
        self._next_scan = 0.0
        self._lost = False
        self._trouble = ""

    async def publish_all(self) -> None:
        """Publish everything that is there now, without waiting for it to be quiet."""
        there = await asyncio.to_thread(lambda: list(_adapter_directories(self.directory)))
        entries = self._catalogue.entries
        from_here = [
            name for name, entry in entries.items() if entry.source == "directory" or entry.seen is not None
        ]
        if from_here and not there:
            self._note_lost("is empty, as if it were not mounted yet")
            return
        for path in there:
            await self._take(path.name, signature_of(path), final=True)
        for name in from_here:
            if name not in self._handled and name not in self._waiting:
                await self._catalogue.forget_directory(name)

    async def run(self) -> None:
        """Follow the directory until cancelled."""
        while True:
            try:
                await self._look([])
                await self._follow()
            except Exception as error:
                # The watch may fail: no such directory, no watches left. Looking still works.
                if str(error) != self._trouble:
                    self._log.warning(
                        "Watching %s: %s; looking every %.1f s", self.directory, error, self._quiet_s
                    )
                self._trouble = str(error)
            await asyncio.sleep(self._quiet_s)

    async def _follow(self) -> None:
        """Look whenever something happens, as long as the directory is the same one."""
        self._next_scan = 0.0  # what changed before the watch began is found by looking
        identity = _identity(self.directory)
        tick_ms = max(50, int(min(self._quiet_s, 1.0) * 500))
        root = self.directory.resolve()
        watch = awatch(root, watch_filter=None, step=50, rust_timeout=tick_ms, yield_on_timeout=True)
        async with aclosing(watch):
            async for changes in watch:
                await self._look([Path(path).relative_to(root) for _, path in changes])
                if _identity(self.directory) != identity:
                    return

    async def _look(self, changed: Iterable[Path]) -> None:
        """Look at what events named, at what is being waited for, and now and then at everything.

        Args:
            changed: paths within the directory.
        """
        places = [path.parts for path in changed]
        names = {parts[0] for parts in places if parts and not parts[0].startswith(".")}
        # A directory that came by a rename is there in one piece: no event speaks of a file inside it.
        whole = names - {parts[0] for parts in places if len(parts) > 1}
        names |= self._waiting.keys()
        if time.monotonic() >= self._next_scan:
            names |= await self._all_names()
        for name in sorted(names):
            await self._look_at(name, whole=name in whole)

    async def _all_names(self) -> set[str]:
        """Names of all adapters that are there, and of those that were."""
        self._next_scan = time.monotonic() + self._rescan_s
        try:
            there = await asyncio.to_thread(lambda: {path.name for path in _adapter_directories(self.directory)})
        except OSError as error:
            return self._note_lost(f"cannot be read ({error.strerror})")
        if not there and self._handled and _identity(self.directory) != self._identity:
            return self._note_lost("is another one now, and empty, as if it were not mounted")
        if self._lost:
            self._log.warning("The adapters directory %s is back", self.directory)
        self._lost, self._identity = False, _identity(self.directory)
        return there | self._handled.keys()

    def _note_lost(self, why: str) -> set[str]:
        if not self._lost:
            self._log.error(
                "The adapters directory %s %s: the adapters from it stay as they are until it is back",
                self.directory,
                why,
            )
        self._lost = True
        return set()

    async def _look_at(self, name: str, whole: bool) -> None:
        path = self.directory / name
        signature = signature_of(path)
        if signature == self._handled.get(name, _NOTHING):
            self._waiting.pop(name, None)
            return
        if signature == _NOTHING and not await self._is_gone():
            return
        seen, since = self._waiting.get(name, (None, 0.0))
        if whole and None not in signature and seen is None:
            if await self._take(name, signature, final=False):
                return
        elif seen == signature and time.monotonic() - since >= self._quiet_s:
            await self._take(name, signature, final=True)
            return
        if seen != signature:
            self._waiting[name] = (signature, time.monotonic())

    async def _is_gone(self) -> bool:
        """Whether an adapter that is not there was taken away, rather than the whole directory."""
        self._next_scan = 0.0
        await self._all_names()
        return not self._lost

    async def _take(self, name: str, signature: Signature, final: bool) -> bool:
        """Publish or remove what is there now.

        Args:
            name: the directory's name.
            signature: what it looked like; if that changes while it is read, it is waited for again.
            final: whether what is wrong with it is told; otherwise it may not be complete yet.

        Returns:
            whether that settled it.
        """
        path = self.directory / name
        rejection, temporary = None, False
        try:
            if signature == _NOTHING or not _looks_like_an_adapter(path):
                await self._catalogue.forget_directory(name)
            else:
                await self._catalogue.publish(
                    name, path, "directory", unchanged=lambda: signature_of(path) == signature
                )
        except AdapterError as error:
            rejection = Rejection(name, path, str(error), error.kind)
            temporary = error.temporary
        except Exception as error:  # unforeseen, and no reason to leave the others waiting
            self._log.exception("Reading %s", path)
            rejection = Rejection(name, path, f"reading it failed: {error!r}")
        if rejection is None:  # noted before anything else, or what happens to it meanwhile would go unnoticed
            self._note_handled(name, signature)
        if (now := signature_of(path)) != signature or (rejection is not None and not final):
            self._waiting[name] = (now, time.monotonic())
            return False
        if rejection is not None:
            self._catalogue.reject(rejection)
            self._note_handled(name, _NOTHING if temporary else signature)  # that is tried again at the next scan
        self._waiting.pop(name, None)
        return True

    def _note_handled(self, name: str, signature: Signature) -> None:
        if signature == _NOTHING:
            self._handled.pop(name, None)
        else:
            self._handled[name] = signature


_NOTHING: Signature = (None, None, None)


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
