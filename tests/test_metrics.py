"""What is counted and timed, with outputs as vLLM's engine gives them and a registry of the test's own."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import pkgutil
import random
import re
import sys
import threading
import time
from collections import Counter
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from catalogue_support import add, make_catalogue, reject, revision
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Gauge, generate_latest, make_asgi_app
from prometheus_client import Counter as PrometheusCounter
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.routing import Mount

from qaa_serve.registry.cache import Resident
from qaa_serve.server import metrics as package
from qaa_serve.server.account import EngineAccount
from qaa_serve.server.metrics import (
    ENDPOINTS,
    FAMILIES,
    OTHER,
    UNKNOWN,
    BoundedLabels,
    Exposition,
    ServerMetrics,
    StateCollector,
    reference,
    remove_routes,
    say_what_runs,
)
from qaa_serve.server.metrics.exposition import OPENMETRICS, TEXT
from qaa_serve.server.metrics.families import Family
from qaa_serve.server.metrics.series import Histograms
from qaa_serve.server.metrics.state import MAX_NAMES, STATE

ROOT = Path(__file__).parents[1]
BUCKETS = (0.001, 0.01, 0.1, 1.0)


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""
    now = SimpleNamespace(s=1000.0)
    for name in ("time", "perf_counter"):
        monkeypatch.setattr(f"qaa_serve.server.metrics.requests.time.{name}", lambda: now.s)
    return now


@pytest.fixture
def metrics(registry, clock):
    return ServerMetrics(
        registry,
        max_adapters=2,
        max_keys=2,
        latency_buckets=BUCKETS,
        first_token_buckets=BUCKETS,
        inter_token_buckets=BUCKETS,
    )


def output(tokens: list[int], *, index=0, finished=False, prompt=5, cached=0, stats=None):
    choice = SimpleNamespace(index=index, token_ids=tokens)
    return SimpleNamespace(
        outputs=[choice],
        finished=finished,
        prompt_token_ids=[0] * prompt,
        num_cached_tokens=cached,
        metrics=stats,
    )


def value(registry, name, **labels):
    return registry.get_sample_value(name, labels)


def latency(registry, name, part, adapter="support"):
    return value(registry, f"qaa_{name}_seconds_{part}", adapter=adapter, endpoint="chat")


def test_a_stream_is_timed_token_by_token(metrics, registry, clock):
    seen = metrics.begin("support", "/v1/chat/completions")
    sequence = seen.sequence()
    clock.s += 0.5
    seen.has_turn()
    clock.s += 0.25
    sequence.saw(output([7], cached=4))
    for _ in range(3):
        clock.s += 0.05
        sequence.saw(output([8]))
    clock.s += 0.1
    sequence.saw(output([9, 10], finished=True))
    clock.s += 0.1
    seen.end("success")
    assert latency(registry, "time_to_first_token", "sum") == pytest.approx(0.75)
    assert latency(registry, "inter_token", "count") == 5
    assert latency(registry, "inter_token", "sum") == pytest.approx(0.25)
    assert latency(registry, "queue", "sum") == pytest.approx(0.5)
    assert latency(registry, "request", "sum") == pytest.approx(1.1)
    tokens = {
        kind: value(registry, "qaa_tokens_total", adapter="support", kind=kind) for kind in ("prompt", "cached")
    }
    assert tokens == {"prompt": 5, "cached": 4}
    assert value(registry, "qaa_tokens_total", adapter="support", kind="generated") == 6
    assert value(registry, "qaa_requests_total", adapter="support", endpoint="chat", outcome="success") == 1


def test_a_whole_answer_is_timed_by_the_engine_s_clock(metrics, registry, clock):
    """Without a stream nothing is seen before the end."""
    seen = metrics.begin("support", "/v1/chat/completions")
    stats = SimpleNamespace(
        arrival_time=clock.s + 0.1, first_token_latency=0.3, queued_ts=50.0, scheduled_ts=50.05,
        first_token_ts=50.2, last_token_ts=51.0,
    )  # fmt: skip
    clock.s += 2
    seen.sequence().saw(output([1, 2, 3, 4, 5], finished=True, stats=stats))
    assert latency(registry, "time_to_first_token", "sum") == pytest.approx(0.4)
    assert latency(registry, "queue", "sum") == pytest.approx(0.05)
    assert latency(registry, "inter_token", "count") == 4
    assert latency(registry, "inter_token", "sum") == pytest.approx(0.8)


def test_choices_are_apart_and_the_prompt_counts_once(metrics, registry, clock):
    """n = 2: each choice has its own gaps."""
    sequence = metrics.begin("support", "/v1/chat/completions").sequence()
    for index in (0, 1, 0, 1):
        clock.s += 0.5
        sequence.saw(output([7], index=index))
    assert latency(registry, "inter_token", "count") == 2
    assert latency(registry, "inter_token", "sum") == pytest.approx(2.0)
    assert latency(registry, "time_to_first_token", "count") == 1
    assert value(registry, "qaa_tokens_total", adapter="support", kind="prompt") == 5
    assert value(registry, "qaa_tokens_total", adapter="support", kind="generated") == 4


def test_several_prompts_are_several_sequences_of_one_request(metrics, registry, clock):
    seen = metrics.begin("support", "/v1/chat/completions")
    for _ in range(2):
        seen.sequence().saw(output([7], finished=True))
    seen.end("success")
    assert value(registry, "qaa_tokens_total", adapter="support", kind="prompt") == 10
    assert latency(registry, "time_to_first_token", "count") == 2
    assert latency(registry, "request", "count") == 1


def test_an_answer_without_tokens_still_has_a_prompt(metrics, registry):
    metrics.begin("support", "/v1/chat/completions").sequence().saw(output([], finished=True))
    assert value(registry, "qaa_tokens_total", adapter="support", kind="prompt") == 5
    assert latency(registry, "time_to_first_token", "count") is None or (
        latency(registry, "time_to_first_token", "count") == 0
    )


def test_requests_for_no_model_and_other_paths_have_labels_of_a_bounded_number(metrics, registry):
    metrics.begin(None, "/v1/chat/completions").end("client_error")
    metrics.begin("support", "/some/other/path").end("success")
    assert value(registry, "qaa_requests_total", adapter="unknown", endpoint="chat", outcome="client_error") == 1
    assert value(registry, "qaa_requests_total", adapter="support", endpoint="other", outcome="success") == 1


def test_the_busiest_names_have_labels_of_their_own():
    labels = BoundedLabels(2)
    found = []
    for name in ("a", "b", "c", "a"):
        found.append((labels.seen(name), labels.of(name)))
    assert found == [(None, "a"), (None, "b"), (None, OTHER), (None, "a")]
    displaced = [labels.seen("c") for _ in range(20)]
    assert [name for name in displaced if name] == ["b"], "the least busy one gives way, once"
    assert displaced[0] is None
    assert [labels.of(name) for name in "abc"] == ["a", OTHER, "c"]


def test_asking_for_a_label_takes_none():
    """Scrapes ask, in a thread of their own."""
    labels = BoundedLabels(2)
    assert labels.of("a") == OTHER
    assert labels.with_room_for(["a", "other", "b", "c", "unknown"]) == {"a", "b"}
    labels.seen("c")
    assert labels.with_room_for(["a", "b", "c"]) == {"c", "a"}, "who is asked for comes first"
    labels.seen("d")
    assert labels.with_room_for(["a", "b"]) == {"c", "d"}


@pytest.mark.parametrize("name", [OTHER, UNKNOWN])
def test_a_model_that_is_called_as_a_label_is_among_the_others(metrics, registry, name):
    """Or the series of all others would end when it is displaced."""
    metrics.begin("x", "/v1/completions").end("success")
    metrics.begin("y", "/v1/completions").end("success")
    for _ in range(30):
        metrics.begin(name, "/v1/completions").end("success")
        metrics.begin(None, "/v1/completions").end("client_error")
    labels = {"endpoint": "completions"}
    assert value(registry, "qaa_requests_total", adapter=OTHER, outcome="success", **labels) == 30
    assert value(registry, "qaa_requests_total", adapter=UNKNOWN, outcome="client_error", **labels) == 30
    for other in ("x", "y"):
        assert value(registry, "qaa_requests_total", adapter=other, outcome="success", **labels) == 1


def test_a_thousand_names_are_no_thousand_labels(metrics, registry):
    for i in range(1000):
        metrics.begin(f"adapter-{i}", "/v1/completions").end("success")
    family = next(family for family in registry.collect() if family.name == "qaa_requests")
    samples = [sample for sample in family.samples if sample.name == "qaa_requests_total"]
    assert {sample.labels["adapter"] for sample in samples} == {"adapter-0", "adapter-1", OTHER}
    assert sum(sample.value for sample in samples) == 1000


def test_a_displaced_adapter_s_series_go_and_its_later_requests_are_other(metrics, registry):
    for name in ("a", "b"):
        metrics.begin(name, "/v1/completions").end("success")
    for _ in range(30):
        metrics.begin("c", "/v1/completions").end("success")
    labels = {"endpoint": "completions", "outcome": "success"}
    assert value(registry, "qaa_requests_total", adapter="a", **labels) is None or (
        value(registry, "qaa_requests_total", adapter="b", **labels) is None
    )
    assert value(registry, "qaa_requests_total", adapter="c", **labels) > 10


def samples(registry, *labels):
    """What each series that has one of the labels counts now."""
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.labels.keys() & set(labels):
                found[sample.name, *sorted(sample.labels.items())] = sample.value
    return found


@pytest.mark.parametrize(("seed", "limit"), [(0, 0), (1, 1), (2, 3), (3, 3)])
def test_whatever_comes_the_series_are_bounded_and_only_grow(seed, limit):
    """Requests of many adapters and keys begin, are answered and end in any order."""
    rng = random.Random(seed)
    registry = CollectorRegistry()
    metrics = ServerMetrics(
        registry, max_adapters=limit, max_keys=limit, latency_buckets=BUCKETS, first_token_buckets=BUCKETS,
        inter_token_buckets=BUCKETS,
    )  # fmt: skip
    under_way, before, ended, counted, gone = [], {}, {}, Counter(), Counter()

    def name(kind, step):
        # Somebody becomes popular who was not, or nobody would be displaced.
        return f"{kind}{rng.randrange(25) if step < 60 or rng.random() < 0.5 else 30}"

    for step in range(600):
        act = rng.random()
        if act < 0.4 or not under_way:
            model = rng.choice([None, OTHER, UNKNOWN]) if rng.random() < 0.1 else name("a", step)
            key = None if rng.random() < 0.1 else name("k", step)
            seen = metrics.begin(model, rng.choice([*ENDPOINTS, "/x"]), key)
            under_way.append((seen, [seen.sequence()], key))
        else:
            seen, sequences, key = rng.choice(under_way)
            if act < 0.8:
                if rng.random() < 0.2:
                    sequences.append(seen.sequence())
                number = rng.randrange(4)
                rng.choice(sequences).saw(output([7] * number, finished=rng.random() < 0.1))
                counted["generated"] += number
                counted["by key"] += number if key is not None else 0
            else:
                outcome = rng.choice(["success", "aborted"])
                seen.end(outcome)
                under_way.remove((seen, sequences, key))
                counted["requests"] += 1
        now = samples(registry, "adapter", "key")
        for first in ("adapter", "key"):
            labels = {dict(series[1:])[first] for series in now if first in dict(series[1:])}
            assert len(labels - {OTHER, UNKNOWN}) <= limit
            firsts = [dict(series[1:]).get(first) for series in before.keys() - now.keys()]
            assert not {OTHER, UNKNOWN} & set(firsts), "what all others share never ends"
        assert all(now[series] >= number for series, number in before.items() if series in now)
        for series in before.keys() - now.keys():
            ended[series] = ended.get(series, 0) + before[series]
        before = now
    for series, number in [*before.items(), *ended.items()]:
        labels = dict(series[1:])
        if series[0] == "qaa_requests_total":
            gone["requests"] += number
        elif series[0] == "qaa_tokens_total" and labels["kind"] == "generated":
            gone["generated"] += number
        elif series[0] == "qaa_key_tokens_total" and labels["kind"] == "generated":
            gone["by key"] += number
    assert gone == counted, "nothing is lost but with a series that has ended, and nothing is counted twice"
    if limit:
        assert ended, "somebody was displaced"


def test_what_a_displaced_adapter_s_request_still_does_counts_as_other(metrics, registry):
    """Its series would otherwise come back and stay."""
    seen = metrics.begin("a", "/v1/completions", "key-a")
    sequence = seen.sequence()
    sequence.saw(output([7]))
    for _ in range(30):
        for name in ("b", "c"):
            metrics.begin(name, "/v1/completions", f"key-{name}").end("success")
    sequence.saw(output([8, 9]))
    seen.sequence().saw(output([7]))
    seen.end("success")
    assert not [series for series in samples(registry, "adapter") if dict(series[1:])["adapter"] == "a"]
    assert not [series for series in samples(registry, "key") if dict(series[1:])["key"] == "key-a"]
    assert value(registry, "qaa_tokens_total", adapter=OTHER, kind="generated") == 3
    assert value(registry, "qaa_key_tokens_total", key=OTHER, kind="generated") == 3
    assert seen.labels == (OTHER, "completions")
    assert seen.tokens["generated"] == 4


def alias_series(registry):
    found = samples(registry, "alias")
    return {
        (labels["alias"], labels["revision"]): number
        for (name, *pairs), number in found.items()
        if name == "qaa_alias_requests_total" and (labels := dict(pairs))
    }


def test_a_new_revision_of_an_alias_takes_the_label_of_one_that_is_no_more_in_use(metrics, registry, clock):
    def ended(alias, *seeds):
        for seed in seeds:
            metrics.alias_ended(alias, revision("one", f"{seed:012x}"), 0.1, "success")

    ended("chat", *range(20))
    ended("chat", 20)
    labels = [revision("one", f"{seed:012x}").revision for seed in range(23)]
    assert alias_series(registry) == {("chat", label): 1 for label in [*labels[:20], OTHER]}
    clock.s += 3000
    ended("chat", *range(1, 20))
    clock.s += 1000
    ended("chat", 21, 22)
    counted = alias_series(registry)
    assert ("chat", labels[0]) not in counted
    assert (counted["chat", labels[1]], counted["chat", labels[21]], counted["chat", OTHER]) == (2, 1, 2)


def test_a_new_alias_takes_the_label_of_one_that_is_no_more_in_use(metrics, registry, clock):
    for i in range(101):
        metrics.alias_ended(f"alias-{i}", revision("one"), 0.1, "success")
    assert {alias for alias, _ in alias_series(registry)} == {*(f"alias-{i}" for i in range(100)), OTHER}
    clock.s += 4000
    metrics.alias_ended("new", revision("one"), 0.1, "success")
    aliases = {alias for alias, _ in alias_series(registry)}
    assert "alias-0" not in aliases
    assert {"alias-1", "new"} <= aliases


def test_requests_and_tokens_are_counted_by_key(metrics, registry):
    for key, outcome in (("acme", "success"), ("acme", "rejected"), ("third", "success"), (None, "success")):
        seen = metrics.begin("support", "/v1/completions", key)
        seen.sequence().saw(output([7, 8], cached=1))
        seen.end(outcome)
    metrics.begin(None, "/v1/completions", "acme").end("client_error")
    by_outcome = {o: value(registry, "qaa_key_requests_total", key="acme", outcome=o)
                  for o in ("success", "rejected", "client_error")}  # fmt: skip
    assert by_outcome == {"success": 1, "rejected": 1, "client_error": 1}
    tokens = {k: value(registry, "qaa_key_tokens_total", key="acme", kind=k)
              for k in ("prompt", "cached", "generated")}  # fmt: skip
    assert tokens == {"prompt": 10, "cached": 2, "generated": 4}
    keys = {dict(series[1:])["key"] for series in samples(registry, "key")}
    assert keys == {"acme", "third"}, "no series of keys where a request has none"
    for i in range(50):
        metrics.begin("support", "/v1/completions", f"key-{i}").end("success")
    assert {dict(series[1:])["key"] for series in samples(registry, "key")} == {"acme", "third", OTHER}


def test_wrong_keys_are_counted_from_zero(metrics, registry):
    assert value(registry, "qaa_wrong_keys_total", role="client") == 0
    metrics.wrong_key("admin")
    assert value(registry, "qaa_wrong_keys_total", role="admin") == 1


def test_the_life_of_adapters_is_counted(metrics, registry):
    metrics.swapped("published")
    metrics.rejected("invalid")
    metrics.evicted(None)
    metrics.loaded(None, 0.05)
    assert value(registry, "qaa_adapter_swaps_total", result="published") == 1
    assert value(registry, "qaa_adapter_swaps_total", result="rejected") == 1
    assert value(registry, "qaa_adapter_rejections_total", reason="invalid") == 1
    assert value(registry, "qaa_adapter_evictions_total", tier="host") == 1
    assert value(registry, "qaa_adapter_load_seconds_sum") == pytest.approx(0.05)


def test_every_metric_is_documented():
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert f"\n{reference()}\n<!-- end -->" in text, "write metrics.reference() into docs/metrics.md"
    assert all(family.name.startswith("qaa_") for family in FAMILIES if family.name != "vllm:lora_requests_info")


# ---------------------------------------------------------------------------------------------------- state


class State:
    """A collector and what it reads: `one` in a slot, `two` in memory, `three` in the store, `bad` rejected."""

    def __init__(self, limit=10):
        self.registry = CollectorRegistry(auto_describe=True)
        self.labels = BoundedLabels(limit)
        self.catalogue = make_catalogue()
        for name in ("one", "two", "three"):
            self.add(name, loaded=name != "three")
        reject(self.catalogue, "bad")
        slots = {revision("one").int_id: (7, 5), revision("three").int_id: (7, 5)}
        self.turns = {"base": (1, 0), "two": (2, 3), "one": (1, 0)}
        self.monitor = SimpleNamespace(account=EngineAccount(slots), age_s=12.5)
        self.collector = StateCollector(
            self.catalogue, SimpleNamespace(age_s=3.5),
            SimpleNamespace(names=lambda: list(self.turns), counts=lambda name: self.turns.get(name, (0, 0))),
            self.labels, self.monitor, lambda: "ready", max_loras=4,
        )  # fmt: skip
        self.registry.register(self.collector)

    def add(self, name, *, loaded=False):
        current = revision(name)
        add(self.catalogue, current)
        if loaded:
            self.catalogue.cache._residents[current.int_id] = Resident(current, 7)

    def series(self, name):
        """A family's series, by their labels' values."""
        return {
            tuple(sample.labels.values()): sample.value
            for family in self.registry.collect() for sample in family.samples if sample.name == name
        }  # fmt: skip


def test_an_adapter_is_in_the_tier_nearest_to_the_device():
    """`three` has left memory since the engine said where it is."""
    state = State()
    expected = {("one", "device"): 1, ("two", "host"): 1, ("three", "store"): 1}
    assert state.series("qaa_adapter_tier") == expected
    assert state.series("qaa_adapter_bytes")["one", "device"] == 5


def test_tiers_of_many_adapters_are_few_series_that_count_all():
    state = State(limit=2)
    for i in range(50):
        state.add(f"more-{i}", loaded=i < 20)
    state.labels.seen("three")
    tiers = state.series("qaa_adapter_tier")
    assert tiers == {
        ("three", "store"): 1, ("one", "device"): 1, (OTHER, "host"): 21, (OTHER, "store"): 30,
    }  # fmt: skip
    assert len(state.series("qaa_requests_waiting")) == 3


def test_requests_in_flight_are_those_of_models_with_zeros_for_the_others():
    state = State()
    state.labels.seen("base")
    assert state.series("qaa_requests_in_flight") == {
        ("base",): 1, ("two",): 5, ("one",): 1, ("three",): 0, ("bad",): 0,
    }  # fmt: skip
    assert state.series("qaa_requests_waiting")[("two",)] == 3
    assert state.series("qaa_adapter_rejected") == {("one",): 0, ("two",): 0, ("three",): 0, ("bad",): 1}


def test_the_adapters_of_the_batch_are_one_series_of_public_names():
    """As vllm:lora_requests_info, which routers read: it has no base model, and no revisions."""
    state = State()
    begun = time.time()
    for turns, running, waiting in (
        ({"two": (2, 3), "base": (9, 9), "one": (1, 0)}, "one,two", "two"),
        ({"three": (1, 0)}, "three", ""),
        ({}, "", ""),
    ):
        state.turns = turns
        ((labels, at),) = state.series("vllm:lora_requests_info").items()
        assert labels == (running, waiting, "4")
        assert begun <= at <= time.time()
    for i in range(1000):
        state.add(f"a{i:03}")
    state.turns = {f"a{i:03}": (1, 1) for i in reversed(range(1000))}
    (((running, waiting, _), _),) = state.series("vllm:lora_requests_info").items()
    assert running == waiting == ",".join(f"a{i:03}" for i in range(MAX_NAMES))


def test_the_age_of_the_engine_s_account_is_told():
    assert State().series("qaa_engine_account_age_seconds") == {(): 12.5}


def test_what_circuits_run_on_and_what_the_choice_was_made_by_are_told(registry):
    say_what_runs(registry, "cuquantum", {"triton": 0.003, "cuquantum": 0.002})
    (build,) = [metric for metric in registry.collect() if metric.name == "qaa_build_info"]
    ((_, labels, one, *_),) = build.samples
    assert (labels["circuits"], one) == ("cuquantum", 1)
    assert value(registry, "qaa_circuit_backend_seconds", backend="triton") == 0.003
    assert value(registry, "qaa_circuit_backend_seconds", backend="cuquantum") == 0.002


def test_what_is_described_is_what_is_collected():
    state = State()
    collected = [family.name for family in state.collector.collect()]
    assert sorted(collected) == sorted(family.name for family in state.collector.describe()) == sorted(STATE)


def test_the_state_is_collected_while_it_changes(monkeypatch):
    """In the scrape's thread, beside the event loop."""
    monkeypatch.setattr("qaa_serve.server.metrics.state._process_memory", dict)  # takes longest, and is none of it
    state, stop, failures, collected = State(limit=5), threading.Event(), [], []

    def collect():
        while not stop.is_set():
            try:
                for family in state.collector.collect():
                    assert list(family.samples) is not None
                collected.append(len(state.turns))
            except Exception as error:
                failures.append(error)

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=collect)
    thread.start()
    try:
        residents = state.catalogue.cache._residents
        deadline = time.monotonic() + 30
        for i in count():
            if len(collected) > 300 or failures or time.monotonic() > deadline:
                break
            name = f"n{i % 100}"
            state.add(name, loaded=True)
            state.labels.seen(name)
            state.turns[name] = (1, 0)
            residents.move_to_end(next(iter(residents)))
            if i % 3 == 0:
                gone = f"n{(i * 7) % 100}"
                state.turns.pop(gone, None)
                if (entry := state.catalogue.entries.pop(gone, None)) is not None:
                    residents.pop(entry.current.int_id)
    finally:
        sys.setswitchinterval(usual)
        stop.set()
        thread.join()
    assert failures == []
    assert len(collected) > 300


# --------------------------------------------------------------------------------------------------- /metrics


def numbers(families):
    """Each series' number, by name and labels; `_created` stands apart in the text format."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families for sample in family.samples if not sample.name.endswith("_created")
    }  # fmt: skip


def kinds(families):
    return {family.name: (family.type, family.documentation) for family in families}


@pytest.fixture
def filled(registry):
    """A registry with ours and with others' families, names that need care among them."""
    metrics = ServerMetrics(
        registry, latency_buckets=BUCKETS, first_token_buckets=BUCKETS, inter_token_buckets=BUCKETS
    )
    for model in ("support", 'a "model"\\ of\n two lines', "100 %d\0", None):
        seen = metrics.begin(model, "/v1/completions", "acme")
        sequence = seen.sequence()
        for _ in range(3):
            sequence.saw(output([1, 2, 3]))
        seen.end("success")
    metrics.loaded(None, 0.05)
    PrometheusCounter("python_things_total", "Another's.", ["kind"], registry=registry).labels("x").inc(1e7)
    PrometheusHistogram("vllm:seconds", "Another's.", registry=registry).observe(0.3)
    state = State()
    registry.register(state.collector)
    return SimpleNamespace(registry=registry, metrics=metrics)


def served(exposition):
    app = FastAPI()
    app.include_router(exposition.router())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def fetch(exposition, **headers):
    async def get():
        async with served(exposition) as client:
            return await client.get("/metrics", headers={k.replace("_", "-"): v for k, v in headers.items()})

    return asyncio.run(get())


#: What changes from one collection to the next.
MOVING = ("qaa_process_memory_bytes", "vllm:lora_requests_info")

#: Left to itself, it turns `vllm:` into `vllm_` in front of numbers, but not of their types.
WITH_COLONS = partial(generate_openmetrics, escaping=ALLOWUTF8)

PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "content_type", "write", "parse"),
    [
        (None, TEXT, generate_latest, parse_text),
        ("text/plain;version=0.0.4", TEXT, generate_latest, parse_text),
        ("application/openmetrics-text;version=0.0.1,*/*", TEXT, generate_latest, parse_text),
        ("application/openmetrics-text;q=0,*/*", TEXT, generate_latest, parse_text),
        ("application/openmetrics-text", OPENMETRICS, WITH_COLONS, parse_openmetrics),
        (PROMETHEUS_3, OPENMETRICS, WITH_COLONS, parse_openmetrics),
    ],
)
def test_a_page_says_what_prometheus_client_s_would(filled, accept, content_type, write, parse):
    headers = {"accept": accept} if accept else {}
    answer = fetch(Exposition(filled.registry), accept_encoding="identity", **headers)
    assert answer.headers["content-type"] == content_type
    assert int(answer.headers["content-length"]) == len(answer.content)
    found = list(parse(answer.text))
    expected = list(parse(write(filled.registry).decode()))
    here, there = ({k: v for k, v in numbers(f).items() if k[0] not in MOVING} for f in (found, expected))
    assert here == there
    assert len(here) > 100
    assert kinds(found) == kinds(expected)
    assert {"vllm:seconds_sum", "vllm:lora_requests_info"} <= {series.name for f in found for series in f.samples}
    assert ("_created" in answer.text) == ("python_things_created" in answer.text), "ours have none"


def test_a_page_is_compressed_if_that_is_asked_for(filled):
    exposition = Exposition(filled.registry)
    plain = fetch(exposition, accept_encoding="identity, gzip;q=0")
    packed = fetch(exposition, accept_encoding="gzip")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    moving = lambda text: [line for line in text.splitlines() if not line.startswith(MOVING)]  # noqa: E731
    assert moving(packed.text) == moving(plain.text)
    assert gzip.compress(b"") != packed.content


def test_observations_are_in_the_buckets_where_prometheus_client_puts_them(registry):
    """A value on a bound is in that bound's bucket."""
    ours = Histograms(Family("ours_seconds", "histogram", (), "x"), registry, BUCKETS)
    theirs = PrometheusHistogram("theirs_seconds", "x", registry=registry, buckets=BUCKETS)
    for seconds in (-1.0, 0.0, 0.001, 0.0011, 0.01, 0.5, 1.0, 1.0001, 1e9):
        ours.at().observe(seconds, 2)
        theirs.observe(seconds)
        theirs.observe(seconds)
    page = fetch(Exposition(registry)).text
    lines = {name: [line.removeprefix(name) for line in page.splitlines() if line.startswith(name)]
             for name in ("ours_seconds", "theirs_seconds")}  # fmt: skip
    assert lines["ours_seconds"] == [line for line in lines["theirs_seconds"] if "_created" not in line]
    assert len(lines["ours_seconds"]) == len(BUCKETS) + 3


class Held(CollectorRegistry):
    """A registry that counts how often it is asked, in which thread; it answers once it may."""

    def __init__(self):
        super().__init__()
        self.threads = []
        self.fails = False
        self.go_on = threading.Event()

    def collect(self):
        self.threads.append(threading.current_thread())
        assert self.go_on.wait(30), "the event loop stands while a page is written"
        if self.fails:
            raise RuntimeError("no")
        gauge = Gauge("asked", "How often.", registry=None)
        gauge.set(len(self.threads))
        return gauge.collect()


def asked(answer):
    return numbers(parse_text(answer.text))[("asked",)]


def test_scrapes_share_a_page_for_a_second_which_another_thread_writes():
    async def main():
        registry = Held()
        async with served(Exposition(registry, max_age_s=60)) as client:
            tasks = [asyncio.create_task(client.get("/metrics")) for _ in range(5)]
            async with asyncio.timeout(30):
                while not registry.threads:
                    await asyncio.sleep(0.001)
            tasks[0].cancel()  # whoever goes away leaves the page to the others
            registry.go_on.set()  # by the loop, which runs while the page is written
            answers = [*await asyncio.gather(*tasks[1:]), await client.get("/metrics")]
            assert {asked(answer) for answer in answers} == {1}
            assert threading.current_thread() not in registry.threads
        async with served(Exposition(registry, max_age_s=0.05)) as client, asyncio.timeout(30):
            first = asked(await client.get("/metrics"))
            while asked(await client.get("/metrics")) == first:
                await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_page_that_cannot_be_written_is_not_kept():
    async def main():
        registry = Held()
        registry.go_on.set()
        exposition = Exposition(registry)
        registry.fails = True
        async with served(exposition) as client:
            with pytest.raises(RuntimeError):
                await client.get("/metrics")
            registry.fails = False
            assert asked(await client.get("/metrics")) == 2

    asyncio.run(main())


def test_headers_do_not_make_pages_without_end(filled):
    async def main():
        exposition = Exposition(filled.registry, max_age_s=60)
        async with served(exposition) as client:
            for i in range(20):
                accept = f"application/openmetrics-text;version=1.0.{i};escaping=x{i},text/x{i}"
                await client.get(f"/metrics?name[]=n{i}", headers={"accept": accept, "accept-encoding": f"x{i}"})
        assert len(exposition._pages) == 1

    asyncio.run(main())


def test_lines_that_are_kept_are_those_of_now(filled):
    """A series keeps its lines until it changes, and so do others' families."""
    exposition = Exposition(filled.registry, max_age_s=0)
    other = PrometheusCounter("later_total", "Another's.", registry=filled.registry)
    pages = []
    for _ in range(3):
        pages.append(numbers(parse_text(fetch(exposition).text)))
        filled.metrics.begin("support", "/v1/completions", "acme").end("success")
        filled.metrics.loaded(None, 0.0001)
        other.inc()
    labels = (("adapter", "support"), ("endpoint", "completions"))
    for series in (
        ("qaa_requests_total", *labels, ("outcome", "success")), ("qaa_request_seconds_count", *labels),
        ("qaa_request_seconds_bucket", *labels, ("le", "+Inf")), ("qaa_adapter_load_seconds_count",),
        ("later_total",), ("qaa_key_requests_total", ("key", "acme"), ("outcome", "success")),
    ):  # fmt: skip
        assert [after[series] - before[series] for before, after in pairwise(pages)] == [1, 1], series


def test_the_usual_interval_of_threads_is_back_after_a_page(filled):
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.004)
    try:
        fetch(Exposition(filled.registry))
        assert sys.getswitchinterval() == pytest.approx(0.004)
    finally:
        sys.setswitchinterval(usual)


def test_vllm_s_own_pages_are_taken_out():
    app = FastAPI()
    app.get("/metrics", response_class=PlainTextResponse)(lambda: "vLLM's")
    app.get("/other", response_class=PlainTextResponse)(lambda: "stays")
    app.router.routes.append(Mount("/metrics", make_asgi_app(CollectorRegistry())))
    remove_routes(app, "/metrics")
    app.include_router(Exposition(CollectorRegistry()).router())

    async def main():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            assert (await client.get("/metrics")).text == ""
            assert (await client.get("/other")).text == "stays"
            assert (await client.get("/metrics/")).status_code in (307, 404)

    asyncio.run(main())
    assert [route.path for route in app.routes].count("/metrics") == 1


# ---------------------------------------------------------------------------------------------------- modules


def test_no_module_of_the_metrics_needs_the_server(monkeypatch):
    """What counts does not know what it counts for: the gate imports the metrics."""
    for module in [package, *(importlib.import_module(f"{package.__name__}.{m.name}")
                              for m in pkgutil.iter_modules(package.__path__))]:  # fmt: skip
        text = Path(module.__file__).read_text()
        mine = re.findall(r"^ *(?:from|import) (qaa_serve\.server\S*)", text, re.MULTILINE)
        allowed = ("qaa_serve.server.metrics", "qaa_serve.server.account")
        assert all(name.startswith(allowed) for name in mine), module
        assert "TYPE_CHECKING" not in text
