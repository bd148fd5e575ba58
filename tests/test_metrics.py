"""What is counted and timed, with outputs as vLLM's engine gives them and a registry of the test's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from qaa_serve.server.metrics import FAMILIES, OTHER, AdapterLabels, ServerMetrics, reference

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
        monkeypatch.setattr(f"qaa_serve.server.metrics.time.{name}", lambda: now.s)
    return now


@pytest.fixture
def metrics(registry, clock):
    return ServerMetrics(
        registry,
        max_adapters=2,
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


def test_the_busiest_adapters_have_labels_of_their_own():
    labels = AdapterLabels(2)
    assert [labels.seen(name) for name in ("a", "b", "c", "a")] == [
        ("a", None), ("b", None), (OTHER, None), ("a", None),
    ]  # fmt: skip
    found = [labels.seen("c") for _ in range(20)]
    assert found[0] == (OTHER, None)
    assert [displaced for _, displaced in found if displaced] == ["b"], "the least busy one gives way, once"
    assert found[-1] == ("c", None)
    assert (labels.of("a"), labels.of("b"), labels.of("c")) == ("a", OTHER, "c")


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
    assert all(family.name.startswith("qaa_") for family in FAMILIES)
