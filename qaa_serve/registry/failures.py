"""Loads that failed: each is remembered, so that what is broken is not asked of the engine over and over."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from qaa_serve.adapters import AdapterError

K = TypeVar("K", bound=Hashable)

#: The longest that a failed load is not tried again, in seconds; the first pause is of one second.
MAX_PAUSE_S = 60.0

#: Failures that are remembered; the oldest is forgotten first.
MAX_REMEMBERED = 1024


@dataclass
class _Failure:
    error: AdapterError
    pause_s: float
    until: float


class Failures(Generic[K]):
    """What failed, why, and how long each is not tried again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._failures: OrderedDict[K, _Failure] = OrderedDict()

    def note(self, key: K, error: AdapterError) -> None:
        """A load has failed; each time in turn the pause is twice as long, up to a minute."""
        before = self._failures.pop(key, None)
        pause_s = 1.0 if before is None else min(2 * before.pause_s, MAX_PAUSE_S)
        # A copy has no traceback, whose frames would be kept as long, with all that was being read in them.
        self._failures[key] = _Failure(copy.copy(error), pause_s, self._clock() + pause_s)
        if len(self._failures) > MAX_REMEMBERED:
            self._failures.popitem(last=False)

    def forget(self, key: K) -> None:
        """A load has succeeded."""
        self._failures.pop(key, None)

    def pause_s(self, key: K) -> float:
        """Seconds that are left until it is tried again; 0 if it may be now."""
        failure = self._failures.get(key)
        return 0.0 if failure is None else max(failure.until - self._clock(), 0.0)

    def check(self, key: K) -> None:
        """Raise the remembered error if it is not to be tried now."""
        if self.pause_s(key):
            raise copy.copy(self._failures[key].error)  # or each raise would hang another traceback on it
