"""Where adapters are kept: a directory, an object store, single repositories."""

from os.path import abspath
from pathlib import Path

from qaa_serve.sources.base import (
    HISTORY,
    SETTINGS_FILE,
    ChangedMeanwhileError,
    History,
    Listed,
    Listing,
    NoSuchRevisionError,
    ReadOnlyError,
    Source,
    SourceError,
)
from qaa_serve.sources.directory import DirectorySource, check_directory
from qaa_serve.sources.history import DirectoryHistory
from qaa_serve.sources.hub import Repository, RepositoryError, parse_repository


def open_source(url: str, *, poll_s: float = 10.0) -> Source:
    """The source that a user names: a directory, or an object store's URL.

    Args:
        url: a path, or PROTOCOL://BUCKET/PREFIX.
        poll_s: how often it is looked at without being told of a change, in seconds.

    Raises:
        AdapterError: if there is no such directory, or nothing is installed that speaks the protocol.
    """
    if "://" in url:
        from qaa_serve.sources.objects import ObjectSource

        return ObjectSource(url, poll_s=poll_s)
    directory = Path(abspath(Path(url).expanduser()))  # a link stays one: it may be turned
    check_directory(directory)
    return DirectorySource(directory, rescan_s=poll_s)


__all__ = [
    "HISTORY",
    "SETTINGS_FILE",
    "ChangedMeanwhileError",
    "DirectoryHistory",
    "DirectorySource",
    "History",
    "Listed",
    "Listing",
    "NoSuchRevisionError",
    "ReadOnlyError",
    "Repository",
    "RepositoryError",
    "Source",
    "SourceError",
    "check_directory",
    "open_source",
    "parse_repository",
]
