"""Our Prometheus metrics, all of them; vLLM's own stand beside them under `vllm:`.

Everything is made in one place with the registry it is given, so that a test can have its own.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from qaa_serve import __version__
from qaa_serve.registry import Catalogue, Observer, Result, Revision

if TYPE_CHECKING:
    from qaa_serve.server.gate import Turns

Outcome: TypeAlias = Literal["success", "client_error", "server_error", "rejected", "aborted"]

#: What a request's path is called in labels; any other is `other`.
ENDPOINTS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/embeddings": "embeddings",
    "/tokenize": "tokenize",
    "/detokenize": "tokenize",
}

TOKEN_KINDS = ("prompt", "cached", "generated")

#: Labels of requests that name no model that is served, and of adapters that have no label of their own.
UNKNOWN, OTHER = "unknown", "other"


@dataclass(frozen=True)
class Family:
    """One metric, as docs/metrics.md lists it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    about: str


_LATENCY = ("adapter", "endpoint")

FAMILIES = (
    Family("qaa_request_seconds", "histogram", _LATENCY, "from a request's arrival to the end of its response"),
    Family("qaa_time_to_first_token_seconds", "histogram", _LATENCY, "from arrival to the first token, TTFT"),
    Family(
        "qaa_inter_token_seconds",
        "histogram",
        _LATENCY,
        "between a token and the one before it in the same choice; where only the whole answer is seen, its mean",
    ),
    Family(
        "qaa_queue_seconds", "histogram", _LATENCY, "waiting for the adapter's turn, then in the engine's queue"
    ),
    Family(
        "qaa_requests_total",
        "counter",
        (*_LATENCY, "outcome"),
        "requests that ended: success, client_error, server_error, rejected (429 and 503), aborted by the client",
    ),
    Family("qaa_requests_in_flight", "gauge", ("adapter",), "requests let through and not ended"),
    Family("qaa_requests_waiting", "gauge", ("adapter",), "those of them that wait for their turn"),
    Family("qaa_tokens_total", "counter", ("adapter", "kind"), "tokens: prompt, cached (of it), generated"),
    Family(
        "qaa_adapter_bytes",
        "gauge",
        ("adapter", "tier"),
        "store: weights file on disk; host: memory of the engine's workers; device: slots of the running batch",
    ),
    Family("qaa_adapter_cache_bytes", "gauge", (), "host tier, all adapters"),
    Family("qaa_adapter_cache_capacity_bytes", "gauge", (), "limit of the host tier, --adapter-cache-bytes"),
    Family(
        "qaa_device_memory_bytes",
        "gauge",
        ("device", "kind"),
        "weights, kv_cache, adapters (slots), other, free; on a CPU, of the worker's process and of its machine "
        "or container",
    ),
    Family("qaa_process_memory_bytes", "gauge", ("process",), "resident memory of the server, engine and workers"),
    Family("qaa_adapters", "gauge", ("state",), "adapters by state: served, rejected"),
    Family(
        "qaa_adapter_rejected",
        "gauge",
        ("adapter",),
        "1 while a directory's newest content is not served (other: how many)",
    ),
    Family("qaa_adapter_load_seconds", "histogram", (), "reading an adapter into the engine"),
    Family("qaa_adapter_swaps_total", "counter", ("result",), "published, rejected, removed, rolled_back"),
    Family(
        "qaa_adapter_rejections_total",
        "counter",
        ("reason",),
        "adapters refused: name, invalid, store (no room, disk), memory (cache full), engine",
    ),
    Family("qaa_adapter_evictions_total", "counter", ("tier",), "adapters that made room for others: host"),
    Family("qaa_circuit_seconds", "histogram", ("backend",), "the circuits of one layer in one step, sampled"),
    Family("qaa_ready", "gauge", (), "1 while requests are taken, as /ready says"),
    Family("qaa_draining", "gauge", (), "1 while the server takes no more requests"),
    Family("qaa_build_info", "gauge", ("version", "vllm", "torch"), "always 1"),
)

_BY_NAME = {family.name: family for family in FAMILIES}


def reference() -> str:
    """The metrics as Markdown, as docs/metrics.md has them."""
    rows = [
        f"| `{f.name}` | {f.kind} | {', '.join(f'`{label}`' for label in f.labels) or '-'} | {f.about} |"
        for f in FAMILIES
    ]
    return "\n".join(["| metric | kind | labels | what |", "|---|---|---|---|", *rows])


class AdapterLabels:
    """Which adapters have a label of their own: at most so many, the busiest.

    An adapter that has become clearly busier than the least busy labelled one takes its place: that one's
    series are removed, and later requests of it count as `other`. Every series so only ever grows.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._labelled: Tally[str] = Tally()
        self._others: Tally[str] = Tally()

    def seen(self, name: str) -> tuple[str, str | None]:
        """Count a request for an adapter.

        Returns:
            its label, and the label whose place it has taken, if any.
        """
        if name in self._labelled or len(self._labelled) < self.limit:
            self._labelled[name] += 1
            return name, None
        self._others[name] += 1
        if len(self._others) > 10 * self.limit + 100:  # bounded, whatever names come
            self._others = Tally(dict(self._others.most_common(5 * self.limit + 50)))
        least, count = min(self._labelled.items(), key=lambda item: item[1], default=("", 0))
        if self.limit and (count == 0 or self._others[name] > 1.5 * count + 10):
            self._labelled[name] = self._others.pop(name)
            self._others[least] = self._labelled.pop(least)
            return name, least
        return OTHER, None

    def __iter__(self) -> Iterator[str]:
        """Adapters that have a label of their own."""
        return iter(list(self._labelled))

    def of(self, name: str) -> str:
        """An adapter's label now; one that has none gets a free one, though nothing is counted."""
        if name not in self._labelled and len(self._labelled) < self.limit:
            self._labelled[name] = 0
        return name if name in self._labelled else OTHER


class ServerMetrics(Observer):
    """What is counted and timed as it happens."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        max_adapters: int = 200,
        latency_buckets: tuple[float, ...],
        first_token_buckets: tuple[float, ...],
        inter_token_buckets: tuple[float, ...],
    ):
        """Register everything.

        Args:
            registry: where.
            max_adapters: adapters with labels of their own.
            latency_buckets: bounds in seconds of whole requests and of queues.
            first_token_buckets: of times to first token.
            inter_token_buckets: of times between tokens.
        """
        self.labels = AdapterLabels(max_adapters)

        def histogram(name: str, buckets: tuple[float, ...]) -> Histogram:
            family = _BY_NAME[name]
            return Histogram(name, family.about, family.labels, registry=registry, buckets=buckets)

        def counter(name: str) -> Counter:
            family = _BY_NAME[name]
            return Counter(name, family.about, family.labels, registry=registry)

        self.request_seconds = histogram("qaa_request_seconds", latency_buckets)
        self.first_token_seconds = histogram("qaa_time_to_first_token_seconds", first_token_buckets)
        self.inter_token_seconds = histogram("qaa_inter_token_seconds", inter_token_buckets)
        self.queue_seconds = histogram("qaa_queue_seconds", latency_buckets)
        self.requests = counter("qaa_requests_total")
        self.tokens = counter("qaa_tokens_total")
        self.load_seconds = histogram("qaa_adapter_load_seconds", first_token_buckets)
        self.swaps = counter("qaa_adapter_swaps_total")
        self.rejections = counter("qaa_adapter_rejections_total")
        self.evictions = counter("qaa_adapter_evictions_total")
        self._of_adapters = (
            self.request_seconds, self.first_token_seconds, self.inter_token_seconds, self.queue_seconds,
            self.requests, self.tokens,
        )  # fmt: skip
        # Series that are there from the start: a rate needs the zero before the first event.
        for result in get_args(Result):
            self.swaps.labels(result)
        for kind in ("name", "invalid", "store", "memory", "engine"):
            self.rejections.labels(kind)
        self.evictions.labels("host")
        family = _BY_NAME["qaa_build_info"]
        self.build_info = Gauge(family.name, family.about, family.labels, registry=registry)

    def begin(self, model: str | None, path: str) -> Observation:
        """A request for a model (None: not one that is served) has come."""
        label, displaced = (UNKNOWN, None) if model is None else self.labels.seen(model)
        if displaced is not None:
            for metric in self._of_adapters:
                metric.remove_by_labels({"adapter": displaced})
        return Observation(self, label, ENDPOINTS.get(path, OTHER))

    def loaded(self, revision: Revision, seconds: float) -> None:
        """The engine has read a revision."""
        self.load_seconds.observe(seconds)

    def swapped(self, result: Result) -> None:
        """An adapter was published, rejected, removed or rolled back."""
        self.swaps.labels(result).inc()

    def rejected(self, kind: str) -> None:
        """An adapter was refused, for an AdapterError's kind."""
        self.rejections.labels(kind).inc()
        self.swapped("rejected")

    def evicted(self, revision: Revision) -> None:
        """A revision made room in host memory."""
        self.evictions.labels("host").inc()


class Observation:
    """One request, from its arrival to its end."""

    def __init__(self, metrics: ServerMetrics, adapter: str, endpoint: str):
        self.metrics = metrics
        self.labels = (adapter, endpoint)
        self.arrived = time.perf_counter()
        self.arrived_at = time.time()
        self.turn_s = 0.0
        self.first_token_s: float | None = None
        self.failed = False
        self.tokens: Tally[str] = Tally()
        self.seconds = 0.0

    def has_turn(self) -> None:
        """It waits no longer for its adapter's turn."""
        self.turn_s = time.perf_counter() - self.arrived

    def sequence(self) -> Sequence:
        """What watches one of the engine's requests for it; a request with several prompts has several."""
        return Sequence(self)

    def end(self, outcome: Outcome) -> None:
        """The response has ended, this way or that."""
        self.seconds = time.perf_counter() - self.arrived
        self.metrics.requests.labels(*self.labels, outcome).inc()
        self.metrics.request_seconds.labels(*self.labels).observe(self.seconds)


class Sequence:
    """Times and tokens of one request to the engine, with all its choices."""

    def __init__(self, observation: Observation):
        self._observation = observation
        metrics, labels = observation.metrics, observation.labels
        self._first_token_seconds = metrics.first_token_seconds.labels(*labels)
        self._inter_token_seconds = metrics.inter_token_seconds.labels(*labels)
        self._queue_seconds = metrics.queue_seconds.labels(*labels)
        self._counters = {kind: metrics.tokens.labels(labels[0], kind) for kind in TOKEN_KINDS}
        self._seen: dict[int, tuple[int, float]] = {}  # choice -> its tokens so far, and when the last one came
        self._started = False

    def saw(self, output: Any) -> None:
        """Take note of a vLLM RequestOutput: of one token, of several, or of a whole answer."""
        now = time.perf_counter()
        stats = output.metrics
        for choice in output.outputs:
            count, last = self._seen.get(choice.index, (0, 0.0))
            # vLLM's servers ask for deltas when they stream, and otherwise for the final answer alone.
            if not (new := len(choice.token_ids)):
                continue
            if not self._started:
                self._start(output, stats, now)
            if count:
                self._observe_gaps((now - last) / new, new)
            elif new > 1:
                # The whole answer at once: the engine's own clock says how long its tokens took.
                seconds = 0.0 if stats is None else stats.last_token_ts - stats.first_token_ts
                self._observe_gaps(max(seconds, 0.0) / (new - 1), new - 1)
            self._seen[choice.index] = (count + new, now)
            self._count("generated", new)
        if output.finished and not self._started:  # an answer without tokens
            self._started = True
            self._count_prompt(output)

    def _start(self, output: Any, stats: Any, now: float) -> None:
        self._started = True
        seen = self._observation
        if stats is not None and stats.first_token_latency > 0:
            first = stats.arrival_time - seen.arrived_at + stats.first_token_latency
            queued = max(stats.scheduled_ts - stats.queued_ts, 0.0)
        else:
            first, queued = now - seen.arrived, 0.0
        seen.first_token_s = first if seen.first_token_s is None else min(first, seen.first_token_s)
        self._first_token_seconds.observe(first)
        self._queue_seconds.observe(seen.turn_s + queued)
        self._count_prompt(output)

    def _count_prompt(self, output: Any) -> None:
        self._count("prompt", len(output.prompt_token_ids or ()))
        self._count("cached", output.num_cached_tokens or 0)

    def _observe_gaps(self, seconds: float, count: int) -> None:
        for _ in range(count):
            self._inter_token_seconds.observe(seconds)

    def _count(self, kind: str, number: int) -> None:
        self._counters[kind].inc(number)
        self._observation.tokens[kind] += number


@dataclass
class EngineAccount:
    """What the engine's workers said of themselves last.

    Attributes:
        adapters: id -> bytes in host memory and in slots.
        devices: device -> kind -> bytes.
        circuits: backend -> (bounds, counts of each bucket and beyond, sum in seconds).
    """

    adapters: Mapping[int, tuple[int, int]]
    devices: Mapping[str, Mapping[str, int]]
    circuits: Mapping[str, tuple[list[float], list[int], float]]


class StateCollector(Collector):
    """What is the case now, read when Prometheus asks, so that nothing stale stays behind."""

    def __init__(self, catalogue: Catalogue, turns: Turns, labels: AdapterLabels):
        self.account = EngineAccount({}, {}, {})
        self.status: Callable[[], str] = lambda: "loading"
        self._catalogue = catalogue
        self._turns = turns
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        """All families."""
        entries = list(self._catalogue.entries.values())
        cache = self._catalogue.cache
        served = sum(entry.current is not None for entry in entries)
        rejected = {entry.name: int(entry.rejection is not None) for entry in entries}
        yield _gauge("qaa_adapters", {("served",): served, ("rejected",): sum(rejected.values())})
        yield _gauge("qaa_adapter_rejected", self._by_label(rejected))
        turns = self._turns
        idle = dict.fromkeys((*rejected, *self._labels), 0)  # a zero is there to be seen, and to be plotted
        waiting = idle | {name: turns.waiting(name) for name in turns.running}
        in_flight = idle | {name: running + waiting[name] for name, running in turns.running.items()}
        yield _gauge("qaa_requests_in_flight", self._by_label(in_flight))
        yield _gauge("qaa_requests_waiting", self._by_label(waiting))
        tiers: Tally[tuple[str, ...]] = Tally()
        for entry in entries:
            label = self._labels.of(entry.name)
            for revision in entry.revisions():
                host, device = self.account.adapters.get(revision.int_id, (0, 0))
                for tier, nbytes in (("store", revision.nbytes), ("host", host), ("device", device)):
                    tiers[label, tier] += nbytes
        yield _gauge("qaa_adapter_bytes", tiers)
        yield _gauge("qaa_adapter_cache_bytes", {(): cache.nbytes})
        yield _gauge("qaa_adapter_cache_capacity_bytes", {(): cache.capacity})
        status = self.status()
        yield _gauge("qaa_ready", {(): status == "ready"})
        yield _gauge("qaa_draining", {(): status == "draining"})
        devices: dict[tuple[str, ...], float] = {
            (d, kind): size for d, kinds in self.account.devices.items() for kind, size in kinds.items()
        }
        yield _gauge("qaa_device_memory_bytes", devices)
        yield _gauge("qaa_process_memory_bytes", dict(_process_memory()))
        yield self._circuits()

    def _by_label(self, tally: Mapping[str, int]) -> Mapping[tuple[str, ...], int]:
        labelled: Tally[tuple[str, ...]] = Tally()
        for name, count in list(tally.items()):
            labelled[(self._labels.of(name),)] += count
        return labelled

    def _circuits(self) -> HistogramMetricFamily:
        family = _BY_NAME["qaa_circuit_seconds"]
        metric = HistogramMetricFamily(family.name, family.about, labels=family.labels)
        for backend, (bounds, counts, total_s) in self.account.circuits.items():
            cumulative, buckets = 0, []
            for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
                cumulative += count
                buckets.append((bound, cumulative))
            metric.add_metric([backend], buckets, total_s)
        return metric


def _gauge(name: str, values: Mapping[tuple[str, ...], float]) -> GaugeMetricFamily:
    family = _BY_NAME[name]
    metric = GaugeMetricFamily(name, family.about, labels=family.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric


def _process_memory() -> Iterator[tuple[tuple[str, ...], int]]:
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


def say_what_runs(metrics: ServerMetrics) -> None:
    """Fill in qaa_build_info."""
    import torch
    from vllm.version import __version__ as vllm_version

    metrics.build_info.labels(__version__, vllm_version, torch.__version__).set(1)
