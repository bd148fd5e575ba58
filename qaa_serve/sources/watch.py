"""Following what happens in a directory.

Events of the file system say when to look; everything is to be looked at now and then besides, so that a lost
event, a link that was turned, or a file system without events only cost time.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing, suppress
from logging import Logger
from pathlib import Path
from typing import TypeAlias

from qaa_serve.sources.base import SETTINGS_FILE

#: What a listener is told: see Source.changes.
Changed: TypeAlias = Mapping[str, bool] | None

#: Bytes of one line of the watcher's.
_LONGEST_LINE = 1 << 28

#: How long until it is noticed that the directory is another one, in seconds.
_TICK_S = 0.5


async def follow(root: Path, rescan_s: float, log: Logger) -> AsyncGenerator[Changed, None]:
    """What to look at in a directory, as Source.changes has it.

    Args:
        root: the directory, or a link to it, which may be turned.
        rescan_s: how often everything is to be looked at, in seconds.
        log: where to say that it cannot be watched; once for each reason.
    """
    trouble = ""
    while True:
        try:
            async with aclosing(_watched(root, rescan_s)) as changes:
                async for changed in changes:
                    trouble = ""
                    yield changed
            continue  # it is another directory now
        except Exception as error:  # no such directory, no watches left, and whatever else: looking still works
            if str(error) != trouble:
                log.warning("Watching %s: %s; looking every %.0f s instead", root, error, rescan_s)
            trouble = str(error)
        yield None
        await asyncio.sleep(rescan_s)


async def _watched(root: Path, rescan_s: float) -> AsyncGenerator[Changed, None]:
    """The same, as long as the directory is the same one and can be watched."""
    place = await asyncio.to_thread(_place_of, root)
    watcher = await start_watcher(place[0])
    assert watcher.stdout is not None
    line = asyncio.ensure_future(watcher.stdout.readline())
    begun, next_look = False, 0.0
    try:
        while True:
            await asyncio.wait((line,), timeout=min(_TICK_S, rescan_s))
            if await asyncio.to_thread(_place_of, root) != place:
                return
            if line.done():
                if not line.result():
                    raise OSError(await _reason_of(watcher))
                batch = json.loads(line.result())
                for changed in _read((Path(path).relative_to(place[0]).parts, there) for path, there in batch):
                    yield changed
                if not begun:
                    begun, next_look = True, 0.0  # what changed before is found by looking
                line = asyncio.ensure_future(watcher.stdout.readline())
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + rescan_s
                yield None
    finally:
        line.cancel()
        if watcher.returncode is None:
            with suppress(ProcessLookupError):
                watcher.kill()
        with suppress(asyncio.CancelledError):
            await line
        await watcher.communicate()  # and so its pipes are closed


async def start_watcher(directory: str) -> asyncio.subprocess.Process:
    """A process that tells of events below a directory; see watcher.py."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-P", str(Path(__file__).with_name("watcher.py")), directory,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        limit=_LONGEST_LINE,
    )  # fmt: skip


async def _reason_of(watcher: asyncio.subprocess.Process) -> str:
    """Why a watcher has ended."""
    assert watcher.stderr is not None
    lines = (await watcher.stderr.read()).decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "the watcher has ended")


def _read(events: Iterable[tuple[tuple[str, ...], bool]]) -> list[Changed]:
    """What a batch of events tells.

    Args:
        events: parts of each path within the directory, and whether something is there.
    """
    places = {parts: there for parts, there in events if parts}
    names = {parts[0] for parts in places if not parts[0].startswith(".")}
    # A directory that came by a rename is there in one piece: no event speaks of a new file inside it. What is
    # deleted may be the one it replaced, which is still called by its former name.
    touched = {parts[0] for parts, there in places.items() if there and len(parts) > 1}
    found: list[Changed] = []
    if names:
        found.append({name: name not in touched for name in sorted(names)})
    if (SETTINGS_FILE,) in places:
        found.append({})
    if any(len(parts) == 1 and parts[0].startswith("..") for parts in places):
        found.append(None)  # Kubernetes turns ..data in a volume, where all names lead through it
    return found


def _place_of(root: Path) -> tuple[str, int, int]:
    """Which directory a path leads to.

    Raises:
        OSError: if it leads to none.
    """
    place = os.path.realpath(root)
    status = os.stat(place)
    return place, status.st_dev, status.st_ino
