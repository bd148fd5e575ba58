"""A catalogue without files: its contents are what a test says they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qaa_serve.adapters import AdapterError
from qaa_serve.registry import Catalogue, Engine, Entry, Revision
from qaa_serve.sources import Listed

LISTED = Listed("1", 1000.0, 10)


def revision(name: str, digest: str = "a") -> Revision:
    """A revision whose digest is one digit, or so many."""
    digest = digest * 64 if len(digest) == 1 else digest
    return Revision(name, digest, Path("/nowhere") / name, "QAA", 4, 10, "base", {})


class Contents:
    """All contents are there."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(needed=None)
        self.source = SimpleNamespace(url="the source")
        self.kept: dict[str, list[Revision]] = {}

    async def bring(self, revision: Revision, version: str | None) -> None:
        pass

    async def history(self, name: str) -> list[str]:
        return [former.digest for former in self.kept.get(name, ())]

    async def former(self, name: str, digest: str) -> Revision:
        return next(former for former in self.kept[name] if former.digest == digest)


def make_catalogue(engine: Engine | None = None, **settings: Any) -> Catalogue:
    """One that serves nothing yet."""
    contents: Any = Contents()
    catalogue = Catalogue(contents, engine or SimpleNamespace(), **{"cache_bytes": 100, **settings})  # type: ignore[arg-type]
    catalogue.ready = True
    return catalogue


def add(catalogue: Catalogue, current: Revision, former: Iterable[Revision] = ()) -> Entry:
    """Have a name stand for a revision, with these in its history."""
    contents: Any = catalogue.contents
    contents.kept[current.name] = list(former)
    entry = catalogue.entries.get(current.name) or catalogue._enter(Entry(current.name, LISTED))
    catalogue._switch(entry, current, LISTED)
    return entry


def reject(catalogue: Catalogue, name: str, reason: str = "no") -> Entry:
    """Have a name that is refused."""
    entry = catalogue._enter(Entry(name, LISTED))
    catalogue.reject(name, AdapterError(reason))
    return entry
