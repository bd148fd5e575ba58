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

__all__ = [
    "HISTORY",
    "SETTINGS_FILE",
    "ChangedMeanwhileError",
    "History",
    "Listed",
    "Listing",
    "NoSuchRevisionError",
    "ReadOnlyError",
    "Source",
    "SourceError",
]
