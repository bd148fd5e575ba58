"""Public adapter names, the revisions behind them, and where those come from."""

from qaa_serve.registry.cache import (
    CacheFullError,
    Engine,
    EngineCache,
    EngineRefusedError,
    LoadTimeoutError,
    Observer,
    Result,
)
from qaa_serve.registry.catalogue import (
    AmbiguousRevisionError,
    Catalogue,
    Entry,
    NotWrittenError,
    UnavailableError,
    UnknownAdapterError,
)
from qaa_serve.registry.directory import DirectoryWatcher, check_directory, scan
from qaa_serve.registry.revisions import (
    NAME_PATTERN,
    Ids,
    Rejection,
    Revision,
    check_name,
    public_form,
    read_revision,
)
from qaa_serve.registry.store import RevisionStore, StoreError, revisions_left

__all__ = [
    "NAME_PATTERN",
    "AmbiguousRevisionError",
    "CacheFullError",
    "Catalogue",
    "DirectoryWatcher",
    "Engine",
    "EngineCache",
    "EngineRefusedError",
    "Entry",
    "Ids",
    "LoadTimeoutError",
    "NotWrittenError",
    "Observer",
    "Rejection",
    "Result",
    "Revision",
    "RevisionStore",
    "StoreError",
    "UnavailableError",
    "UnknownAdapterError",
    "check_directory",
    "check_name",
    "public_form",
    "read_revision",
    "revisions_left",
    "scan",
]
