"""Adapters on their way into the engine's workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from vllm.lora.request import LoRARequest

from qaa_serve.registry import EngineRefusedError

#: How long to wait until workers are asked again: while requests run, whose steps each question delays; else.
_BUSY_S, _IDLE_S, _MOST_S = 0.01, 0.002, 0.5


class Loads:
    """Has all workers read adapters beside their steps, and take each over between two of them.

    A question to the workers waits for the step that runs, whatever it asks. So one asks for all loads together,
    however many there are.

    Args:
        call: a method of the worker extension, on all workers: (name, arguments) -> an answer each.
        busy: whether requests run.
    """

    def __init__(self, call: Callable[[str, tuple[Any, ...]], Awaitable[list[Any]]], busy: Callable[[], bool]):
        self._call, self._busy = call, busy
        self._new: list[tuple[str, int, str]] = []
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def load(self, request: LoRARequest) -> int:
        """Have every worker hold an adapter, of which it is asked once at a time.

        Returns:
            bytes of host memory it takes, over all workers.

        Raises:
            EngineRefusedError: if a worker does not take it; another one may hold it.
        """
        self._new.append((request.lora_name, request.lora_int_id, request.lora_path))
        done = self._waiting[request.lora_int_id] = asyncio.get_running_loop().create_future()
        self._news.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await done

    async def _run(self) -> None:
        wait_s = 0.0
        while any(not done.done() for done in self._waiting.values()):
            if self._new:
                wait_s = 0.0
            new, self._new = self._new, []
            self._news.clear()
            # Whoever has gone away, or has been told, waits no more.
            self._waiting = {int_id: done for int_id, done in self._waiting.items() if not done.done()}
            asked = list(self._waiting.items())
            try:
                answers = await self._call("qaa_load", (new, [int_id for int_id, _ in asked]))
            except Exception as error:
                for _, done in asked:
                    if not done.done():
                        done.set_exception(error)
                continue
            for i, (_, done) in enumerate(asked):
                self._tell(done, [loads[i] for loads, _ in answers])
            if any(goes_on for _, goes_on in answers):
                continue
            wait_s = min(2 * wait_s, _MOST_S) or (_BUSY_S if self._busy() else _IDLE_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait_s)

    @staticmethod
    def _tell(done: asyncio.Future[int], answers: list[int | str | None]) -> None:
        """Give whoever waits for a load what all workers say of it: its bytes, a reason, or nothing yet."""
        if done.done():
            return
        if reasons := [answer for answer in answers if isinstance(answer, str)]:
            done.set_exception(EngineRefusedError(reasons[0]))
        elif None not in answers:
            done.set_result(sum(answer for answer in answers if isinstance(answer, int)))
