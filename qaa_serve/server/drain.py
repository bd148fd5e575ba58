"""Requests under way, and waiting for their end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Drain:
    """Counts the requests under way; once it is closed, no new one may begin.

    Attributes:
        closed: whether new requests are refused.
        in_flight: requests whose body has arrived and whose response has not ended.
    """

    def __init__(self) -> None:
        self.closed = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request is under way until the context ends."""
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    async def close(self, timeout_s: float) -> bool:
        """Refuse new requests and wait until those under way have ended; False if time ran out."""
        self.closed = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._idle.is_set()
