"""Loads that failed: each is remembered, so that what is broken is not asked of the engine over and over."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from qaa_serve.adapters import AdapterError
from qaa_serve.registry.revisions import Revision

#: The longest that a failed load is not tried again, in seconds; the first pause is of one second.
MAX_PAUSE_S = 60.0

#: Failures that are remembered; the oldest is forgotten first.
MAX_REMEMBERED = 1024


@dataclass
class _Failure:
    error: AdapterError
    pause_s: float
    until: float


class Failures:
    """Which revisions failed to load, why, and how long each is not tried again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._failures: OrderedDict[Revision, _Failure] = OrderedDict()

    def note(self, revision: Revision, error: AdapterError) -> None:
        """A load has failed; each time in turn the pause is twice as long, up to a minute."""
        before = self._failures.pop(revision, None)
        pause_s = 1.0 if before is None else min(2 * before.pause_s, MAX_PAUSE_S)
        self._failures[revision] = _Failure(error, pause_s, self._clock() + pause_s)
        if len(self._failures) > MAX_REMEMBERED:
            self._failures.popitem(last=False)

    def forget(self, revision: Revision) -> None:
        """A load has succeeded."""
        self._failures.pop(revision, None)

    def pause_s(self, revision: Revision) -> float:
        """Seconds that are left until a revision is tried again; 0 if it may be now."""
        failure = self._failures.get(revision)
        return 0.0 if failure is None else max(failure.until - self._clock(), 0.0)

    def check(self, revision: Revision) -> None:
        """Raise the remembered error if a revision is not to be tried now."""
        if self.pause_s(revision):
            raise copy.copy(self._failures[revision].error)  # tracebacks are hung on what is raised
