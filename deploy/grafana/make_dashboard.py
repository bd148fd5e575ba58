"""Write dashboards/qaa-serve.json: rows of panels, each a title, a unit and queries.

python deploy/grafana/make_dashboard.py

In a query, SERVER stands for the chosen servers and ADAPTER for those and the chosen adapters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "dashboards" / "qaa-serve.json"

SERVER = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
ADAPTER = f'{SERVER}, adapter=~"$adapter"'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass
class Panel:
    """One panel.

    Attributes:
        title: above it.
        unit: Grafana's name of the unit.
        queries: by legend.
        kind: timeseries, stat or table.
        width: of the 24 columns.
        stacked: whether the series are parts of a whole.
        thresholds: (from, colour), rising; the first colour holds below the first value.
        maximum: of the axis.
        about: what the panel shows, where the title does not say it.
    """

    title: str
    unit: str
    queries: dict[str, str]
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    thresholds: list[tuple[float, str]] = field(default_factory=list)
    maximum: float | None = None
    about: str = ""

    @property
    def height(self) -> int:
        """In rows of the grid."""
        return 4 if self.kind == "stat" else 8


def rate(metric: str, by: str, labels: str = ADAPTER) -> str:
    """Per second, summed by labels."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def quantiles(metric: str, by: str = "adapter", labels: str = ADAPTER) -> dict[str, str]:
    """Three quantiles of a histogram, by legend."""
    buckets = rate(f"{metric}_bucket", f"{by}, le", labels)
    return {f"{{{{{by}}}}} {name}": f"histogram_quantile({q}, {buckets})" for name, q in QUANTILES.items()}


def ratio(part: str, whole: str) -> str:
    """A share; nothing where there is no whole."""
    return f"{part} / ({whole} > 0)"


def outcome(value: str) -> str:
    """The labels of requests with an outcome."""
    return f'{ADAPTER}, outcome="{value}"'


UP: list[tuple[float, str]] = [(0, "red"), (1, "green")]
RED_ABOVE_0: list[tuple[float, str]] = [(1, "red")]
CACHE_TIGHT: list[tuple[float, str]] = [(0.8, "yellow"), (0.95, "red")]
REQUESTS, TOKENS = "qaa_requests_total", "qaa_tokens_total"

ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel("Servers up", "none", {"": f"sum(up{{{SERVER}}})"}, "stat", 3, thresholds=UP),
        Panel("Requests/s", "reqps", {"": f"sum(rate({REQUESTS}{{{ADAPTER}}}[$__rate_interval]))"}, "stat", 3),
        Panel(
            "Server errors", "percentunit",
            {"": ratio(f"(sum(rate({REQUESTS}{{{outcome('server_error')}}}[$__rate_interval])) or vector(0))",
                       f"sum(rate({REQUESTS}{{{ADAPTER}}}[$__rate_interval]))")},
            "stat", 3, thresholds=[(0.01, "yellow"), (0.05, "red")],
        ),
        Panel(
            "First token, p95", "s",
            {"": f"histogram_quantile(0.95, {rate('qaa_time_to_first_token_seconds_bucket', 'le')})"},
            "stat", 3, thresholds=[(2, "yellow"), (5, "red")],
        ),
        Panel(
            "Tokens generated/s", "short",
            {"": f'sum(rate({TOKENS}{{{ADAPTER}, kind="generated"}}[$__rate_interval]))'}, "stat", 3,
        ),
        Panel("Adapters served", "none", {"": f'max(qaa_adapters{{{SERVER}, state="served"}})'}, "stat", 3,
              about="Of the server with the most."),
        Panel("Adapters rejected", "none", {"": f'max(qaa_adapters{{{SERVER}, state="rejected"}})'}, "stat", 3,
              thresholds=RED_ABOVE_0),
        Panel("Servers", "none",
              {"ready": f"sum(qaa_ready{{{SERVER}}})", "draining": f"sum(qaa_draining{{{SERVER}}})"}, "stat", 3),
    ],
    "Traffic": [
        Panel("Requests by adapter", "reqps", {"{{adapter}}": rate(REQUESTS, "adapter")}, width=12),
        Panel("Requests by endpoint", "reqps", {"{{endpoint}}": rate(REQUESTS, "endpoint")}, width=12,
              stacked=True),
        Panel("In flight, by adapter", "none",
              {"{{adapter}}": f"sum by (adapter) (qaa_requests_in_flight{{{ADAPTER}}})"}, width=12),
        Panel("Waiting for their turn, by adapter", "none",
              {"{{adapter}}": f"sum by (adapter) (qaa_requests_waiting{{{ADAPTER}}})"}, width=12),
    ],
    "Latency by adapter": [
        Panel("Time to the first token", "s", quantiles("qaa_time_to_first_token_seconds"), width=12),
        Panel("Between tokens", "s", quantiles("qaa_inter_token_seconds"), width=12),
        Panel("Request, end to end", "s", quantiles("qaa_request_seconds"), width=12),
        Panel("Queue", "s", quantiles("qaa_queue_seconds"), width=12,
              about="From arrival until the request runs."),
    ],
    "Tokens": [
        Panel("Generated/s, by adapter", "short",
              {"{{adapter}}": rate(TOKENS, "adapter", f'{ADAPTER}, kind="generated"')}),
        Panel("Prompt/s, by adapter", "short",
              {"{{adapter}}": rate(TOKENS, "adapter", f'{ADAPTER}, kind="prompt"')}),
        Panel(
            "Share of the prompt from the prefix cache", "percentunit",
            {"{{adapter}}": ratio(rate(TOKENS, "adapter", f'{ADAPTER}, kind="cached"'),
                                  rate(TOKENS, "adapter", f'{ADAPTER}, kind="prompt"'))},
            maximum=1,
        ),
    ],
    "Keys": [
        Panel("Tokens generated/s, by client's key", "short",
              {"{{key}}": rate("qaa_key_tokens_total", "key", f'{SERVER}, kind="generated"')}),
        Panel("Prompt tokens/s, by client's key", "short",
              {"{{key}}": rate("qaa_key_tokens_total", "key", f'{SERVER}, kind="prompt"')}),
        Panel("Requests, by client's key", "reqps",
              {"{{key}} {{outcome}}": rate("qaa_key_requests_total", "key, outcome", SERVER)}),
    ],
    "Errors": [
        Panel("Requests by outcome", "reqps", {"{{outcome}}": rate(REQUESTS, "outcome")}, stacked=True),
        Panel(
            "Server errors by adapter", "percentunit",
            {"{{adapter}}": ratio(rate(REQUESTS, "adapter", outcome("server_error")), rate(REQUESTS, "adapter"))},
            thresholds=[(0.05, "red")],
        ),
        Panel(
            "Turned away or given up by the client", "reqps",
            {"{{adapter}} rejected": rate(REQUESTS, "adapter", outcome("rejected")),
             "{{adapter}} aborted": rate(REQUESTS, "adapter", outcome("aborted"))},
        ),
        Panel("Refused for want of a key", "reqps",
              {"{{instance}} {{role}}": rate("qaa_wrong_keys_total", "instance, role", SERVER)}),
    ],
    "Adapters": [
        Panel("By state", "none",
              {"{{instance}} {{state}}": f"sum by (instance, state) (qaa_adapters{{{SERVER}}})"}),
        Panel("Swaps in each interval, by result", "none",
              {"{{result}}": f"sum by (result) (increase(qaa_adapter_swaps_total{{{SERVER}}}[$__rate_interval]))"},
              stacked=True),
        Panel("Rejections in each interval, by reason", "none",
              {"{{reason}}": "sum by (reason) "
               f"(increase(qaa_adapter_rejections_total{{{SERVER}}}[$__rate_interval]))"}, stacked=True),
        Panel("Not checked yet", "none",
              {"{{instance}}": f'sum by (instance) (qaa_adapters{{{SERVER}, state="unchecked"}})'},
              about="Nobody has asked for them, and their turn in the background has not come."),
        Panel("Since the source was listed", "s",
              {"{{instance}}": f"max by (instance) (qaa_source_age_seconds{{{SERVER}}})"},
              thresholds=[(180, "red")], about="It is listed every --adapters-poll seconds."),
        Panel("Different catalogues", "none",
              {"{{namespace}}": "count by (namespace) (count_values by (namespace) "
               f"(\"fingerprint\", qaa_catalogue_fingerprint{{{SERVER}}}))"},
              thresholds=[(2, "yellow")],
              about="1 while all servers serve the same contents; more while they come to know of a change."),
        Panel("Rejected now", "none", {"": f"qaa_adapter_rejected{{{ADAPTER}}} > 0"}, "table",
              about="GET /v1/adapters says why."),
        Panel("Loading an adapter", "s", quantiles("qaa_adapter_load_seconds", "instance", SERVER)),
        Panel("Evictions/s", "short",
              {"{{instance}}": rate("qaa_adapter_evictions_total", "instance", f'{SERVER}, tier="host"')}),
        Panel("Adapters by tier", "none", {"{{tier}}": f"sum by (tier) (qaa_adapter_tier{{{ADAPTER}}})"},
              stacked=True, about="Where their current revision is, nearest to the device."),
        Panel("Bytes by tier", "bytes", {"{{tier}}": f"sum by (tier) (qaa_adapter_bytes{{{ADAPTER}}})"},
              stacked=True,
              about="store: the files in the source; host: the engine's memory; device: the slots of the batch."),
        Panel(
            "Adapter cache", "bytes",
            {"{{instance}} in use": f"sum by (instance) (qaa_adapter_cache_bytes{{{SERVER}}})",
             "{{instance}} limit": f"sum by (instance) (qaa_adapter_cache_capacity_bytes{{{SERVER}}})"},
        ),
        Panel("The 10 largest, in the host's memory", "bytes",
              {"{{adapter}}": f'topk(10, sum by (adapter) (qaa_adapter_bytes{{{ADAPTER}, tier="host"}}))'}),
    ],
    "Aliases": [
        Panel("Requests by alias and revision", "reqps",
              {"{{alias}} {{revision}}": rate("qaa_alias_requests_total", "alias, revision", SERVER)}, width=12,
              stacked=True, about="How the shares of an alias turn out."),
        Panel(
            "Server errors by alias and revision", "percentunit",
            {"{{alias}} {{revision}}": ratio(
                rate("qaa_alias_requests_total", "alias, revision", f'{SERVER}, outcome="server_error"'),
                rate("qaa_alias_requests_total", "alias, revision", SERVER))},
            width=12, thresholds=[(0.05, "red")],
        ),
        Panel("Request, end to end, by alias and revision", "s",
              {f"{{{{alias}}}} {{{{revision}}}} {name}": query for name, query in zip(
                  QUANTILES, quantiles("qaa_alias_request_seconds", "alias, revision", SERVER).values(),
                  strict=True)}, width=WIDTH),
    ],
    "Memory": [
        Panel("Of the devices, by kind", "bytes",
              {"{{instance}} {{device}} {{kind}}":
               f"sum by (instance, device, kind) (qaa_device_memory_bytes{{{SERVER}}})"}, width=12, stacked=True),
        Panel("Of the processes", "bytes",
              {"{{instance}} {{process}}": f"sum by (instance, process) (qaa_process_memory_bytes{{{SERVER}}})"},
              width=12, stacked=True),
        Panel("Since the engine last answered", "s",
              {"{{instance}}": f"max by (instance) (qaa_engine_account_age_seconds{{{SERVER}}})"}, width=12,
              thresholds=[(60, "red")], about="It is asked every ten seconds what memory it takes."),
    ],
    "Circuits": [
        Panel("Time of a circuit, by backend (sampled)", "s", quantiles("qaa_circuit_seconds", "backend", SERVER),
              width=12),
        Panel("Samples/s, by backend", "short",
              {"{{backend}}": rate("qaa_circuit_seconds_count", "backend", SERVER)}, width=12),
        Panel("Timed at the start to choose a backend", "s",
              {"{{backend}}": f"max by (backend) (qaa_circuit_backend_seconds{{{SERVER}}})"}, width=12,
              about="On a GPU, with --qaa-backend auto: one run on all of the model's shapes."),
    ],
    "vLLM": [
        Panel(
            "Requests in the engine", "none",
            {"{{instance}} running": f"sum by (instance) (vllm:num_requests_running{{{SERVER}}})",
             "{{instance}} waiting": f"sum by (instance) (vllm:num_requests_waiting{{{SERVER}}})"},
        ),
        Panel("KV cache in use", "percentunit",
              {"{{instance}}": f"max by (instance) (vllm:kv_cache_usage_perc{{{SERVER}}})"}, maximum=1,
              thresholds=CACHE_TIGHT),
        Panel(
            "Prefix cache, hits", "percentunit",
            {"{{instance}}": ratio(rate("vllm:prefix_cache_hits_total", "instance", SERVER),
                                   rate("vllm:prefix_cache_queries_total", "instance", SERVER))},
            maximum=1, about="Share of the tokens looked up that were there.",
        ),
        Panel(
            "Tokens/s", "short",
            {"{{instance}} prompt": rate("vllm:prompt_tokens_total", "instance", SERVER),
             "{{instance}} generated": rate("vllm:generation_tokens_total", "instance", SERVER)},
        ),
        Panel("Preemptions/s", "short", {"{{instance}}": rate("vllm:num_preemptions_total", "instance", SERVER)},
              about="Requests stopped for want of KV cache and begun again."),
        Panel("Ended requests/s, by reason", "reqps",
              {"{{finished_reason}}": rate("vllm:request_success_total", "finished_reason", SERVER)},
              stacked=True),
        Panel("Time to the first token", "s",
              quantiles("vllm:time_to_first_token_seconds", "instance", SERVER), width=12,
              about="From the engine's side: without the wait for the model's turn."),
        Panel("Queue", "s", quantiles("vllm:request_queue_time_seconds", "instance", SERVER), width=12),
        Panel("Adapters with requests now", "none", {"": f"vllm:lora_requests_info{{{SERVER}}}"}, "table",
              WIDTH, about="As routers read it that choose a server by the adapters it runs."),
    ],
    "Servers": [
        Panel("Builds", "none", {"": f"qaa_build_info{{{SERVER}}}"}, "table", width=12),
        Panel("Up since", "dateTimeAsIso",
              {"{{instance}}": f"process_start_time_seconds{{{SERVER}}} * 1000"}, "stat", 12),
    ],
}  # fmt: skip


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """A panel as Grafana reads it."""
    instant = panel.kind != "timeseries"
    base = "green" if panel.thresholds else "blue"
    steps = [{"color": base, "value": None}, *({"color": c, "value": v} for v, c in panel.thresholds)]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "color": {"mode": "thresholds" if panel.kind == "stat" else "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults |= {"min": 0} if panel.maximum is None else {"min": 0, "max": panel.maximum}
        defaults["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.thresholds else "off"},
        }
        options = {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "graphMode": "none"}
    result = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + position),
                "datasource": DATASOURCE,
                "expr": query,
                "legendFormat": legend or "__auto",
                "instant": instant,
                "range": not instant,
                **({"format": "table"} if panel.kind == "table" else {}),
            }
            for position, (legend, query) in enumerate(panel.queries.items())
        ],
    }
    if panel.kind == "table":
        result["transformations"] = [
            {"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True, "__name__": True}}}
        ]
    return result


def panels() -> list[dict[str, Any]]:
    """All rows and their panels, laid out from left to right and top to bottom."""
    result: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        position = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        result.append(
            {
                "id": len(result) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
                "gridPos": position,
            }
        )  # fmt: skip
        y += 1
        x = height = 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            result.append(panel_json(panel, len(result) + 1, x, y))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return result


def variable(name: str, label: str, values: str, *, multi: bool = True) -> dict[str, Any]:
    """A template variable with the values of a label."""
    query = {"query": f"label_values({values}, {name})", "refId": f"variable-{name}"}
    return {
        "name": name, "label": label, "type": "query", "datasource": DATASOURCE, "query": query,
        "definition": query["query"], "refresh": 2, "sort": 1, "multi": multi, "includeAll": multi,
        **({"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}} if multi else {}),
    }  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    source = {
        "name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1,
    }  # fmt: skip
    return {
        "uid": "qaa-serve",
        "title": "qaa-serve",
        "description": "Many adapters on one base model: traffic, latency, tokens, errors, memory, circuits.",
        "tags": ["qaa-serve", "vllm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [
                source,
                variable("namespace", "Namespace", "qaa_build_info"),  # All, where there is none
                variable("job", "Job", 'qaa_build_info{namespace=~"$namespace"}', multi=False),
                variable("instance", "Server", 'qaa_build_info{namespace=~"$namespace", job=~"$job"}'),
                variable("adapter", "Adapter", f"{REQUESTS}{{{SERVER}}}"),
            ]
        },
        "annotations": {
            "list": [
                {
                    "name": "Swaps",
                    "datasource": DATASOURCE,
                    "enable": True,
                    "iconColor": "purple",
                    "expr": f"sum by (instance, result) (changes(qaa_adapter_swaps_total{{{SERVER}}}[1m])) > 0",
                    "titleFormat": "Adapter {{result}}",
                    "textFormat": "{{instance}}",
                    "step": "60s",
                }
            ]
        },
        "links": [],
        "panels": panels(),
    }


def text() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
