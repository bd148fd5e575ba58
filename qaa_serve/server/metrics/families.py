"""What metrics there are: the one list that the code, the docs and the files in deploy/ are held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
    Family("qaa_key_requests_total", "counter", ("key", "outcome"), "requests that ended, by the client's key"),
    Family("qaa_key_tokens_total", "counter", ("key", "kind"), "tokens, by the client's key"),
    Family(
        "qaa_wrong_keys_total",
        "counter",
        ("role",),
        "requests without a key that the route takes: client, admin (the key that was needed)",
    ),
    Family(
        "qaa_adapter_bytes",
        "gauge",
        ("adapter", "tier"),
        "store: current revision's weights; host: memory of the engine's workers; device: the batch's slots",
    ),
    Family(
        "qaa_adapter_tier",
        "gauge",
        ("adapter", "tier"),
        "1 where an adapter's current revision is, nearest to the device: device, host, store (other: how many)",
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
    Family(
        "qaa_engine_account_age_seconds",
        "gauge",
        (),
        "since the engine last said what memory it takes and what its circuits cost",
    ),
    Family(
        "qaa_adapters",
        "gauge",
        ("state",),
        "adapters by state: served, rejected, unchecked (nobody has asked for them)",
    ),
    Family("qaa_source_age_seconds", "gauge", (), "since the adapters' source could be listed"),
    Family(
        "qaa_catalogue_fingerprint", "gauge", (), "a number that is equal on replicas that serve the same contents"
    ),
    Family(
        "qaa_alias_requests_total",
        "counter",
        ("alias", "revision", "outcome"),
        "requests for an alias, by the revision that answered",
    ),
    Family(
        "qaa_alias_request_seconds", "histogram", ("alias", "revision"), "as qaa_request_seconds, for an alias"
    ),
    Family(
        "qaa_adapter_rejected",
        "gauge",
        ("adapter",),
        "1 while the newest content is not served (other: how many)",
    ),
    Family("qaa_adapter_load_seconds", "histogram", (), "bringing an adapter into the engine"),
    Family("qaa_adapter_swaps_total", "counter", ("result",), "published, rejected, removed, rolled_back"),
    Family(
        "qaa_adapter_rejections_total",
        "counter",
        ("reason",),
        "adapters refused: name, invalid, store (no room, disk), memory (cache full), engine, source",
    ),
    Family("qaa_adapter_evictions_total", "counter", ("tier",), "adapters that made room for others: host"),
    Family("qaa_circuit_seconds", "histogram", ("backend",), "the circuits of one layer in one step, sampled"),
    Family("qaa_ready", "gauge", (), "1 while requests are taken, as /ready says"),
    Family("qaa_draining", "gauge", (), "1 while the server takes no more requests"),
    Family(
        "qaa_build_info",
        "gauge",
        ("version", "vllm", "torch", "circuits"),
        "always 1; circuits: the backend that they run on",
    ),
    Family(
        "qaa_circuit_backend_seconds",
        "gauge",
        ("backend",),
        "one run on all of the model's shapes, as timed at the start to choose a backend; none where one was "
        "named or only one can run",
    ),
    Family(
        "vllm:lora_requests_info",
        "gauge",
        ("running_lora_adapters", "waiting_lora_adapters", "max_lora"),
        "Unix time; adapters with running and with waiting requests, slots of a batch; instead of vLLM's own",
    ),
)

_BY_NAME = {family.name: family for family in FAMILIES}


def family(name: str) -> Family:
    """The family of this name."""
    return _BY_NAME[name]


def reference() -> str:
    """The metrics as Markdown, as docs/metrics.md has them."""
    rows = [
        f"| `{f.name}` | {f.kind} | {', '.join(f'`{label}`' for label in f.labels) or '-'} | {f.about} |"
        for f in FAMILIES
    ]
    return "\n".join(["| metric | kind | labels | what |", "|---|---|---|---|", *rows])
