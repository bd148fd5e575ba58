"""What the server did in the last minutes, from its /metrics."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

from qaa_serve.console.api import ApiError, Connection

#: Series that the pages show; a page of /metrics with 200 adapters has a hundred thousand lines of others.
HISTOGRAMS = (
    "qaa_request_seconds", "qaa_time_to_first_token_seconds", "qaa_inter_token_seconds",
    "qaa_adapter_load_seconds",
)  # fmt: skip
_TOTALS = ("qaa_requests_total", "qaa_tokens_total", "qaa_adapter_evictions_total")
_GAUGES = (
    "qaa_requests_in_flight", "qaa_requests_waiting", "qaa_device_memory_bytes", "qaa_process_memory_bytes",
    "qaa_adapter_bytes",
)  # fmt: skip
_ASKED = (*HISTOGRAMS, *_TOTALS, *_GAUGES)
_KIND_OF_LABEL = ("outcome", "kind", "process", "state", "tier")

#: Seconds between two looks, and how long they are kept.
PERIOD_S, KEPT_S = 3.0, 15 * 60.0

#: Seconds between two looks whose numbers by adapter are kept too: there may be 200 adapters.
_BY_ADAPTER_S = 60.0


@dataclass
class Histogram:
    """A cumulative histogram.

    Attributes:
        buckets: of each upper bound, in seconds, how many were at most that.
    """

    buckets: dict[float, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def count(self) -> float:
        """How many there are."""
        return max(self.buckets.values(), default=0.0)

    def since(self, earlier: Histogram) -> Histogram:
        """What was added; all, if the server began anew since."""
        if earlier.count > self.count:
            return self
        return Histogram({bound: count - earlier.buckets.get(bound, 0.0) for bound, count in self.buckets.items()})

    def quantile(self, q: float) -> float | None:
        """Seconds that a part `q` of them needed at most, straight between the bounds; None if there are none."""
        bounds = sorted(self.buckets)
        counts = [self.buckets[bound] for bound in bounds]
        if not counts or not counts[-1]:
            return None
        wanted = q * counts[-1]
        at = bisect_left(counts, wanted)
        low, below = (bounds[at - 1], counts[at - 1]) if at else (0.0, 0.0)
        if bounds[at] == float("inf"):
            return low
        return low + (bounds[at] - low) * (wanted - below) / max(counts[at] - below, 1e-12)


@dataclass
class Use:
    """What was counted for one adapter, or for all.

    Attributes:
        histograms: by the name of the series.
        counts: by (name of the series, outcome or kind).
    """

    histograms: dict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    counts: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    def total(self, name: str, *kinds: str) -> float:
        """The sum of a series, of these kinds or of all."""
        return sum(
            value for (key, kind), value in self.counts.items() if key == name and kind in (kinds or (kind,))
        )

    @property
    def errors(self) -> float:
        """Requests that ended badly for the client, whoever is to blame."""
        return self.total("qaa_requests_total", "client_error", "server_error", "rejected")

    def since(self, earlier: Use) -> Use:
        """What was added; all, if the server began anew since. Gauges stay as they are."""
        anew = any(value < earlier.counts.get(key, 0.0) for key, value in self.counts.items() if key[0] in _TOTALS)
        if anew:
            return self
        return Use(
            {name: histogram.since(earlier.histograms[name]) if name in earlier.histograms else histogram
             for name, histogram in self.histograms.items()},
            {key: value - (earlier.counts.get(key, 0.0) if key[0] in _TOTALS else 0.0)
             for key, value in self.counts.items()},
        )  # fmt: skip


@dataclass
class Look:
    """One page of /metrics.

    Attributes:
        time: Unix time.
        total: over all adapters.
        adapters: by adapter.
    """

    time: float
    total: Use
    adapters: dict[str, Use] = field(default_factory=lambda: defaultdict(Use))


def read(text: str) -> Look:
    """Read a page of /metrics, in the text format."""
    look = Look(time.time(), Use())
    lines = (line for line in text.splitlines() if line.removeprefix("# TYPE ").startswith(_ASKED))
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            uses = [look.total]
            if (adapter := sample.labels.get("adapter")) is not None:
                uses.append(look.adapters[adapter])
            for use in uses:
                if sample.name.endswith("_bucket"):
                    use.histograms[family.name].buckets[float(sample.labels["le"])] += sample.value
                elif sample.name in _ASKED:
                    kind = next((sample.labels[label] for label in _KIND_OF_LABEL if label in sample.labels), "")
                    use.counts[sample.name, kind] += sample.value
    return look


class Observer:
    """Looks at a server again and again, and keeps the last minutes.

    Attributes:
        newest: the last page that was read.
        problem: why the server cannot be looked at now; None: it can.
    """

    def __init__(self, connection: Connection):
        self._connection = connection
        self._totals: deque[tuple[float, Use]] = deque(maxlen=int(KEPT_S / PERIOD_S))
        self._by_adapter: deque[Look] = deque(maxlen=int(KEPT_S / _BY_ADAPTER_S))
        self.newest: Look | None = None
        self.problem: str | None = None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                text = await self._connection.metrics()
                self.keep(await asyncio.to_thread(read, text))
                self.problem = None
            except (ApiError, ValueError) as error:
                self.problem = str(error)
            await asyncio.sleep(PERIOD_S)

    def keep(self, look: Look) -> None:
        """Take a page for the newest; what is too old goes."""
        self.newest = look
        self._totals.append((look.time, look.total))
        if not self._by_adapter or look.time - self._by_adapter[-1].time >= _BY_ADAPTER_S:
            self._by_adapter.append(look)

    def steps(self) -> Iterator[tuple[float, float, Use]]:
        """Of each two looks in succession: the Unix time, the seconds between, and what was added."""
        for (before, earlier), (now, later) in pairwise(list(self._totals)):
            yield now, now - before, later.since(earlier)

    def by_adapter(self, seconds: float) -> tuple[float, dict[str, Use]]:
        """What was added by adapter in about the last seconds; and in how many really."""
        newest = self.newest
        if newest is None:
            return PERIOD_S, {}
        base = next(look for look in [*self._by_adapter, newest] if look.time >= newest.time - seconds)
        none = Use()
        added = {name: use.since(base.adapters.get(name, none)) for name, use in newest.adapters.items()}
        return max(newest.time - base.time, PERIOD_S), added
