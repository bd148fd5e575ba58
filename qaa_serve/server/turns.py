"""Who may run now: so many sequences of a model at once, so many more that wait, and no key before the others.

A model with more sequences than the engine has seats would otherwise fill the engine's one queue, and every other
model's requests would stand behind them. A sequence is one answer to one prompt: a request has prompts x n.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from qaa_serve.server.errors import RefusedError

#: Of the seats and of the places in the queue of a model, the part that one key of several leaves to the others.
_LEFT_TO_OTHERS = 4


@dataclass(eq=False)
class _Waiter:
    """Somebody in a line, who needs so many seats at once."""

    seats: int
    granted: asyncio.Future[None]


@dataclass
class _Line:
    """One model's sequences.

    Attributes:
        running: those that have a seat, by client ("" where keys do not matter).
        waiting: those that are let in and have none yet, by client.
        queues: the waiters of each client, in the order they came; the client at the front is next.
    """

    running: Counter[str] = field(default_factory=Counter)
    waiting: Counter[str] = field(default_factory=Counter)
    queues: OrderedDict[str, deque[_Waiter]] = field(default_factory=OrderedDict)
    running_total: int = 0
    waiting_total: int = 0

    def count(self, client: str, *, running: int = 0, waiting: int = 0) -> None:
        for counter, change in ((self.running, running), (self.waiting, waiting)):
            counter[client] += change
            if not counter[client]:
                del counter[client]
        self.running_total += running
        self.waiting_total += waiting


class Turns:
    """The lines of all models; a model without sequences has none."""

    def __init__(self, max_running: int, max_waiting: int, *, max_wait_s: float = 600.0):
        """Start with nobody in line.

        Args:
            max_running: sequences of one model that may have a seat at once, at least 1.
            max_waiting: further sequences of one model that may wait.
            max_wait_s: the longest that a request waits for its first seats, in seconds.
        """
        self._max_running = max(max_running, 1)
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._lines: dict[str, _Line] = {}

    def names(self) -> list[str]:
        """The models with sequences that run or wait."""
        return list(self._lines)

    def counts(self, model: str) -> tuple[int, int]:
        """(running, waiting) sequences of a model."""
        line = self._lines.get(model)
        return (0, 0) if line is None else (line.running_total, line.waiting_total)

    @contextmanager
    def admit(self, model: str, client: str | None, sequences: int) -> Iterator[Ticket]:
        """Let a request's sequences in, until the context ends.

        Args:
            model: whose seats they need.
            client: the name of the key they came with; None where keys do not matter. One client of several can
                have three quarters of a model's seats and places; what is left is for the others.
            sequences: how many there are.

        Raises:
            RefusedError: with 400 if they are more than could ever wait, 429 if they are too many now.
        """
        places = self._max_running + self._max_waiting
        share = _share(places, client)
        if sequences > share:
            raise RefusedError(
                400,
                f"the request makes {sequences:,} sequences (prompts x n), and {share:,} of one model may run and "
                "wait together: send it in parts",
            )
        line, name = self._lines.get(model, _Line()), client or ""
        running, waiting, whose = line.running_total, line.waiting_total, f"{model!r} has"
        if line.running[name] + line.waiting[name] + sequences > share < places:
            running, waiting, whose = line.running[name], line.waiting[name], f"your key has, for {model!r},"
            places = share
        if running + waiting + sequences > places:
            raise RefusedError(
                429,
                f"{whose} {running:,} sequences running and {waiting:,} waiting; with the {sequences:,} of this "
                f"request they are more than the {places:,} there may be: try again later",
                Retry_After="1",
            )
        self._line(model).count(name, waiting=sequences)
        ticket = Ticket(self, model, client, sequences, self._max_wait_s)
        try:
            yield ticket
        finally:
            ticket.close()

    def _line(self, model: str) -> _Line:
        return self._lines.setdefault(model, _Line())

    def _seats_for(self, client: str | None, sequences: int) -> int:
        """Seats that so many sequences take at once: all they need, as far as there are so many."""
        return min(sequences, _share(self._max_running, client))

    async def _acquire(self, model: str, client: str, seats: int) -> None:
        """Wait for seats; `_release` gives them back."""
        line = self._line(model)
        waiter = _Waiter(seats, asyncio.get_running_loop().create_future())
        line.queues.setdefault(client, deque()).append(waiter)
        self._grant(line)
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled():
                self._release(model, client, seats)
            else:
                self._withdraw(line, client, waiter)
                self._forget_if_empty(model)
            raise

    def _release(self, model: str, client: str, seats: int) -> None:
        line = self._line(model)
        line.count(client, running=-seats)
        self._grant(line)
        self._forget_if_empty(model)

    def _withdraw(self, line: _Line, client: str, waiter: _Waiter) -> None:
        queue = line.queues.get(client, deque())
        if waiter in queue:  # not if `_grant` has passed it over already
            queue.remove(waiter)
            if not queue:
                del line.queues[client]
            self._grant(line)  # those behind it may have waited for it alone

    def _forget_if_empty(self, model: str) -> None:
        line = self._line(model)
        if not (line.running_total or line.waiting_total or line.queues):
            del self._lines[model]

    def _grant(self, line: _Line) -> None:
        """Seat those who are next, as far as there are seats: one of each client in turn.

        A client whose share is used up is passed over. It has seats, so no more are looked at than have some.
        """
        passed_over = 0
        while passed_over < len(line.queues):
            name, queue = next(iter(line.queues.items()))
            waiter = queue[0]
            if line.running[name] + waiter.seats > _share(self._max_running, name or None):
                line.queues.move_to_end(name)
                passed_over += 1
                continue
            if line.running_total + waiter.seats > self._max_running:
                return  # it stays at the front, or small ones would pass a large one for ever
            queue.popleft()
            line.queues.move_to_end(name)
            if not queue:
                del line.queues[name]
            passed_over = 0
            if not waiter.granted.done():
                line.count(name, running=waiter.seats)
                waiter.granted.set_result(None)


def _share(places: int, client: str | None) -> int:
    """Of so many places, those that one client can have."""
    return places if client is None else max(places - max(places // _LEFT_TO_OTHERS, 1), 1)


class Ticket:
    """A request's place in a model's line."""

    def __init__(self, turns: Turns, model: str, client: str | None, sequences: int, max_wait_s: float):
        self._turns = turns
        self._model = model
        self._client = client
        self._max_wait_s = max_wait_s
        self._unseated = sequences  # let in, without a seat yet
        self._spare = 0  # seats that were waited for and are not used yet

    async def first(self, sequences: int) -> None:
        """Wait for the seats of the request's first prompt; the first `seats` takes them over.

        Raises:
            RefusedError: with 503 if that takes too long.
        """
        try:
            async with asyncio.timeout(self._max_wait_s):
                self._spare = await self._acquire(sequences)
        except TimeoutError:
            raise RefusedError(
                503,
                f"the request waited {self._max_wait_s:g} s for its turn with {self._model!r}, the longest it may "
                "(--max-queue-wait): try again later",
                Retry_After="5",
            ) from None

    @asynccontextmanager
    async def seats(self, sequences: int) -> AsyncIterator[None]:
        """Seats for one prompt's sequences, until the context ends."""
        seats, self._spare = self._spare, 0
        seats = seats or await self._acquire(sequences)
        try:
            yield
        finally:
            self._turns._release(self._model, self._client or "", seats)

    def close(self) -> None:
        """The request has ended; sequences that outlive it keep their seats."""
        self._seated(self._unseated)
        spare, self._spare = self._spare, 0
        if spare:
            self._turns._release(self._model, self._client or "", spare)
        self._turns._forget_if_empty(self._model)

    async def _acquire(self, sequences: int) -> int:
        seats = self._turns._seats_for(self._client, sequences)
        await self._turns._acquire(self._model, self._client or "", seats)
        self._seated(min(sequences, self._unseated))
        return seats

    def _seated(self, sequences: int) -> None:
        self._unseated -= sequences
        self._turns._line(self._model).count(self._client or "", waiting=-sequences)
