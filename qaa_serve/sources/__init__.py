"""Where adapters are kept: a directory, an object store, single repositories."""

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
    "Source",
    "SourceError",
    "check_directory",
]
