"""Turns: how many sequences run and wait, in which order, and what is left when they have ended."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed")

from qaa_serve.server import turns as module
from qaa_serve.server.errors import RefusedError
from qaa_serve.server.turns import Turns

DEADLINE_S = 20


class Visitor:
    """One request: admitted, then waiting for its first prompt's seats, then running until it may go."""

    def __init__(self, turns, client=None, prompts=1, n=1, *, model="m", order=None):
        self.client = client
        self.refusal = None
        self.runs = 0
        self.may_go = asyncio.Event()
        self._order = [] if order is None else order
        self.task = asyncio.ensure_future(self._visit(turns, model, prompts, n))

    async def _visit(self, turns, model, prompts, n):
        try:
            with turns.admit(model, self.client, prompts * n) as ticket:
                await ticket.first(n)
                self._order.append(self)
                await asyncio.gather(*(self._run(ticket, n) for _ in range(prompts)))
        except RefusedError as refusal:
            self.refusal = refusal

    async def _run(self, ticket, n):
        async with ticket.seats(n):
            self.runs += n
            await self.may_go.wait()

    async def leaves(self):
        self.may_go.set()
        await self.task


async def all_leave(visitors):
    for visitor in visitors:
        visitor.may_go.set()
    await asyncio.gather(*(visitor.task for visitor in visitors))


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def run(test, *args, **options):
    """Run a test with turns that nobody has, and see that nobody has any at its end."""

    async def main():
        turns = Turns(*args, **options)
        async with asyncio.timeout(DEADLINE_S):
            await test(turns)
            await settle()
        assert turns.names() == []
        assert turns._lines == {}

    asyncio.run(main())


# ------------------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize(
    ("prompts", "n", "running", "waiting"),
    [(1, 1, 1, 0), (1, 3, 3, 0), (3, 1, 3, 0), (2, 2, 4, 0), (3, 2, 4, 2), (6, 1, 4, 2), (1, 6, 4, 0)],
)
def test_a_request_weighs_prompts_times_answers(prompts, n, running, waiting):
    async def test(turns):
        assert turns.counts("m") == (0, 0)
        visitor = Visitor(turns, prompts=prompts, n=n)
        await settle()
        assert turns.counts("m") == (running, waiting)
        assert turns.names() == ["m"]
        await visitor.leaves()
        assert visitor.runs == prompts * n

    run(test, 4, 10)


def test_models_have_lines_of_their_own():
    async def test(turns):
        visitors = [Visitor(turns, model=model) for model in ("a", "a", "b", "c")]
        await settle()
        assert sorted(turns.names()) == ["a", "b", "c"]
        assert [turns.counts(model) for model in "abc"] == [(1, 1), (1, 0), (1, 0)]
        await all_leave(visitors)

    run(test, 1, 5)


def test_sequences_that_outlive_their_request_keep_their_seats():
    async def test(turns):
        may_go = asyncio.Event()

        async def outlive(ticket):
            async with ticket.seats(2):
                await may_go.wait()

        with turns.admit("m", None, 2) as ticket:
            await ticket.first(2)
            task = asyncio.ensure_future(outlive(ticket))
            await settle()
        assert turns.counts("m") == (2, 0)
        other = Visitor(turns)
        await settle()
        assert turns.counts("m") == (2, 1)
        may_go.set()
        await task
        await other.leaves()

    run(test, 2, 5)


def test_a_request_that_uses_no_seat_gives_its_first_back():
    async def test(turns):
        with turns.admit("m", None, 3) as ticket:
            await ticket.first(1)
            assert turns.counts("m") == (1, 2)
        assert turns.counts("m") == (0, 0)

    run(test, 1, 5)


def test_a_request_may_run_more_than_it_said():
    async def test(turns):
        with turns.admit("m", None, 1) as ticket:
            await ticket.first(1)
            for _ in range(3):
                async with ticket.seats(1), ticket.seats(1):
                    assert turns.counts("m") == (2, 0)

    run(test, 2, 5)


# ------------------------------------------------------------------------------------------ who is let in


def test_more_than_could_ever_wait_is_400_and_more_than_can_now_is_429():
    async def test(turns):
        visitors = [Visitor(turns, prompts=2) for _ in range(2)]
        too_large, too_many = Visitor(turns, n=6), Visitor(turns, n=2)
        await settle()
        assert too_large.refusal.status == 400
        assert "6 sequences" in too_large.refusal.message
        assert "send it in parts" in too_large.refusal.message
        assert (too_many.refusal.status, too_many.refusal.headers["Retry-After"]) == (429, "1")
        assert too_many.refusal.message.startswith("'m' has 2 sequences running and 2 waiting")
        assert "your key" not in too_large.refusal.message + too_many.refusal.message, "there are none"
        visitors.append(Visitor(turns))
        await settle()
        assert turns.counts("m") == (2, 3)
        for visitor in visitors:
            await visitor.leaves()
            assert visitor.refusal is None

    run(test, 2, 3)


def test_a_key_has_three_quarters_of_the_places_and_the_rest_is_for_others():
    async def test(turns):
        mine = [Visitor(turns, "a") for _ in range(13)]
        await settle()
        refused = [visitor for visitor in mine if visitor.refusal]
        assert len(refused) == 1, "12 of 16"
        assert refused[0].refusal.status == 429
        assert "your key has, for 'm', 6 sequences running and 6 waiting" in refused[0].refusal.message
        too_large = Visitor(turns, "b", n=13)
        theirs = [Visitor(turns, "b") for _ in range(5)]
        await settle()
        assert too_large.refusal.status == 400
        assert [bool(visitor.refusal) for visitor in theirs] == [False] * 4 + [True]
        assert "'m' has 8 sequences running and 8 waiting" in theirs[-1].refusal.message
        assert "your key" not in theirs[-1].refusal.message
        await all_leave((*mine, *theirs))

    run(test, 8, 8)


@pytest.mark.parametrize(("seats", "share"), [(1, 1), (2, 1), (3, 2), (4, 3), (8, 6), (256, 192)])
def test_a_key_leaves_a_quarter_of_the_seats_and_at_least_one(seats, share):
    async def test(turns):
        visitors = [Visitor(turns, "a") for _ in range(seats + 1)]
        await settle()
        assert turns.counts("m") == (share, seats + 1 - share)
        other = Visitor(turns, "b")
        await settle()
        assert turns.counts("m")[0] == min(share + 1, seats)
        await all_leave((*visitors, other))

    run(test, seats, 1000)


def test_without_keys_all_seats_are_anybodys():
    async def test(turns):
        visitors = [Visitor(turns) for _ in range(6)]
        await settle()
        assert turns.counts("m") == (4, 2)
        await all_leave(visitors)

    run(test, 4, 10)


# ------------------------------------------------------------------------------------------------ who is next


def test_of_one_key_who_came_first_is_first():
    async def test(turns):
        order = []
        visitors = [Visitor(turns, order=order) for _ in range(6)]
        for count, visitor in enumerate(visitors, 1):
            await settle()
            assert order == visitors[:count]
            await visitor.leaves()

    run(test, 1, 10)


def test_keys_take_turns_however_many_each_has_waiting():
    async def test(turns):
        order = []
        visitors = [Visitor(turns, client, order=order) for client in ("a", "a", "a", "a", "b", "c", "b")]
        while len(order) < len(visitors):
            await settle()
            await order[-1].leaves()
        await settle()
        clients = "".join(visitor.client for visitor in order)
        assert clients[0] == clients[-1] == "a", "it came first, and has the most"
        assert "aa" not in clients[:-2], "as long as others wait"
        assert {"b", "c"} < set(clients[:4])
        await all_leave(visitors)

    run(test, 1, 1000)


def test_a_large_request_is_not_starved_by_small_ones():
    async def test(turns):
        order = []
        small = [Visitor(turns, "a", order=order) for _ in range(3)]
        large = Visitor(turns, "b", n=3, order=order)
        await settle()
        small += [Visitor(turns, "c", order=order) for _ in range(20)]
        await settle()
        assert order == small[:3], "the free seat is kept for the large one"
        await small[0].leaves()
        await settle()
        assert large not in order
        await small[1].leaves()
        await settle()
        assert order == [*small[:3], large]
        await all_leave((large, *small))

    run(test, 4, 1000)


def test_a_request_larger_than_all_seats_takes_all_that_its_key_can_have():
    async def test(turns):
        visitor = Visitor(turns, "a", n=50)
        await settle()
        assert turns.counts("m") == (3, 0)
        other = Visitor(turns, "b")
        await settle()
        assert turns.counts("m") == (4, 0)
        await all_leave((visitor, other))

    run(test, 4, 1000)


def test_who_leaves_the_front_of_the_line_lets_those_behind_it_pass():
    async def test(turns):
        order = []
        first = Visitor(turns, order=order)
        await settle()
        large, small = Visitor(turns, n=2, order=order), Visitor(turns, order=order)
        await settle()
        assert turns.counts("m") == (1, 3)
        large.task.cancel()
        await settle()
        assert order == [first, small]
        await all_leave((first, small))

    run(test, 2, 10)


@pytest.mark.parametrize("keys", [10, 1000])
def test_what_a_grant_costs_does_not_grow_with_the_keys(keys, monkeypatch):
    async def test(turns):
        busy = [Visitor(turns, "busy") for _ in range(20)]
        visitors = [Visitor(turns, str(key)) for key in range(keys)]
        await settle()
        assert turns.counts("m") == (8, keys + 12)
        looked, share = 0, module._share

        def counted(places, client):
            nonlocal looked
            looked += 1
            return share(places, client)

        monkeypatch.setattr(module, "_share", counted)
        for visitor in (*busy[:4], *visitors[:4]):
            looked = 0
            await visitor.leaves()
            assert looked <= 3 * 8
        monkeypatch.undo()
        await all_leave((*busy, *visitors))

    run(test, 8, 10_000)


# ------------------------------------------------------------------------------------- waits and their ends


def test_who_waits_the_longest_time_is_told_so_and_leaves_the_line():
    async def test(turns):
        first, second = Visitor(turns), Visitor(turns)
        await second.task
        assert (second.refusal.status, second.refusal.headers["Retry-After"]) == (503, "5")
        assert "0.01 s" in second.refusal.message
        assert "--max-queue-wait" in second.refusal.message
        assert turns.counts("m") == (1, 0)
        await first.leaves()

    run(test, 1, 5, max_wait_s=0.01)


def test_a_request_that_need_not_wait_may_run_as_long_as_it_likes():
    async def test(turns):
        visitor = Visitor(turns)
        await asyncio.sleep(0.03)
        await visitor.leaves()
        assert (visitor.refusal, visitor.runs) == (None, 1)

    run(test, 1, 5, max_wait_s=0.0)


def test_a_turn_passes_over_those_that_were_cancelled_and_they_end_as_cancelled():
    async def test(turns):
        first, second, third = (Visitor(turns) for _ in range(3))
        await settle()
        # Within one step of the loop: the one that waits has not noticed yet when the turn ends.
        second.task.cancel()
        turns._release("m", "", 1)
        with pytest.raises(asyncio.CancelledError):
            await second.task
        await settle()
        assert third.runs == 1
        turns._line("m").count("", running=1)  # the first one gives its own back again
        await first.leaves()
        await third.leaves()

    run(test, 1, 5)


@pytest.mark.parametrize("pauses", range(6))
def test_a_request_that_is_cancelled_while_it_lines_up_leaves_the_line(pauses):
    async def test(turns):
        first, second = Visitor(turns), Visitor(turns, n=2)
        for _ in range(pauses):
            await asyncio.sleep(0)
        second.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second.task
        await settle()
        assert turns.counts("m") == (1, 0)
        await first.leaves()

    run(test, 2, 5)


# ------------------------------------------------------------------------------------- every order of events


class Chance:
    """Requests that come, run, end, are cancelled and run out of patience in an order drawn by lot."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.seats = self.random.randint(1, 6)
        self.keyed = self.random.random() < 0.7
        self.turns = Turns(self.seats, self.random.randint(0, 12), max_wait_s=DEADLINE_S)
        self.held = {}
        self.tasks = []

    def share(self):
        return max(self.seats - max(self.seats // 4, 1), 1) if self.keyed else self.seats

    async def pause(self):
        for _ in range(self.random.choice((0, 1, 1, 2, 5, 9))):
            await asyncio.sleep(0)

    async def request(self):
        client = self.random.choice("abcd") if self.keyed else None
        model = self.random.choice("mmmn")
        prompts, n = self.random.randint(1, 3), self.random.choice((1, 1, 2, 3, 9))
        with suppress(RefusedError), self.turns.admit(model, client, prompts * n) as ticket:
            if self.random.random() < 0.9:
                patience = self.random.choice((None, None, 0))
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        await ticket.first(n)
            await self.pause()
            runs = [asyncio.ensure_future(self.run(ticket, model, client, n)) for _ in range(prompts)]
            self.tasks += runs
            if self.random.random() < 0.8:
                await asyncio.gather(*runs)

    async def run(self, ticket, model, client, n):
        async with ticket.seats(n):
            key = model, client
            self.held[key] = self.held.get(key, 0) + min(n, self.share())
            try:
                await self.pause()
            finally:
                self.held[key] -= min(n, self.share())

    def check(self):
        """What must hold at any moment."""
        for model in "mn":
            held = {client: count for (name, client), count in self.held.items() if name == model}
            assert sum(held.values()) <= self.turns.counts(model)[0] <= self.seats
            assert all(count <= self.share() for count in held.values())
            if (line := self.turns._lines.get(model)) is None:
                continue
            assert line.waiting_total == sum(line.waiting.values()) >= 0
            assert line.running_total == sum(line.running.values())
            assert all(count <= self.share() for count in line.running.values())
            waiters = [waiter for queue in line.queues.values() for waiter in queue]
            if any(waiter.granted.done() for waiter in waiters):
                continue  # it was cancelled within this step, and leaves the line in the next
            for client, queue in line.queues.items():
                if line.running[client] + queue[0].seats <= self.share():
                    assert line.running_total + queue[0].seats > self.seats, "it waits while its seats are free"
                    break  # those behind it may not pass it

    async def play(self):
        for _ in range(self.random.randint(5, 40)):
            self.tasks.append(asyncio.ensure_future(self.request()))
            for _ in range(self.random.randint(0, 4)):
                await asyncio.sleep(0)
                self.check()
            if self.random.random() < 0.3:
                self.random.choice(self.tasks).cancel()
            self.check()
        async with asyncio.timeout(DEADLINE_S):
            while not all(task.done() for task in self.tasks):
                await asyncio.sleep(0)
                self.check()
        await settle()
        failures = [task.exception() for task in self.tasks if not task.cancelled() and task.exception()]
        assert failures == []
        assert self.turns._lines == {}
        assert not any(self.held.values())


def test_whatever_the_order_of_events_nobody_is_forgotten_and_nothing_is_left():
    for seed in range(400):
        try:
            asyncio.run(Chance(seed).play())
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
