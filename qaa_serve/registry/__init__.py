"""Public adapter names, the revisions behind them, and what follows where they are kept.

revisions  one content of one adapter: its names, its id
state      STATE: checked copies of contents
index      STATE: what is known of contents, so that a start reads nothing
threads    what blocks runs beside the event loop, within time limits
contents   from the source to a checked copy, and back
settings   pins and aliases
failures   what failed, and when it is tried again
cache      which revisions the engine holds
entries    what one name stands for
catalogue  what each name stands for
follower   tells the catalogue what the source has
"""

from qaa_serve.registry.cache import (
    CacheFullError,
    Engine,
    EngineCache,
    EngineRefusedError,
    LoadTimeoutError,
    Observer,
    Result,
)
from qaa_serve.registry.catalogue import Catalogue
from qaa_serve.registry.contents import Contents, Fill
from qaa_serve.registry.entries import (
    AmbiguousRevisionError,
    Condition,
    Entry,
    InUseError,
    UnavailableError,
    UnknownAdapterError,
)
from qaa_serve.registry.follower import Follower
from qaa_serve.registry.index import Index, Verdict, base_fingerprint
from qaa_serve.registry.revisions import (
    NAME_PATTERN,
    Ids,
    NameRefusedError,
    Rejection,
    Revision,
    check_name,
    check_reference,
    public_form,
    read_revision,
)
from qaa_serve.registry.settings import Alias, SettingsError, SourceSettings
from qaa_serve.registry.state import NoRoomError, State, StoreError

__all__ = [
    "NAME_PATTERN",
    "Alias",
    "AmbiguousRevisionError",
    "CacheFullError",
    "Catalogue",
    "Condition",
    "Contents",
    "Engine",
    "EngineCache",
    "EngineRefusedError",
    "Entry",
    "Fill",
    "Follower",
    "Ids",
    "InUseError",
    "Index",
    "LoadTimeoutError",
    "NameRefusedError",
    "NoRoomError",
    "Observer",
    "Rejection",
    "Result",
    "Revision",
    "SettingsError",
    "SourceSettings",
    "State",
    "StoreError",
    "UnavailableError",
    "UnknownAdapterError",
    "Verdict",
    "base_fingerprint",
    "check_name",
    "check_reference",
    "public_form",
    "read_revision",
]
