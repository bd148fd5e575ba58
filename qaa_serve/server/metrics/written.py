"""A family's lines as they are scraped, without prometheus_client's samples between.

prometheus_client makes a tuple and a dict of every line, and then looks at each character of its names: with
hundreds of adapters that is most of a second for a page. A family here writes its lines itself; samples are made
only if somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TypeAlias

from prometheus_client.core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from qaa_serve.server.metrics.families import Family

Labels: TypeAlias = tuple[str, ...]

#: One series of a counter or gauge.
Value: TypeAlias = tuple[Labels, float]

#: One series of a histogram: observations by bucket, the last beyond all bounds, and their sum.
Distribution: TypeAlias = tuple[Labels, Sequence[int], float]


class Written(Metric):
    """A family that writes its own lines."""

    def __init__(self, family: Family):
        super().__init__(family.name.removesuffix("_total"), family.about, family.kind)
        self.family = family

    @property
    def samples(self) -> list[Sample]:
        """What prometheus_client would write; made anew each time."""
        return list(self._samples())

    @samples.setter
    def samples(self, samples: list[Sample]) -> None:
        """Ignored: Metric's own constructor sets none."""

    def head(self, openmetrics: bool) -> str:
        """The lines before the series."""
        name = self.name if openmetrics else self.family.name
        return f"# HELP {name} {self.documentation}\n# TYPE {name} {self.type}\n"

    def lines(self) -> Iterator[str]:
        """The series, in pieces of whole lines; the same in both formats."""
        raise NotImplementedError

    def _samples(self) -> Iterator[Sample]:
        raise NotImplementedError


class WrittenValues(Written):
    """A counter's or gauge's family.

    `read` gives its series each time anew.
    """

    def __init__(self, family: Family, read: Callable[[], Iterable[Value]]):
        super().__init__(family)
        self._read = read

    def lines(self) -> Iterator[str]:
        """See Written."""
        name, labels = self.family.name, self.family.labels
        for values, number in self._read():
            yield f"{name}{_braces(labels, values)} {floatToGoString(number)}\n"

    def _samples(self) -> Iterator[Sample]:
        for values, number in self._read():
            yield Sample(self.family.name, dict(zip(self.family.labels, values, strict=True)), number)


class WrittenDistributions(Written):
    """A histogram's family.

    `read` gives its series each time anew; `bounds` are the buckets' but the last's, which is all the rest.
    """

    def __init__(self, family: Family, bounds: Sequence[float], read: Callable[[], Iterable[Distribution]]):
        super().__init__(family)
        self._bounds = [floatToGoString(bound) for bound in (*bounds, float("inf"))]
        self._read = read

    def lines(self) -> Iterator[str]:
        """See Written."""
        # One formatting of numbers and one replacement a series, both in C. Labels come last: they may hold a %.
        name = self.family.name
        own, more = ("{\0}", "\0,") if self.family.labels else ("", "")
        buckets = [f'{name}_bucket{{{more}le="{bound}"}} %d.0\n' for bound in self._bounds]
        template = "".join([*buckets, f"{name}_count{own} %d.0\n{name}_sum{own} %s\n"])
        for values, counts, total in self._read():
            sums = tuple(accumulate(counts))
            written = template % (*sums, sums[-1], floatToGoString(total))
            yield written.replace("\0", _pairs(self.family.labels, values))

    def _samples(self) -> Iterator[Sample]:
        name = self.family.name
        for values, counts, total in self._read():
            labels = dict(zip(self.family.labels, values, strict=True))
            sums = list(accumulate(counts))
            for bound, number in zip(self._bounds, sums, strict=True):
                yield Sample(f"{name}_bucket", {**labels, "le": bound}, number)
            yield Sample(f"{name}_count", labels, sums[-1])
            yield Sample(f"{name}_sum", labels, total)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _pairs(labels: Labels, values: Labels) -> str:
    return ",".join([f'{label}="{_escaped(value)}"' for label, value in zip(labels, values, strict=True)])


def _braces(labels: Labels, values: Labels) -> str:
    return f"{{{_pairs(labels, values)}}}" if labels else ""
