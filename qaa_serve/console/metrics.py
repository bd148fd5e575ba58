"""What the server did in the last minutes, from its /metrics."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from qaa_serve.console.api import Api, ApiError

#: Series that the pages show; a page of /metrics with 200 adapters has a hundred thousand lines of others.
_GAUGES = (
    "qaa_requests_in_flight", "qaa_requests_waiting", "qaa_device_memory_bytes", "qaa_process_memory_bytes",
    "qaa_adapter_bytes",
)  # fmt: skip
_ASKED = (
    *_GAUGES, "qaa_requests_total", "qaa_tokens_total", "qaa_adapter_evictions_total", "qaa_request_seconds",
    "qaa_time_to_first_token_seconds", "qaa_inter_token_seconds", "qaa_adapter_load_seconds",
)  # fmt: skip

#: The label whose values are kept apart, of the series that have one of these.
_KIND_LABELS = ("le", "outcome", "kind", "process", "state", "tier")

#: Seconds between two looks, and how long they are kept; by adapter a look a minute: there may be 200 of them.
PERIOD_S, KEPT_S, _BY_ADAPTER_S = 3.0, 15 * 60.0, 60.0


@dataclass
class Use:
    """What was counted for one adapter, or for all.

    Attributes:
        series: of each series, by outcome, kind or, of a histogram, upper bound in seconds: the sum over all other
            labels.
    """

    series: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))

    def total(self, name: str, *kinds: str) -> float:
        """The sum of a series, of these kinds or of all."""
        values = self.series.get(name, {})
        return sum(values.get(kind, 0.0) for kind in kinds or values)

    @property
    def errors(self) -> float:
        """Requests that ended badly for the client, whoever is to blame."""
        return self.total("qaa_requests_total", "client_error", "server_error", "rejected")

    def count(self, histogram: str) -> float:
        """How many a histogram has."""
        return self.total(f"{histogram}_bucket", "+Inf")

    def quantile(self, histogram: str, q: float) -> float | None:
        """Seconds that a part `q` of them needed at most, straight between the bounds; None if there are none."""
        values = self.series.get(f"{histogram}_bucket", {})
        buckets = sorted((float(bound), value) for bound, value in values.items())
        if not buckets or not buckets[-1][1]:
            return None
        wanted = q * buckets[-1][1]
        at = bisect_left(buckets, wanted, key=lambda bucket: bucket[1])
        low, below = buckets[at - 1] if at else (0.0, 0.0)
        high, upto = buckets[at]
        return low if high == float("inf") else low + (high - low) * (wanted - below) / max(upto - below, 1e-12)

    def since(self, earlier: Use) -> Use:
        """What was added; all, if the server began anew since. Gauges stay as they are."""
        added = Use()
        for name, values in self.series.items():
            before = {} if name in _GAUGES else earlier.series.get(name, {})
            added.series[name] = {kind: value - before.get(kind, 0.0) for kind, value in values.items()}
            if name not in _GAUGES and min(added.series[name].values()) < 0:
                return self
        return added


@dataclass
class Look:
    """One page of /metrics: over all adapters, and by adapter."""

    time: float  # Unix time
    total: Use = field(default_factory=Use)
    adapters: dict[str, Use] = field(default_factory=lambda: defaultdict(Use))


class Step(NamedTuple):
    """What was added over all adapters in the seconds before a look."""

    time: float  # Unix time of the look
    seconds: float
    added: Use


def read(text: str) -> Look:
    """Read a page of /metrics, in the text format."""
    look = Look(time.time())
    lines = (line for line in text.splitlines() if line.removeprefix("# TYPE ").startswith(_ASKED))
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            kind = next((sample.labels[label] for label in _KIND_LABELS if label in sample.labels), "")
            look.total.series[sample.name][kind] += sample.value
            if (adapter := sample.labels.get("adapter")) is not None:
                look.adapters[adapter].series[sample.name][kind] += sample.value
    return look


class Observer:
    """Looks at a server again and again, and keeps the last minutes.

    Attributes:
        newest: the last page that was read.
        steps: what was added from each look to the next, the oldest first.
        problem: why the server cannot be looked at now; None: it can.
    """

    def __init__(self, api: Api):
        self._api = api
        self._by_adapter: deque[Look] = deque(maxlen=int(KEPT_S / _BY_ADAPTER_S))
        self.newest: Look | None = None
        self.steps: deque[Step] = deque(maxlen=int(KEPT_S / PERIOD_S))
        self.problem: str | None = None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                self.keep(await asyncio.to_thread(read, await self._api.metrics()))
                self.problem = None
            except (ApiError, ValueError) as error:
                self.problem = str(error)
            await asyncio.sleep(PERIOD_S)

    def keep(self, look: Look) -> None:
        """Take a page for the newest; what is too old goes."""
        if self.newest is not None:
            self.steps.append(Step(look.time, look.time - self.newest.time, look.total.since(self.newest.total)))
        self.newest = look
        if not self._by_adapter or look.time - self._by_adapter[-1].time >= _BY_ADAPTER_S:
            self._by_adapter.append(look)

    def use_of(self, adapter: str) -> Use:
        """What was counted for an adapter since the server's start."""
        return self.newest.adapters.get(adapter, Use()) if self.newest else Use()

    def by_adapter(self, seconds: float) -> tuple[float, dict[str, Use]]:
        """What was added by adapter in about the last seconds; and in how many really."""
        newest = self.newest
        if newest is None:
            return PERIOD_S, {}
        base = next(look for look in [*self._by_adapter, newest] if look.time >= newest.time - seconds)
        none = Use()
        added = {name: use.since(base.adapters.get(name, none)) for name, use in newest.adapters.items()}
        return max(newest.time - base.time, PERIOD_S), added
