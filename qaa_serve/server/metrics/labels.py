"""Who has a label of its own: a bounded number of names, so that the number of series is bounded."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable
from itertools import islice

#: Labels of requests that name no model that is served, and of names that have no label of their own.
UNKNOWN, OTHER = "unknown", "other"

#: Names that are labels already. Whoever is called so never gets a label of its own and counts as `other`: its
#: requests would be mixed with those of others, and their series would end when it is displaced.
RESERVED = frozenset({UNKNOWN, OTHER})

#: How long a name must not have been seen to lose its label to a new one, in seconds.
DISPLACED_AFTER_S = 3600.0


class BoundedLabels:
    """Which names have a label of their own: at most so many, the busiest.

    A name that has become clearly busier than the least busy labelled one takes its place: that one's series
    end, and what is counted of it later counts as `other`. Every series so only ever grows.

    Only the event loop's thread counts; any thread may ask.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._labelled: Tally[str] = Tally()
        self._others: Tally[str] = Tally()

    def seen(self, name: str) -> str | None:
        """Count a request for a name; the name whose place it has taken, if any."""
        if name in RESERVED:
            return None
        if name in self._labelled or len(self._labelled) < self.limit:
            self._labelled[name] += 1
            return None
        self._others[name] += 1
        if len(self._others) > 10 * self.limit + 100:  # bounded, whatever names come
            self._others = Tally(dict(self._others.most_common(5 * self.limit + 50)))
        if not self.limit:
            return None
        least, count = min(self._labelled.items(), key=lambda item: item[1])
        if self._others[name] <= 1.5 * count + 10:
            return None
        # Out first, then in: whoever asks meanwhile never finds one too many.
        self._others[least] = self._labelled.pop(least)
        self._labelled[name] = self._others.pop(name)
        return least

    def of(self, name: str) -> str:
        """A name's label now; asking changes nothing."""
        return name if name in self._labelled else OTHER

    def with_room_for(self, names: Iterable[str]) -> frozenset[str]:
        """The names that have a label of their own, and as many of these as there is room for beside them.

        A name that exists is so shown before anything is asked of it, and gives way to one that is.
        """
        labelled = list(self._labelled)
        room = self.limit - len(labelled)
        known = {*labelled, *RESERVED}
        return frozenset([*labelled, *islice((name for name in names if name not in known), max(room, 0))])


class RecentLabels:
    """Which names have a label of their own where few are in use at a time: at most so many, the first to come.

    When all are taken, a new name takes the label of the one that was not seen for longest, whose series end; but
    not within the hour, or names that are all in use would end each other's series.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._last_s: dict[str, float] = {}  # when each was seen, the longest ago first

    def seen(self, name: str, now_s: float) -> tuple[str, str | None]:
        """A name's label, and the name whose place it has taken, if any.

        Args:
            name: that was seen.
            now_s: by a clock that never goes back, in seconds.
        """
        displaced = None
        if name not in self._last_s and len(self._last_s) >= self._limit:
            oldest, last_s = next(iter(self._last_s.items()))
            if now_s - last_s < DISPLACED_AFTER_S:
                return OTHER, None
            del self._last_s[oldest]
            displaced = oldest
        self._last_s.pop(name, None)
        self._last_s[name] = now_s
        return name, displaced
