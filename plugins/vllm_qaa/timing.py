"""How long circuits take in the worker, sampled: one layer's circuits in one of many steps."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

#: Seconds. A layer's circuits take from tens of microseconds to tenths of a second.
BOUNDS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)

#: One call in so many is timed. A prime, so that it is not always the same layer's.
EVERY = 61


_NOTHING = nullcontext()


class CircuitTimer:
    """A histogram of the time of a layer's circuits.

    On a GPU two events are recorded around them and read at the next sample, so that nothing waits for the device.
    """

    def __init__(self, backend: str = "torch"):
        self.backend = backend
        self._calls = 0
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum_s = 0.0
        self._pending: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def sample(self, device: torch.device) -> AbstractContextManager[None]:
        """Time what happens within, if it is this call's turn."""
        self._calls += 1
        return self._measure(device) if self._calls % EVERY == 0 else _NOTHING

    @contextmanager
    def _measure(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            begun = time.perf_counter()
            yield
            self._observe(time.perf_counter() - begun)
            return
        if self._pending is not None and self._pending[1].query():
            self._observe(self._pending[0].elapsed_time(self._pending[1]) / 1e3)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pending = (begin, end)

    def snapshot(self) -> tuple[str, list[float], list[int], float]:
        """(backend, bucket bounds, counts of each bucket and beyond, sum), times in seconds."""
        return self.backend, list(BOUNDS), list(self._counts), self._sum_s

    def _observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._sum_s += seconds


#: The worker's.
TIMER = CircuitTimer()
