"""Counters and histograms by their labels.

Only the event loop's thread counts, so no lock is taken, where prometheus_client takes two a token. Any thread may
write a page: what it reads of one series was so at one moment, but for an observation that is under way.

A series keeps its lines until it changes, since most have not changed from one scrape to the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from qaa_serve.server.metrics.families import Family
from qaa_serve.server.metrics.written import Labels, Written, in_braces, pairs


class Count:
    """One series of a counter."""

    __slots__ = ("_value_written", "_written", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._value_written = -1.0
        self._written = b""

    def inc(self, number: float = 1.0) -> None:
        """Count."""
        self.value += number

    def lines(self, family: Family, labels: Labels) -> bytes:
        """Its line."""
        if (value := self.value) != self._value_written:
            named = family.name + in_braces(pairs(family.labels, labels))
            self._written = f"{named} {floatToGoString(value)}\n".encode()
            self._value_written = value
        return self._written


class Observations:
    """One series of a histogram."""

    __slots__ = ("_bounds", "_count_written", "_written", "count", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]):
        self.counts = [0] * (len(bounds) + 1)  # by bucket, the last beyond all bounds
        self.count = 0
        self.total = 0.0
        self._bounds = bounds
        self._count_written = -1
        self._written = b""

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, or so many equal ones."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.total += value * times
        self.count += times  # last: lines that were written before it are written again

    def lines(self, template: str, family: Family, labels: Labels) -> bytes:
        """Its lines, after a template for the numbers, where a NUL stands for the labels."""
        if (count := self.count) != self._count_written:
            sums = tuple(accumulate(self.counts))
            numbers = template % (*sums, sums[-1], floatToGoString(self.total))
            self._written = numbers.replace("\0", pairs(family.labels, labels)).encode()  # last: they may hold a %
            self._count_written = count
        return self._written


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

    def end(self, *first: str) -> None:
        """Series whose labels begin with these are no more."""
        if len(first) == 1:
            self._by_first.pop(first, None)
            return
        alike = self._by_first.get(first[:1], {})
        for labels in [labels for labels in alike if labels[: len(first)] == first]:
            del alike[labels]

    def describe(self) -> list[Metric]:
        """The family without its series; a registry asks."""
        return [Written(self.family)]

    def collect(self) -> list[Metric]:
        """The family; its series are read when it is written."""
        return [_WrittenSeries(self)]

    def lines(self) -> Iterator[bytes]:
        """All series, those together whose first label is the same."""
        for alike in list(self._by_first.values()):
            yield b"".join([self._lines(labels, series) for labels, series in list(alike.items())])

    def samples(self) -> Iterator[Sample]:
        """All series as prometheus_client has them."""
        for alike in list(self._by_first.values()):
            for labels, series in list(alike.items()):
                yield from self._samples(dict(zip(self.family.labels, labels, strict=True)), series)

    def _new(self) -> S:
        raise NotImplementedError

    def _lines(self, labels: Labels, series: S) -> bytes:
        raise NotImplementedError

    def _samples(self, labels: dict[str, str], series: S) -> Iterator[Sample]:
        raise NotImplementedError


class Counters(_Series[Count]):
    """A family of counters."""

    def _new(self) -> Count:
        return Count()

    def _lines(self, labels: Labels, series: Count) -> bytes:
        return series.lines(self.family, labels)

    def _samples(self, labels: dict[str, str], series: Count) -> Iterator[Sample]:
        yield Sample(self.family.name, labels, series.value)


class Histograms(_Series[Observations]):
    """A family of histograms with the same upper bounds, the infinite one left out."""

    def __init__(self, family: Family, registry: CollectorRegistry, bounds: tuple[float, ...]):
        self._bounds = bounds
        self._bound_names = [floatToGoString(bound) for bound in (*bounds, float("inf"))]
        name = family.name
        own, more = ("{\0}", "\0,") if family.labels else ("", "")
        buckets = [f'{name}_bucket{{{more}le="{bound}"}} %d.0\n' for bound in self._bound_names]
        self._template = "".join([*buckets, f"{name}_count{own} %d.0\n{name}_sum{own} %s\n"])
        super().__init__(family, registry)

    def _new(self) -> Observations:
        return Observations(self._bounds)

    def _lines(self, labels: Labels, series: Observations) -> bytes:
        return series.lines(self._template, self.family, labels)

    def _samples(self, labels: dict[str, str], series: Observations) -> Iterator[Sample]:
        name = self.family.name
        sums = list(accumulate(series.counts))
        for bound, number in zip(self._bound_names, sums, strict=True):
            yield Sample(f"{name}_bucket", {**labels, "le": bound}, number)
        yield Sample(f"{name}_count", labels, sums[-1])
        yield Sample(f"{name}_sum", labels, series.total)


class _WrittenSeries(Written):
    """A family of series as it is scraped."""

    def __init__(self, series: _Series[Any]):
        super().__init__(series.family)
        self._series = series

    def lines(self) -> Iterator[bytes]:
        """See Written."""
        return self._series.lines()

    def _samples(self) -> Iterator[Sample]:
        return self._series.samples()
