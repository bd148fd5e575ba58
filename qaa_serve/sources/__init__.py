"""Where adapters are kept: a directory, an object store, single repositories."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from qaa_serve.sources.objects import ObjectSource

__all__ = [
    "HISTORY",
    "SETTINGS_FILE",
    "ChangedMeanwhileError",
    "History",
    "Listed",
    "Listing",
    "NoSuchRevisionError",
    "ObjectSource",
    "ReadOnlyError",
    "Source",
    "SourceError",
]


def __getattr__(name: str) -> Any:
    if name == "ObjectSource":  # only who uses it needs its libraries
        from qaa_serve.sources.objects import ObjectSource

        return ObjectSource
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
