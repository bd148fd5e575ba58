"""What the catalogue and the gate say to Prometheus: read when it asks, so that nothing stale stays behind."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qaa_serve.registry import NAME_PATTERN, Catalogue
from qaa_serve.server.gate import Gate


class CatalogueCollector(Collector):
    """Adapters by state, rejections, requests and bytes.

    Label values are names of adapters that were published, or of directories that could be: whoever can write
    to the adapters directory sets how many there are.
    """

    def __init__(self, catalogue: Catalogue, gate: Gate):
        self._catalogue = catalogue
        self._gate = gate

    def collect(self) -> Iterator[Metric]:
        """All families."""
        entries = list(self._catalogue.entries.values())
        states = GaugeMetricFamily("qaa_adapters", "Adapters by state", labels=["state"])
        states.add_metric(["served"], sum(entry.current is not None for entry in entries))
        states.add_metric(["rejected"], sum(entry.rejection is not None for entry in entries))
        yield states
        rejected = GaugeMetricFamily(
            "qaa_adapter_rejected",
            "1 while the newest content of an adapter's directory is not served",
            labels=["adapter"],
        )
        for entry in entries:
            if entry.rejection is not None:
                known = NAME_PATTERN.fullmatch(entry.name) is not None
                rejected.add_metric([entry.name if known else "(not a name)"], 1)
        yield rejected
        published = GaugeMetricFamily(
            "qaa_adapter_published_timestamp_seconds",
            "When the current revision was published, as Unix time",
            labels=["adapter", "revision"],
        )
        for entry in entries:
            if entry.current is not None and entry.published is not None:
                published.add_metric([entry.name, entry.current.short_digest], entry.published)
        yield published
        turns = self._gate.turns
        running = GaugeMetricFamily("qaa_requests_running", "Requests in the engine", labels=["model"])
        waiting = GaugeMetricFamily("qaa_requests_waiting", "Requests waiting for their turn", labels=["model"])
        for name, count in list(turns.running.items()):
            running.add_metric([name], count)
            waiting.add_metric([name], turns.waiting(name))
        yield running
        yield waiting
        cache = self._catalogue.cache
        memory = GaugeMetricFamily("qaa_adapter_bytes", "Bytes of adapters by tier", labels=["tier"])
        memory.add_metric(["host"], cache.nbytes)
        memory.add_metric(["store"], self._catalogue.store.nbytes())
        yield memory
        yield GaugeMetricFamily("qaa_adapter_cache_capacity_bytes", "Limit of the host tier", value=cache.capacity)
        yield GaugeMetricFamily(
            "qaa_draining", "1 while the server takes no more requests", value=self._gate.draining
        )
