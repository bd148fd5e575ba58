"""A family's lines as they are scraped, without prometheus_client's samples between.

prometheus_client makes a tuple and a dict of every line, and then looks at each character of its names: with
hundreds of adapters that is most of a second for a page. A family here writes its lines itself; samples are made
only if somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from prometheus_client.core import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from qaa_serve.server.metrics.families import Family

Labels: TypeAlias = tuple[str, ...]


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

    def head(self, openmetrics: bool) -> bytes:
        """The lines before the series: OpenMetrics calls a counter by its name without `_total`."""
        name = self.name if openmetrics else self.family.name
        return f"# HELP {name} {self.documentation}\n# TYPE {name} {self.type}\n".encode()

    def lines(self) -> Iterator[bytes]:
        """The series, in pieces of whole lines; the same in both formats."""
        raise NotImplementedError

    def _samples(self) -> Iterator[Sample]:
        raise NotImplementedError


class WrittenGauge(Written):
    """A gauge's family: its series are what `read` gives, labels and value, each time it is called."""

    def __init__(self, family: Family, read: Callable[[], Iterable[tuple[Labels, float]]]):
        super().__init__(family)
        self._read = read

    def lines(self) -> Iterator[bytes]:
        """See Written."""
        name, labels = self.family.name, self.family.labels
        for values, number in self._read():
            yield f"{name}{in_braces(pairs(labels, values))} {floatToGoString(number)}\n".encode()

    def _samples(self) -> Iterator[Sample]:
        for values, number in self._read():
            yield Sample(self.family.name, dict(zip(self.family.labels, values, strict=True)), number)


def pairs(labels: Labels, values: Labels) -> str:
    """Labels and their values as they stand between braces."""
    return ",".join([f'{label}="{_escaped(value)}"' for label, value in zip(labels, values, strict=True)])


def in_braces(pairs: str) -> str:
    """Pairs as they stand after a name."""
    return f"{{{pairs}}}" if pairs else ""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
