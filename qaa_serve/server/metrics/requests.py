"""What is counted and timed as it happens: requests, their tokens, and the life of adapters."""

from __future__ import annotations

import time
from collections import Counter as Tally
from typing import Any, Literal, TypeAlias, get_args

from prometheus_client import CollectorRegistry

from qaa_serve.registry import Observer, Result, Revision
from qaa_serve.server.metrics.families import family
from qaa_serve.server.metrics.labels import OTHER, UNKNOWN, BoundedLabels, RecentLabels
from qaa_serve.server.metrics.series import Counters, Histograms

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

#: Aliases, and revisions of each, with labels of their own.
MAX_ALIASES, MAX_ALIAS_REVISIONS = 100, 20

TOKEN_KINDS = ("prompt", "cached", "generated")


class ServerMetrics(Observer):
    """What is counted and timed as it happens; only the event loop's thread may.

    Whoever counts asks for the label of an adapter or key at that moment, never before: one that was displaced
    while its request was under way counts as `other`, or its series would come back and stay.

    Attributes:
        labels: the adapters, and the base model, that have a label of their own.
        key_labels: the keys that have one.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        max_adapters: int = 200,
        max_keys: int = 100,
        latency_buckets: tuple[float, ...],
        first_token_buckets: tuple[float, ...],
        inter_token_buckets: tuple[float, ...],
    ):
        """Register everything.

        Args:
            registry: where.
            max_adapters: adapters with labels of their own.
            max_keys: clients' keys with labels of their own.
            latency_buckets: bounds in seconds of whole requests and of queues.
            first_token_buckets: of times to first token.
            inter_token_buckets: of times between tokens.
        """
        self.labels = BoundedLabels(max_adapters)
        self.key_labels = BoundedLabels(max_keys)

        def histograms(name: str, bounds: tuple[float, ...]) -> Histograms:
            return Histograms(family(name), registry, tuple(bounds))

        def counters(name: str) -> Counters:
            return Counters(family(name), registry)

        self.request_seconds = histograms("qaa_request_seconds", latency_buckets)
        self.first_token_seconds = histograms("qaa_time_to_first_token_seconds", first_token_buckets)
        self.inter_token_seconds = histograms("qaa_inter_token_seconds", inter_token_buckets)
        self.queue_seconds = histograms("qaa_queue_seconds", latency_buckets)
        self.requests = counters("qaa_requests_total")
        self.tokens = counters("qaa_tokens_total")
        self.key_requests = counters("qaa_key_requests_total")
        self.key_tokens = counters("qaa_key_tokens_total")
        self.wrong_keys = counters("qaa_wrong_keys_total")
        self.load_seconds = histograms("qaa_adapter_load_seconds", first_token_buckets)
        self.swaps = counters("qaa_adapter_swaps_total")
        self.rejections = counters("qaa_adapter_rejections_total")
        self.evictions = counters("qaa_adapter_evictions_total")
        self.alias_requests = counters("qaa_alias_requests_total")
        self.alias_seconds = histograms("qaa_alias_request_seconds", latency_buckets)
        self._aliases = RecentLabels(MAX_ALIASES)
        self._alias_revisions: dict[str, RecentLabels] = {}
        self._by_alias = (self.alias_requests, self.alias_seconds)
        self._by_adapter: tuple[Counters | Histograms, ...] = (
            self.request_seconds, self.first_token_seconds, self.inter_token_seconds, self.queue_seconds,
            self.requests, self.tokens,
        )  # fmt: skip
        self._by_key = (self.key_requests, self.key_tokens)
        # Series that are there from the start: a rate needs the zero before the first event.
        for result in get_args(Result):
            self.swaps.at(result)
        for kind in ("name", "invalid", "store", "memory", "engine", "source"):
            self.rejections.at(kind)
        self.evictions.at("host")
        for role in ("client", "admin"):
            self.wrong_keys.at(role)

    def begin(self, model: str | None, path: str, key: str | None = None) -> Observation:
        """A request has come.

        Args:
            model: the public name of what it asks for; None if that is not served.
            path: of the route.
            key: the name of the client's key; None where keys are not in use.
        """
        if model is not None and (displaced := self.labels.seen(model)) is not None:
            for of_adapters in self._by_adapter:
                of_adapters.end(displaced)
        if key is not None and (displaced := self.key_labels.seen(key)) is not None:
            for of_keys in self._by_key:
                of_keys.end(displaced)
        return Observation(self, model, ENDPOINTS.get(path, OTHER), key)

    def alias_ended(self, alias: str, revision: Revision, seconds: float, outcome: Outcome) -> None:
        """A request for an alias has ended; so many aliases, and revisions of each, have labels."""
        now_s = time.perf_counter()
        alias, gone = self._aliases.seen(alias, now_s)
        if gone is not None:
            del self._alias_revisions[gone]
            for of_aliases in self._by_alias:
                of_aliases.end(gone)
        revisions = self._alias_revisions.setdefault(alias, RecentLabels(MAX_ALIAS_REVISIONS))
        label, gone = revisions.seen(revision.revision, now_s)
        if gone is not None:
            for of_aliases in self._by_alias:
                of_aliases.end(alias, gone)
        self.alias_requests.at(alias, label, outcome).inc()
        self.alias_seconds.at(alias, label).observe(seconds)

    def wrong_key(self, role: str) -> None:
        """A request lacked the key that its route needs, a client's or an admin's."""
        self.wrong_keys.at(role).inc()

    def loaded(self, revision: Revision, seconds: float) -> None:
        """A revision was brought into the engine."""
        self.load_seconds.at().observe(seconds)

    def swapped(self, result: Result) -> None:
        """An adapter was published, rejected, removed or rolled back."""
        self.swaps.at(result).inc()

    def rejected(self, kind: str) -> None:
        """An adapter was refused, for an AdapterError's kind."""
        self.rejections.at(kind).inc()
        self.swapped("rejected")

    def evicted(self, revision: Revision) -> None:
        """A revision made room in host memory."""
        self.evictions.at("host").inc()


class Observation:
    """One request, from its arrival to its end."""

    def __init__(self, metrics: ServerMetrics, model: str | None, endpoint: str, key: str | None):
        self.metrics = metrics
        self.arrived = time.perf_counter()
        self.arrived_at = time.time()
        self.turn_s = 0.0
        self.first_token_s: float | None = None
        self.failed = False
        self.tokens: Tally[str] = Tally()
        self.seconds = 0.0
        self._model = model
        self._endpoint = endpoint
        self._key = key

    @property
    def labels(self) -> tuple[str, str]:
        """Adapter and endpoint, as they are counted now."""
        return UNKNOWN if self._model is None else self.metrics.labels.of(self._model), self._endpoint

    @property
    def key_label(self) -> str | None:
        """The key, as it is counted now; None where keys are not in use."""
        return None if self._key is None else self.metrics.key_labels.of(self._key)

    def has_turn(self) -> None:
        """It waits no longer for its adapter's turn."""
        self.turn_s = time.perf_counter() - self.arrived

    def sequence(self) -> Sequence:
        """What watches one of the engine's requests for it; a request with several prompts has several."""
        return Sequence(self)

    def end(self, outcome: Outcome) -> None:
        """The response has ended, this way or that."""
        self.seconds = time.perf_counter() - self.arrived
        labels, key = self.labels, self.key_label
        self.metrics.requests.at(*labels, outcome).inc()
        self.metrics.request_seconds.at(*labels).observe(self.seconds)
        if key is not None:
            self.metrics.key_requests.at(key, outcome).inc()


class Sequence:
    """Times and tokens of one request to the engine, with all its choices."""

    def __init__(self, observation: Observation):
        self._observation = observation
        self._metrics = observation.metrics
        self._seen: dict[int, tuple[int, float]] = {}  # choice -> its tokens so far, and when the last one came
        self._started = False
        for kind in TOKEN_KINDS:  # the zero before the first token
            self._count(kind, 0)

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
        labels = seen.labels
        self._metrics.first_token_seconds.at(*labels).observe(first)
        self._metrics.queue_seconds.at(*labels).observe(seen.turn_s + queued)
        self._count_prompt(output)

    def _count_prompt(self, output: Any) -> None:
        self._count("prompt", len(output.prompt_token_ids or ()))
        self._count("cached", output.num_cached_tokens or 0)

    def _observe_gaps(self, seconds: float, count: int) -> None:
        self._metrics.inter_token_seconds.at(*self._observation.labels).observe(seconds, count)

    def _count(self, kind: str, number: int) -> None:
        seen = self._observation
        self._metrics.tokens.at(seen.labels[0], kind).inc(number)
        if (key := seen.key_label) is not None:
            self._metrics.key_tokens.at(key, kind).inc(number)
        seen.tokens[kind] += number
