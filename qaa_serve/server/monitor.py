"""Whether the engine works: its workers are asked for their account now and then, and have a time to answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from logging import Logger

from qaa_serve.server.account import EngineAccount
from qaa_serve.server.processes import engine_work_s

#: How often the workers are asked, and looked at while they do not answer, in seconds.
_ASK_EVERY_S, _LOOK_EVERY_S = 10.0, 0.5

#: What counts at most of the time between two looks. If more has passed, this process was stopped or its machine
#: asleep, and so, as a rule, was the engine.
_LONGEST_LOOK_S = 5.0

#: Processes that use less of a core than this do not work.
_IDLE_SHARE = 0.05

#: An engine that works all the time, but answers nothing for so many time limits, is taken to hang too: a thread
#: that waits for a GPU's kernel uses its core.
_BUSY_LIMITS = 10


class EngineMonitor:
    """Keeps the workers' last account, and tells an engine that hangs from one that is busy.

    A question takes its turn between two steps of the engine, so a long prefill or a compilation delays the answer
    as a hang does. What tells them apart is work: the engine hangs if it has not answered for the time limit and
    its workers, with all that they started, used no processor time meanwhile.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[EngineAccount]],
        *,
        timeout_s: float,
        logger: Logger,
        work_s: Callable[[], float] | None = None,
        ask_every_s: float = _ASK_EVERY_S,
    ):
        """Start with an empty account, as of now.

        Args:
            ask: asks the workers.
            timeout_s: how long an idle engine may leave a question unanswered; 0: for ever.
            logger: where to say so.
            work_s: seconds of processor time of the engine so far; None measures this process's children.
            ask_every_s: how often the workers are asked.
        """
        self.account = EngineAccount()
        self.stalled = asyncio.Event()
        self._ask = ask
        self._timeout_s = timeout_s
        self._log = logger
        self._work_s = work_s or engine_work_s
        self._ask_every_s = ask_every_s
        self._answered_s = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the engine answered last."""
        return time.monotonic() - self._answered_s

    async def run(self) -> None:
        """Ask until cancelled, or until the engine hangs."""
        while not self.stalled.is_set():
            asking = asyncio.ensure_future(self._ask())
            try:
                await self._wait(asking)
            except Exception as error:  # a dead engine ends the server elsewhere
                self._log.warning("The engine's account of its memory is missing: %s", error)
            finally:
                asking.cancel()
            await asyncio.sleep(self._ask_every_s)

    async def _wait(self, asking: asyncio.Future[EngineAccount]) -> None:
        """Wait for an answer, or for a hang."""
        silent_s = idle_s = 0.0
        last_s, work_s = time.monotonic(), await asyncio.to_thread(self._work_s)
        while not asking.done():
            await asyncio.wait((asking,), timeout=_LOOK_EVERY_S)
            now_s, now_work_s = time.monotonic(), await asyncio.to_thread(self._work_s)
            passed_s = min(now_s - last_s, _LONGEST_LOOK_S)
            silent_s += passed_s
            idle_s = 0.0 if now_work_s - work_s > _IDLE_SHARE * _LOOK_EVERY_S else idle_s + passed_s
            last_s, work_s = now_s, now_work_s
            if self._timeout_s and (idle_s >= self._timeout_s or silent_s >= _BUSY_LIMITS * self._timeout_s):
                worked = "has done nothing" if idle_s >= self._timeout_s else "goes on working"
                self._log.error(
                    "The engine has not answered for %.0f s and %s: it hangs (--engine-stall-timeout %g)",
                    silent_s, worked, self._timeout_s,
                )  # fmt: skip
                self.stalled.set()
                return
        self.account = asking.result()
        self._answered_s = time.monotonic()
