"""What every source of adapters can do.

A source is where adapters are kept, with their history and what goes with them; what is in it is what is served.
Any number of servers follow one source, and a change that one of them makes in it reaches all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qaa_serve.adapters import AdapterError

#: A file of a source with its pins and aliases.
SETTINGS_FILE = ".qaa-serve.json"

#: Where a source keeps former contents: .revisions/NAME/DIGEST/
HISTORY = ".revisions"


class SourceError(AdapterError):
    """The source cannot be read or written now; it may be another time."""

    kind, temporary = "source", True


class ReadOnlyError(AdapterError):
    """The source cannot be written by this server."""

    kind = "source"


class ChangedMeanwhileError(AdapterError):
    """What was to be read or replaced is not there any more: somebody was faster."""

    kind, temporary = "source", True


class NoSuchRevisionError(AdapterError):
    """There is no such content in the history."""

    kind = "source"


@dataclass(frozen=True, slots=True)
class Listed:
    """What a source has under a name, as far as that is seen without reading it.

    Attributes:
        version: changes whenever the content may have; the same for all servers that look at one source.
        changed: Unix time of its last change.
        nbytes: of its weights; in a listing it may be more, those of the largest content in its history.
        complete: whether both files of an adapter are there.
        settled: it was put there in one step, so it need not be watched for a while before it is read.
    """

    version: str
    changed: float
    nbytes: int
    complete: bool = True
    settled: bool = False


@dataclass(frozen=True)
class Listing:
    """All that a source has.

    Attributes:
        adapters: by name.
        identity: of the directory or bucket: an empty one with another identity is one that is not mounted.
        settings: version of SETTINGS_FILE; None if there is none.
    """

    adapters: Mapping[str, Listed]
    identity: str
    settings: str | None = None


class History(Protocol):
    """Former contents of each name. Everything here may take long: it is called in threads."""

    def revisions(self, name: str) -> list[str]:
        """Digests of what is kept of a name, in the order in which it was last served, the oldest first.

        A content that was gone back to stays at its place, so that one can go back further from there.
        """

    def fetch_revision(self, name: str, digest: str, target: Path, *, max_bytes: int) -> None:
        """Copy a former content's two files into an empty directory.

        Raises:
            NoSuchRevisionError: if it is not kept.
            AdapterError: if it cannot be copied.
        """

    def keep(self, name: str, digest: str, directory: Path) -> None:
        """Add a content, which somebody has replaced by hand, as the newest; nothing happens if it is there.

        Raises:
            ReadOnlyError, SourceError: if it cannot be written.
        """

    def prune(self, name: str, keep: int, protected: Collection[str] = ()) -> None:
        """Delete the oldest contents beyond a number, but none of the `protected` digests, which do not count.

        Of a directory only an adapter's own files are deleted.
        """


class Source(History, Protocol):
    """A place with adapters. Everything but `changes` may take long: it is called in threads, several at once.

    Attributes:
        url: what people call it.
    """

    url: str

    def list(self) -> Listing:
        """All adapters that are there now; what has neither a config nor weights is passed over.

        One that is replaced while this looks may be missing: only `look` tells that it is gone.

        Raises:
            SourceError: if it cannot be read.
        """

    def look(self, name: str) -> Listed | None:
        """One of them; None if there is none.

        Raises:
            SourceError: if it cannot be read, or is being replaced in this moment.
        """

    def fetch(self, name: str, version: str, target: Path, *, max_bytes: int) -> None:
        """Copy an adapter's two files into an empty directory.

        Raises:
            ChangedMeanwhileError: if it is not of this version any more, before or after it was copied.
            AdapterError: if it cannot be copied.
        """

    def put(
        self, name: str, directory: Path, digest: str, *, expected: str | None = None, again: bool = False
    ) -> Listed:
        """Put a content in the place of what is there, which goes to the history.

        When this returns it is durable. If the process dies on the way, the old or the new content is there,
        whole, and nothing stays behind that a later change does not clear away.

        Args:
            name: the adapter.
            directory: holds the two files; it is only read.
            digest: of its content.
            expected: the version that must be there now; "" for none; None does not ask.
            again: it is one of the history's and keeps its place there: a step back.

        Raises:
            ChangedMeanwhileError: if something else than `expected` is there.
            ReadOnlyError, SourceError: if it cannot be written.
        """

    def remove(self, name: str, *, expected: str | None = None, purge: bool = False) -> None:
        """Move an adapter to its history; purged, its history is deleted too.

        Raises:
            ChangedMeanwhileError: if something else than `expected` is there.
            ReadOnlyError, SourceError: if it cannot be written.
        """

    def read_settings(self) -> tuple[bytes, str | None]:
        """SETTINGS_FILE's content and version; b"" and None if there is none."""

    def write_settings(self, content: bytes, expected: str | None) -> str:
        """Replace SETTINGS_FILE in one step if it is still of the expected version; returns the new version.

        Raises:
            ChangedMeanwhileError: if it is not.
            ReadOnlyError, SourceError: if it cannot be written.
        """

    def changes(self) -> AsyncIterator[Mapping[str, bool] | None]:
        """What to look at, as it happens, for as long as anybody listens; never raises.

        Yields:
            names that may have changed, with whether each seems to have come in one step; an empty mapping if only
            SETTINGS_FILE may have; None: everything.
        """
