"""Threads for what blocks: so many at once, each for so long, and none that hangs keeps others waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

from qaa_serve.sources import SourceError

T = TypeVar("T")

#: Threads that may hang at a time before no more are begun.
MAX_STUCK = 64


class Threads:
    """Runs blocking functions beside the event loop.

    A thread cannot be ended from outside. One that takes too long is left alone: whoever waited for it gets an
    error, and its place is free for another.
    """

    def __init__(self, count: int, timeout_s: float):
        """Begin with none.

        Args:
            count: how many may run at once.
            timeout_s: how long each may take; 0: for ever.
        """
        self._free = asyncio.Semaphore(count)
        self._timeout_s = timeout_s
        self._stuck = 0

    async def run(self, what: str, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """The function's result.

        Args:
            what: is done, for the message if it takes too long.
            function: called in a thread, with what follows.
            args: its arguments.
            options: its named ones.

        Raises:
            SourceError: if it takes too long, or too many do already.
        """
        async with self._free:
            if self._stuck >= MAX_STUCK:
                raise SourceError(f"{what} is not begun, since {self._stuck} reads hang: look at the storage")
            loop = asyncio.get_running_loop()
            result: asyncio.Future[T] = loop.create_future()
            result.add_done_callback(lambda done: done.cancelled() or done.exception())  # maybe nobody asks

            def settle(value: Any, error: BaseException | None) -> None:
                if error is None:
                    result.set_result(value)
                else:
                    result.set_exception(error)

            def work() -> None:
                # More would take the engine's cores. (Where an engine is in this process, torch.set_num_threads is
                # vLLM's, which only complains.)
                torch._C.set_num_threads(1)
                try:
                    outcome: tuple[Any, BaseException | None] = (function(*args, **options), None)
                except BaseException as error:
                    outcome = (None, error)
                with suppress(RuntimeError):  # the loop has ended, and nobody waits
                    loop.call_soon_threadsafe(settle, *outcome)

            threading.Thread(target=work, name="qaa-adapters", daemon=True).start()
            try:
                await asyncio.wait((result,), timeout=self._timeout_s or None)
            finally:
                if not result.done():
                    self._stuck += 1
                    result.add_done_callback(self._unstuck)
            if not result.done():
                raise SourceError(f"{what} has not ended within {self._timeout_s:g} s: look at the storage")
            return result.result()

    def _unstuck(self, _: object) -> None:
        self._stuck -= 1
