"""Our Prometheus metrics, all of them; vLLM's own stand beside them under `vllm:`.

families    what there is: names, kinds, labels, and the table of docs/metrics.md
labels      who has a label of its own, so that the number of series is bounded
series      counters and histograms
written     a family's lines as they are scraped
requests    what is counted and timed as it happens
state       what is the case, read when it is scraped
exposition  GET /metrics
"""

from qaa_serve.server.metrics.exposition import Exposition, remove_routes
from qaa_serve.server.metrics.families import FAMILIES, Family, reference
from qaa_serve.server.metrics.labels import OTHER, RESERVED, UNKNOWN, BoundedLabels
from qaa_serve.server.metrics.requests import (
    ENDPOINTS,
    TOKEN_KINDS,
    Observation,
    Outcome,
    Sequence,
    ServerMetrics,
)
from qaa_serve.server.metrics.state import Monitor, StateCollector, TurnCounts, say_what_runs

__all__ = [
    "ENDPOINTS",
    "FAMILIES",
    "OTHER",
    "RESERVED",
    "TOKEN_KINDS",
    "UNKNOWN",
    "BoundedLabels",
    "Exposition",
    "Family",
    "Monitor",
    "Observation",
    "Outcome",
    "Sequence",
    "ServerMetrics",
    "StateCollector",
    "TurnCounts",
    "reference",
    "remove_routes",
    "say_what_runs",
]
