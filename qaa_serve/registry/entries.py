"""What one name stands for, what may be asked of it before it is changed, and what can be wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qaa_serve.adapters import AdapterError
from qaa_serve.registry.revisions import Rejection, Revision
from qaa_serve.sources import ChangedMeanwhileError, Listed

State = Literal["known", "served", "rejected"]


class UnknownAdapterError(AdapterError):
    """There is no such adapter, or no such revision of it."""


class AmbiguousRevisionError(UnknownAdapterError):
    """Several revisions begin with the digits that were given."""


class InUseError(AdapterError):
    """The name is needed by something else."""


class UnavailableError(AdapterError):
    """The adapter is served, but cannot be brought into the engine now.

    Attributes:
        retry_after_s: when to ask again, in seconds.
    """

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Entry:
    """What one name stands for.

    Attributes:
        name: the public name.
        listed: what the source has that `current` or `rejection` came of, or that nobody has asked for yet; None:
            it did not come from the source.
        current: what is served; None until it is checked, or if nothing of it was ever valid.
        rejection: why the newest content is not served.
        last_used: Unix time of the last request.
        history: digests of former contents, the oldest first, as the source last said; None: not asked yet.
        history_read: when that was, by the monotonic clock.
        former: those of them that were asked for, by digest.
        put_at: when this server put its content, by the monotonic clock.
        new: it came while the server ran, and that has not been told yet.
    """

    name: str
    listed: Listed | None
    current: Revision | None = None
    rejection: Rejection | None = None
    last_used: float | None = None
    history: list[str] | None = None
    history_read: float = 0.0
    former: dict[str, Revision] | None = None
    put_at: float = 0.0
    new: bool = False

    @property
    def state(self) -> State:
        """Whether it is served, refused, or known and not checked yet."""
        return "served" if self.current is not None else "rejected" if self.rejection is not None else "known"

    @property
    def published(self) -> float | None:
        """Unix time at which its content came into the source."""
        return None if self.listed is None else self.listed.changed

    def revisions(self) -> list[Revision]:
        """The current one, then the former ones that were asked for."""
        former = [revision for revision in (self.former or {}).values() if revision != self.current]
        return former if self.current is None else [self.current, *former]


@dataclass(frozen=True)
class Condition:
    """What must be so for a change to be made: HTTP's If-Match and If-None-Match.

    Attributes:
        digests: beginnings of digests, of which the current content must have one; None: whatever it is.
        exists: whether there must be an adapter of the name; None: whatever.
    """

    digests: frozenset[str] | None = None
    exists: bool | None = None

    def expected(self, entry: Entry | None) -> str | None:
        """The version that the source must have; "" for none, None for any.

        Raises:
            ChangedMeanwhileError: if what is served is not what it must be.
        """
        current = None if entry is None else entry.current
        if self.exists is False and entry is not None:
            raise ChangedMeanwhileError(f"there is an adapter {entry.name!r} already")
        if self.exists and entry is None:
            raise ChangedMeanwhileError("there is no such adapter")
        if self.digests is not None and (current is None or not current.digest.startswith(tuple(self.digests))):
            found = "nothing" if current is None else current.revision
            raise ChangedMeanwhileError(f"what is served is {found}: look at it, and send the change anew")
        if self.digests is None and self.exists is None:
            return None
        return "" if entry is None or entry.listed is None else entry.listed.version


#: Whatever is there.
ANY = Condition()
