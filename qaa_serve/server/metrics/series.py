"""Counters and histograms by their labels.

Only the event loop's thread counts. Any thread may read: what it reads of one series was so at one moment, but for
an observation that is under way. So no lock is taken, where prometheus_client takes two a token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from qaa_serve.server.metrics.families import Family
from qaa_serve.server.metrics.written import (
    Distribution,
    Labels,
    Value,
    Written,
    WrittenDistributions,
    WrittenValues,
)


class Count:
    """One series of a counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, number: float = 1.0) -> None:
        """Count."""
        self.value += number


class Observations:
    """One series of a histogram."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, or so many equal ones."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.total += value * times


S = TypeVar("S", Count, Observations)


class _Series(Collector, Generic[S]):
    """A family's series, by the first label's value and then by all of them."""

    def __init__(self, family: Family, registry: CollectorRegistry):
        self.family = family
        self._by_first: dict[Labels, dict[Labels, S]] = {}
        if not family.labels:
            self.at()
        registry.register(self)

    def at(self, *labels: str) -> S:
        """The series with these labels; it is there from now on."""
        try:
            return self._by_first[labels[:1]][labels]
        except KeyError:
            assert len(labels) == len(self.family.labels)
            return self._by_first.setdefault(labels[:1], {}).setdefault(labels, self._new())

    def end(self, first: str) -> None:
        """Series with this value of the first label are no more."""
        self._by_first.pop((first,), None)

    def describe(self) -> list[Metric]:
        """The family without its series; a registry asks."""
        return [Written(self.family)]

    def _new(self) -> S:
        raise NotImplementedError

    def _all(self) -> Iterator[tuple[Labels, S]]:
        for alike in list(self._by_first.values()):
            yield from list(alike.items())


class Counters(_Series[Count]):
    """A family of counters."""

    def collect(self) -> list[Metric]:
        """The family, with its series as they are when it is written."""
        return [WrittenValues(self.family, self._values)]

    def _values(self) -> Iterator[Value]:
        return ((labels, count.value) for labels, count in self._all())

    def _new(self) -> Count:
        return Count()


class Histograms(_Series[Observations]):
    """A family of histograms with the same upper bounds, the infinite one left out."""

    def __init__(self, family: Family, registry: CollectorRegistry, bounds: tuple[float, ...]):
        self._bounds = bounds
        super().__init__(family, registry)

    def collect(self) -> list[Metric]:
        """The family, with its series as they are when it is written."""
        return [WrittenDistributions(self.family, self._bounds, self._distributions)]

    def _distributions(self) -> Iterator[Distribution]:
        return ((labels, tuple(series.counts), series.total) for labels, series in self._all())

    def _new(self) -> Observations:
        return Observations(self._bounds)
