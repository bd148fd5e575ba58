"""An engine that hangs is told from one that is busy: over an engine and a clock of the tests' own."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("psutil", reason="the server's packages are not installed")

from qaa_serve.server import monitor as module
from qaa_serve.server import processes
from qaa_serve.server.account import EngineAccount
from qaa_serve.server.monitor import EngineMonitor

DEADLINE_S = 60


class Engine:
    """Answers when it is told to. Each look at its work takes a second, in which it works for so long.

    Attributes:
        now: the time.
        works: seconds of work in each look.
        looks: how often its work was looked at.
        answers: what each question gets: an account, an error, or None for no answer.
    """

    def __init__(self, monkeypatch, *answers, works=0.0):
        self.now = 100.0
        self.works = works
        self.looks = 0
        self.asked = 0
        self.answers = list(answers)
        self.unanswered = 0
        self._work = 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.0005)
        monkeypatch.setattr(module, "_IDLE_SHARE", 0.01 / 0.0005)  # a hundredth of a second in each look

    async def ask(self):
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else None
        if answer is None:
            self.unanswered += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.unanswered -= 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    def work_s(self):
        self.looks += 1
        self.now += 1.0
        self._work += self.works
        return self._work

    def monitor(self, timeout_s=5.0):
        return EngineMonitor(
            self.ask, timeout_s=timeout_s, logger=logging.getLogger("test"), work_s=self.work_s, ask_every_s=0.0
        )


def watch(monitor, test):
    """Run a test beside a monitor; afterwards it has ended or is cancelled, and nothing is left."""

    async def main():
        task = asyncio.create_task(monitor.run())
        async with asyncio.timeout(DEADLINE_S):
            await test(task)
            if not monitor.stalled.is_set():
                task.cancel()
            ends = await asyncio.gather(task, return_exceptions=True)
            for _ in range(5):
                await asyncio.sleep(0)
        assert ends[0] is None or isinstance(ends[0], asyncio.CancelledError)
        assert len(asyncio.all_tasks()) == 1, "no question is left open"

    asyncio.run(main())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.0005)


def test_the_last_answer_is_kept_with_its_age(monkeypatch):
    first, second = EngineAccount({1: (10, 0)}), EngineAccount({2: (20, 5)})
    engine = Engine(monkeypatch, first, second)
    monitor = engine.monitor(timeout_s=0)
    assert (monitor.account, monitor.age_s) == (EngineAccount(), 0)

    async def test(task):
        await until(lambda: monitor.account == second)
        looked = engine.looks
        await until(lambda: engine.looks >= looked + 2)
        assert monitor.age_s >= 1
        assert not monitor.stalled.is_set()

    watch(monitor, test)
    assert engine.asked >= 3


def test_an_engine_that_neither_answers_nor_works_is_stalled_after_the_limit(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "test")  # others may have raised the root\'s
    engine = Engine(monkeypatch, EngineAccount())
    monitor = engine.monitor(timeout_s=5)

    async def test(task):
        await monitor.stalled.wait()
        await task
        assert engine.unanswered == 0

    watch(monitor, test)
    assert 5 <= engine.looks <= 5 + 4, "no sooner, no later"
    assert "has done nothing" in caplog.text
    assert "--engine-stall-timeout 5" in caplog.text


def test_a_machine_that_slept_is_no_engine_that_hangs(monkeypatch):
    """The clock goes on while everything stands still: `docker pause`, SIGSTOP, a machine that is moved."""
    engine = Engine(monkeypatch, None, EngineAccount())
    monitor = engine.monitor(timeout_s=20)

    async def test(task):
        await until(lambda: engine.looks >= 3)
        engine.now += 3600
        await until(lambda: engine.looks >= 8)
        assert not monitor.stalled.is_set()
        await monitor.stalled.wait()
        await task

    watch(monitor, test)
    assert 12 <= engine.looks <= 24


def test_an_engine_that_works_has_ten_times_as_long(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "test")  # others may have raised the root\'s
    engine = Engine(monkeypatch, works=0.5)
    monitor = engine.monitor(timeout_s=5)

    async def test(task):
        await until(lambda: engine.looks >= 45)
        assert not monitor.stalled.is_set() or engine.looks >= 50
        await monitor.stalled.wait()
        await task

    watch(monitor, test)
    assert 50 <= engine.looks <= 50 + 4
    assert "goes on working" in caplog.text
    assert "done nothing" not in caplog.text


def test_a_little_work_is_none(monkeypatch):
    engine = Engine(monkeypatch, works=0.001)
    monitor = engine.monitor(timeout_s=5)

    async def test(task):
        await monitor.stalled.wait()

    watch(monitor, test)
    assert engine.looks <= 5 + 4


def test_an_engine_that_stops_working_is_stalled_the_limit_later(monkeypatch):
    engine = Engine(monkeypatch, works=0.5)
    monitor = engine.monitor(timeout_s=5)

    async def test(task):
        await until(lambda: engine.looks >= 20)
        engine.works = 0.0
        looked = engine.looks
        await monitor.stalled.wait()
        assert looked + 4 <= engine.looks <= looked + 5 + 4

    watch(monitor, test)


def test_an_answer_after_a_long_time_of_work_is_an_answer(monkeypatch):
    engine = Engine(monkeypatch, works=0.5)
    answer, account = asyncio.Event(), EngineAccount({1: (1, 1)})

    async def ask():
        await answer.wait()
        return account

    engine.ask = ask
    monitor = engine.monitor(timeout_s=5)

    async def test(task):
        await until(lambda: engine.looks >= 30)
        answer.set()
        await until(lambda: monitor.account == account)
        assert not monitor.stalled.is_set()

    watch(monitor, test)


@pytest.mark.parametrize("works", [0.0, 0.5])
def test_without_a_limit_it_is_never_stalled(monkeypatch, works):
    engine = Engine(monkeypatch, works=works)
    monitor = engine.monitor(timeout_s=0)

    async def test(task):
        await until(lambda: engine.looks >= 200)
        assert not monitor.stalled.is_set()

    watch(monitor, test)


def test_an_error_of_a_question_is_said_and_the_next_is_asked(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "test")  # others may have raised the root\'s
    account = EngineAccount({1: (1, 1)})
    engine = Engine(monkeypatch, RuntimeError("no such method"), ValueError("odd"), account)
    monitor = engine.monitor(timeout_s=0)

    async def test(task):
        await until(lambda: monitor.account == account)

    watch(monitor, test)
    assert "account of its memory is missing: no such method" in caplog.text
    assert "odd" in caplog.text


def test_an_error_of_looking_at_its_work_does_not_end_the_watch(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "test")  # others may have raised the root\'s
    engine = Engine(monkeypatch)
    engine.work_s = lambda: 1 / 0
    monitor = engine.monitor()

    async def test(task):
        await until(lambda: engine.asked >= 3)
        assert not task.done()

    watch(monitor, test)
    assert "missing" in caplog.text


@pytest.mark.parametrize("pauses", range(6))
def test_a_watch_that_is_cancelled_ends_whatever_it_does(monkeypatch, pauses):
    engine = Engine(monkeypatch, EngineAccount())
    monitor = engine.monitor(timeout_s=0)

    async def test(task):
        for _ in range(pauses):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    watch(monitor, test)


# -------------------------------------------------------------------------------------------------- processes


class Process:
    """A process of a table of the tests' own."""

    def __init__(self, title, seconds=0.0, children=(), gone=False):
        self.title, self.seconds, self.below, self.gone = title, seconds, list(children), gone
        self.killed = False

    def children(self, recursive=False):
        if self.gone:
            raise processes.psutil.NoSuchProcess(1)
        return [process for child in self.below for process in (child, *child.children(recursive=True))]

    def cmdline(self):
        if self.gone:
            raise processes.psutil.NoSuchProcess(1)
        return self.title.split()

    def cpu_times(self):
        if self.gone:
            raise processes.psutil.AccessDenied(1)
        return SimpleNamespace(user=self.seconds / 2, system=self.seconds / 2)

    def kill(self):
        if self.gone:
            raise processes.psutil.NoSuchProcess(1)
        self.killed = True


@pytest.mark.parametrize(
    ("below", "seconds"),
    [
        ([], 1.0),
        ([Process("VLLM::EngineCore", 10.0)], 10.0),
        # The engine's process that waits for its workers looks again and again: that is no work.
        ([Process("VLLM::EngineCore", 10.0, [Process("VLLM::Worker_TP0", 3.0, [Process("cc1plus", 4.0)]),
                                             Process("VLLM::Worker_TP1", 5.0)])], 12.0),
    ],
)  # fmt: skip
def test_the_engines_work_is_its_workers_and_what_they_started(monkeypatch, below, seconds):
    monkeypatch.setattr(processes.psutil, "Process", lambda: Process("qaa-serve", 1.0, below))
    assert processes.engine_work_s() == seconds


def test_every_process_that_this_one_started_is_ended(monkeypatch):
    deep = Process("deep")
    below = [Process("a", children=[deep]), Process("b")]
    monkeypatch.setattr(processes.psutil, "Process", lambda: Process("qaa-serve", children=below))
    processes.kill_children()
    assert all(process.killed for process in (*below, deep))


def test_processes_that_end_meanwhile_are_passed_over(monkeypatch):
    below = [Process("a", 1.0), Process("b", 2.0)]
    here = Process("qaa-serve", children=below)
    family = here.children(recursive=True)
    here.children = lambda recursive: family
    below[0].gone = True
    monkeypatch.setattr(processes.psutil, "Process", lambda: here)
    assert processes.engine_work_s() == 2.0
    processes.kill_children()
    assert below[1].killed
