"""Adapters on their way into workers: asked for together, told one by one."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.lora.request import LoRARequest

from qaa_serve.registry import EngineRefusedError
from qaa_serve.server.loads import Loads


class Workers:
    """Two workers, of which the second takes over what ``ready`` says, as a load's answers by its id."""

    def __init__(self):
        self.asked, self.ready, self.staged = [], {}, []
        self.goes_on = False

    async def call(self, method, args):
        assert method == "qaa_load"
        new, ids = args
        self.staged += [name for name, _, _ in new]
        self.asked.append(list(ids))
        await asyncio.sleep(0)
        if self.ready.get("dead"):
            raise RuntimeError("the engine is gone")
        answers = [self.ready.get(number) for number in ids]
        return [([7 for _ in ids], False), (answers, self.goes_on)]


def request(number):
    return LoRARequest(f"a{number}", number, f"/adapters/a{number}")


def run(test):
    async def main():
        workers = Workers()
        await asyncio.wait_for(test(workers, Loads(workers.call, lambda: False)), 30)

    asyncio.run(main())


def test_all_loads_are_asked_for_in_one_question():
    async def test(workers, loads):
        tasks = [asyncio.create_task(loads.load(request(number))) for number in range(1, 21)]
        await asyncio.sleep(0)
        while not workers.asked:
            await asyncio.sleep(0.001)
        assert workers.asked[0] == list(range(1, 21))
        assert workers.staged == [f"a{number}" for number in range(1, 21)]
        workers.ready = {number: number for number in range(1, 21)}
        assert await asyncio.gather(*tasks) == [7 + number for number in range(1, 21)]
        assert workers.staged == [f"a{number}" for number in range(1, 21)]  # none is read twice

    run(test)


def test_one_that_hangs_or_fails_keeps_no_other_one_waiting():
    async def test(workers, loads):
        hanging = asyncio.create_task(loads.load(request(1)))
        broken = asyncio.create_task(loads.load(request(2)))
        for _ in range(5):
            await asyncio.sleep(0.01)
        workers.ready = {2: "rank 64 is too large", 3: 5}
        with pytest.raises(EngineRefusedError, match="rank 64 is too large"):
            await broken
        # Asked at once, however long the pause has become that the hanging one has led to.
        assert await asyncio.wait_for(loads.load(request(3)), 0.4) == 12
        assert not hanging.done()
        workers.ready[1] = 1
        assert await hanging == 8
        count = len(workers.asked)
        await asyncio.sleep(0.05)
        assert len(workers.asked) == count  # nobody waits: nobody is asked

    run(test)


def test_what_was_not_taken_over_in_time_is_asked_for_at_once():
    async def test(workers, loads):
        workers.goes_on = True
        task = asyncio.create_task(loads.load(request(1)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(workers.asked) > 5
        workers.ready, workers.goes_on = {1: 1}, False
        assert await task == 8

    run(test)


def test_an_engine_that_is_gone_fails_all_and_the_next_ones_are_asked_anew():
    async def test(workers, loads):
        workers.ready = {"dead": True}
        tasks = [asyncio.create_task(loads.load(request(number))) for number in (1, 2)]
        for task in tasks:
            with pytest.raises(RuntimeError, match="gone"):
                await task
        workers.ready = {3: 3}
        assert await loads.load(request(3)) == 10

    run(test)


def test_a_caller_that_goes_away_leaves_nothing_behind():
    async def test(workers, loads):
        task = asyncio.create_task(loads.load(request(1)))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        workers.ready = {2: 2}
        assert await loads.load(request(2)) == 9
        assert workers.asked[-1] == [2]

    run(test)
