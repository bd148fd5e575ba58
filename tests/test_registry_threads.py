"""What blocks runs in threads: so many at once, each for so long, and what hangs is in nobody's way."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from registry_support import PATIENCE_S, Hang, eventually, in_a_loop

from qaa_serve.registry import threads as threads_module
from qaa_serve.registry.threads import Threads
from qaa_serve.sources import SourceError


@in_a_loop
async def test_results_and_errors_come_back() -> None:
    threads = Threads(2, PATIENCE_S)
    assert await threads.run("adding", lambda a, *, b: a + b, 1, b=2) == 3
    error = KeyError("x")

    def fail() -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        await threads.run("failing", fail)
    assert caught.value is error


@in_a_loop
async def test_the_event_loop_goes_on_meanwhile() -> None:
    threads, hang = Threads(1, PATIENCE_S), Hang()
    running = asyncio.create_task(threads.run("waiting", hang))
    await eventually(lambda: hang.count, "it waits")
    for _ in range(1000):
        await asyncio.sleep(0)
    assert not running.done()
    hang.go.set()
    await running


@in_a_loop
async def test_no_more_run_at_once_than_were_allowed() -> None:
    threads, lock, running, most = Threads(3, PATIENCE_S), threading.Lock(), 0, 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.002)
        with lock:
            running -= 1

    await asyncio.gather(*(threads.run("working", work) for _ in range(50)))
    assert 1 < most <= 3


@in_a_loop
async def test_what_takes_too_long_is_an_error_and_its_place_is_free() -> None:
    threads, hang = Threads(1, 0.05), Hang()
    with pytest.raises(SourceError, match=r"reading 'a' has not ended within 0\.05 s: look at the storage"):
        await threads.run("reading 'a'", hang)
    assert await threads.run("reading 'b'", lambda: "b") == "b"
    hang.go.set()


@in_a_loop
async def test_what_fails_after_its_time_disturbs_nobody(recwarn: pytest.WarningsRecorder) -> None:
    threads, hang, errors = Threads(1, 0.05), Hang(), []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))

    def fail() -> None:
        hang()
        raise ValueError("late")

    with pytest.raises(SourceError):
        await threads.run("failing", fail)
    hang.go.set()
    await eventually(lambda: not threads._stuck, "it has ended")
    assert not errors


@in_a_loop
async def test_without_a_limit_nothing_takes_too_long() -> None:
    threads, hang = Threads(1, 0), Hang()
    running = asyncio.create_task(threads.run("waiting", hang))
    await eventually(lambda: hang.count, "it waits")
    await asyncio.sleep(0.1)
    assert not running.done()
    hang.go.set()
    await running


@in_a_loop
async def test_no_more_hang_than_can_be_borne(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_module, "MAX_STUCK", 3)
    threads, hang = Threads(2, 0.05), Hang()
    for _ in range(3):
        with pytest.raises(SourceError, match="has not ended"):
            await threads.run("reading", hang)
    with pytest.raises(SourceError, match="reading is not begun, since 3 reads hang: look at the storage"):
        await threads.run("reading", hang)
    assert hang.count == 3
    hang.go.set()
    await eventually(lambda: not threads._stuck, "they have ended")
    assert await threads.run("reading", lambda: 1) == 1


@in_a_loop
async def test_whoever_goes_away_frees_the_place() -> None:
    threads, hang = Threads(1, PATIENCE_S), Hang()
    running = asyncio.create_task(threads.run("waiting", hang))
    await eventually(lambda: hang.count, "it waits")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await threads.run("reading", lambda: 1) == 1
    hang.go.set()
    await eventually(lambda: not threads._stuck, "it has ended")


def test_a_loop_that_ends_is_not_waited_for_by_a_thread() -> None:
    hang, ended = Hang(), threading.Event()

    def work() -> None:
        hang()
        ended.set()

    async def run() -> None:
        with pytest.raises(SourceError):
            await Threads(1, 0.05).run("waiting", work)

    asyncio.run(run())
    hang.go.set()
    assert ended.wait(PATIENCE_S)


@in_a_loop
async def test_a_thread_leaves_the_engines_cores_alone() -> None:
    assert await Threads(1, PATIENCE_S).run("counting", torch.get_num_threads) == 1
