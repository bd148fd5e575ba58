"""What is the case now, read when Prometheus asks, so that nothing stale stays behind."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import psutil
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from qaa_serve import __version__
from qaa_serve.registry import Catalogue
from qaa_serve.server.account import EngineAccount
from qaa_serve.server.metrics.families import FAMILIES, family
from qaa_serve.server.metrics.labels import OTHER, BoundedLabels
from qaa_serve.server.metrics.written import Labels, Written, WrittenGauge

#: Names in a label of vllm:lora_requests_info: as it is one string, its length is bounded too.
MAX_NAMES = 200


class TurnCounts(Protocol):
    """Who has requests now."""

    def names(self) -> list[str]:
        """Models with requests that run or wait."""

    def counts(self, name: str) -> tuple[int, int]:
        """A model's requests: running, waiting."""


class Monitor(Protocol):
    """What is known of the engine."""

    @property
    def account(self) -> EngineAccount:
        """What it said of itself last."""

    @property
    def age_s(self) -> float:
        """Seconds since then."""


class Ageing(Protocol):
    """What was true some time ago."""

    @property
    def age_s(self) -> float:
        """Seconds since then."""


class StateCollector(Collector):
    """What is the case now.

    It is read in a thread of its own while the event loop changes what it reads. So whatever is iterated is copied
    first (list() of a dict's values runs in one piece), and nothing is changed here.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        follower: Ageing,
        turns: TurnCounts,
        labels: BoundedLabels,
        monitor: Monitor,
        status: Callable[[], str],
        *,
        max_loras: int,
    ):
        """Read these whenever Prometheus asks.

        Args:
            catalogue: the adapters.
            follower: what follows their source.
            turns: who has requests now.
            labels: the adapters with a label of their own.
            monitor: what is known of the engine.
            status: as /ready says it.
            max_loras: adapters in one batch.
        """
        self._catalogue = catalogue
        self._follower = follower
        self._turns = turns
        self._labels = labels
        self._monitor = monitor
        self._status = status
        self._max_loras = max_loras

    def describe(self) -> list[Metric]:
        """The families without their series; a registry asks."""
        return [Written(f) for f in FAMILIES if f.name in STATE]

    def collect(self) -> Iterator[Metric]:
        """All families."""
        account = self._monitor.account
        labelled = self._labels.with_room_for(list(self._catalogue.entries))
        yield from self._requests(labelled)
        yield from self._adapters(account, labelled)
        cache = self._catalogue.cache
        yield _gauge("qaa_adapter_cache_bytes", {(): cache.nbytes})
        yield _gauge("qaa_adapter_cache_capacity_bytes", {(): cache.capacity})
        status = self._status()
        yield _gauge("qaa_ready", {(): status == "ready"})
        yield _gauge("qaa_draining", {(): status == "draining"})
        yield _gauge("qaa_source_age_seconds", {(): self._follower.age_s})
        yield _gauge("qaa_catalogue_fingerprint", {(): int(self._catalogue.fingerprint(), 16)})
        yield from _engine(account, self._monitor.age_s)
        yield _gauge("qaa_process_memory_bytes", dict(_process_memory()))

    def _requests(self, labelled: frozenset[str]) -> Iterator[Metric]:
        """Requests of each model now."""
        idle = dict.fromkeys((*labelled, *([OTHER] if len(self._catalogue.entries) > len(labelled) else [])), 0)
        counts = {name: self._turns.counts(name) for name in self._turns.names()}
        in_flight = {**idle, **{name: sum(count) for name, count in counts.items()}}
        waiting = {**idle, **{name: waits for name, (_, waits) in counts.items()}}
        yield _gauge("qaa_requests_in_flight", _by_label(in_flight, labelled))
        yield _gauge("qaa_requests_waiting", _by_label(waiting, labelled))
        served = self._catalogue.entries
        adapters = {name: count for name, count in counts.items() if name in served}
        running = _names([name for name, (runs, _) in adapters.items() if runs])
        waits = _names([name for name, (_, waits) in adapters.items() if waits])
        yield _gauge("vllm:lora_requests_info", {(running, waits, str(self._max_loras)): time.time()})

    def _adapters(self, account: EngineAccount, labelled: frozenset[str]) -> Iterator[Metric]:
        """Adapters by state, and where they are; of those without a label of their own only sums are kept."""
        catalogue = self._catalogue
        entries = [entry for name in labelled if (entry := catalogue.entries.get(name)) is not None]
        current = {entry.name: r for entry in entries if (r := entry.current) is not None}
        has_others = len(catalogue.entries) > len(entries)
        tiers: Tally[Labels] = Tally()
        nbytes: Tally[Labels] = Tally()
        for revision in catalogue.cache.revisions():
            label = revision.name if revision.name in labelled else OTHER
            host, device = account.adapters.get(revision.int_id, (0, 0))
            nbytes[label, "host"] += host
            nbytes[label, "device"] += device
            if catalogue.is_current(revision):
                tiers[label, "device" if device else "host"] += 1
        for name, revision in current.items():
            nbytes[name, "store"] = revision.nbytes
            for tier in ("host", "device"):
                nbytes[name, tier] += 0
            if not (tiers[name, "host"] or tiers[name, "device"]):
                tiers[name, "store"] = 1
        if has_others:
            nbytes[OTHER, "store"] = catalogue.served_bytes - sum(r.nbytes for r in current.values())
            elsewhere = tiers[OTHER, "host"] + tiers[OTHER, "device"]
            tiers[OTHER, "store"] = catalogue.counts["served"] - len(current) - elsewhere
        rejected = {entry.name: int(entry.rejection is not None) for entry in entries}
        if has_others:
            rejected[OTHER] = catalogue.rejections - sum(rejected.values())
        counts = catalogue.counts
        yield _gauge(
            "qaa_adapters",
            {("served",): counts["served"], ("rejected",): catalogue.rejections, ("unchecked",): counts["known"]},
        )
        yield _gauge("qaa_adapter_rejected", {(name,): count for name, count in rejected.items()})
        yield _gauge("qaa_adapter_bytes", nbytes)
        yield _gauge("qaa_adapter_tier", {labels: count for labels, count in tiers.items() if count})


#: What StateCollector yields.
STATE = frozenset({
    "qaa_requests_in_flight", "qaa_requests_waiting", "vllm:lora_requests_info", "qaa_adapters",
    "qaa_adapter_rejected", "qaa_adapter_bytes", "qaa_adapter_tier", "qaa_adapter_cache_bytes",
    "qaa_adapter_cache_capacity_bytes", "qaa_ready", "qaa_draining",
    "qaa_source_age_seconds", "qaa_catalogue_fingerprint", "qaa_engine_account_age_seconds",
    "qaa_device_memory_bytes", "qaa_circuit_seconds", "qaa_process_memory_bytes",
})  # fmt: skip


def _engine(account: EngineAccount, age_s: float) -> Iterator[Metric]:
    """What the engine says of itself."""
    yield _gauge("qaa_engine_account_age_seconds", {(): age_s})
    devices: dict[Labels, float] = {
        (device, kind): size for device, kinds in account.devices.items() for kind, size in kinds.items()
    }
    yield _gauge("qaa_device_memory_bytes", devices)
    circuits = family("qaa_circuit_seconds")
    metric = HistogramMetricFamily(circuits.name, circuits.about, labels=circuits.labels)
    for backend, (bounds, counts, total_s) in account.circuits.items():
        cumulative, buckets = 0, []
        for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
            cumulative += count
            buckets.append((bound, cumulative))
        metric.add_metric([backend], buckets, total_s)
    yield metric


def _by_label(tally: Mapping[str, int], labelled: frozenset[str]) -> Mapping[Labels, int]:
    """Sums by label."""
    sums: Tally[Labels] = Tally()
    for name, count in tally.items():
        sums[(name if name in labelled else OTHER,)] += count
    return sums


def _names(names: list[str]) -> str:
    """Names in one label; the first in the order of letters, if there are too many."""
    return ",".join(sorted(names)[:MAX_NAMES])


def _gauge(name: str, values: Mapping[Labels, float]) -> WrittenGauge:
    return WrittenGauge(family(name), values.items)


def _process_memory() -> Iterator[tuple[Labels, int]]:
    """Resident memory of this process and of those it started, by what they are."""
    here = psutil.Process()
    yield ("server",), here.memory_info().rss
    names: Tally[str] = Tally()
    for process in here.children(recursive=True):
        try:
            title, rss = " ".join(process.cmdline()), process.memory_info().rss
        except psutil.Error:
            continue
        kind = "engine" if "EngineCore" in title else "worker" if "Worker" in title else "other"
        number, names[kind] = names[kind], names[kind] + 1
        yield (f"{kind}-{number}" if kind == "worker" else kind,), rss


def say_what_runs(registry: CollectorRegistry, backend: str, seconds: Mapping[str, float]) -> None:
    """Register qaa_build_info and qaa_circuit_backend_seconds.

    Args:
        registry: of the server.
        backend: that the circuits run on.
        seconds: what each backend took that was timed for the choice.
    """
    import torch
    from vllm.version import __version__ as vllm_version

    build = family("qaa_build_info")
    gauge = Gauge(build.name, build.about, build.labels, registry=registry)
    gauge.labels(__version__, vllm_version, torch.__version__, backend).set(1)
    timed = family("qaa_circuit_backend_seconds")
    gauge = Gauge(timed.name, timed.about, timed.labels, registry=registry)
    for name, taken in seconds.items():
        gauge.labels(name).set(taken)
