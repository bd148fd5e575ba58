"""What the server does now, and did in the last minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nicegui import ui

from qaa_serve.console.metrics import Use
from qaa_serve.console.session import Session
from qaa_serve.console.widgets import models_of, show_bytes, show_seconds

_REQUESTS, _TOKENS, _LOADS = "qaa_requests_total", "qaa_tokens_total", "qaa_adapter_load_seconds"
_FIRST, _BETWEEN, _MEMORY = (
    "qaa_time_to_first_token_seconds", "qaa_inter_token_seconds", "qaa_device_memory_bytes",
)  # fmt: skip

#: The table of adapters is of about so many last seconds, and as long at most.
_TABLE_S, _MOST_ROWS = 300.0, 50


def _rate(name: str, *kinds: str) -> Callable[[Use, float], float]:
    return lambda use, seconds: round(use.total(name, *kinds) / seconds, 3)


def _quantile(name: str, q: float) -> Callable[[Use, float], float | None]:
    def value(use: Use, _: float) -> float | None:
        seconds = use.histograms[name].quantile(q) if name in use.histograms else None
        return None if seconds is None else round(seconds * 1000, 2)

    return value


def _megabytes(name: str, kind: str) -> Callable[[Use, float], float]:
    return lambda use, _: round(use.counts.get((name, kind), 0.0) / 1e6, 1)


#: The charts: of each its lines, which make a number of what was added in so many seconds.
_CHARTS: dict[str, dict[str, Callable[[Use, float], float | None]]] = {
    "Requests/s": {
        "success": _rate(_REQUESTS, "success"),
        "rejected": _rate(_REQUESTS, "rejected"),
        "failed": _rate(_REQUESTS, "client_error", "server_error"),
    },
    "Tokens/s": {"generated": _rate(_TOKENS, "generated"), "prompt": _rate(_TOKENS, "prompt")},
    "First token, ms": {"p50": _quantile(_FIRST, 0.5), "p95": _quantile(_FIRST, 0.95)},
    "Between tokens, ms": {"p50": _quantile(_BETWEEN, 0.5), "p95": _quantile(_BETWEEN, 0.95)},
    "Memory, MB": {
        kind: _megabytes(_MEMORY, kind) for kind in ("weights", "kv_cache", "adapters", "other", "free")
    },
    "Cold loads": {
        "loads": lambda use, _: use.histograms[_LOADS].count if _LOADS in use.histograms else 0.0,
        "evictions": lambda use, _: use.total("qaa_adapter_evictions_total"),
    },
}

_COLUMNS = {
    "adapter": "Adapter", "requests": "Requests/min", "tokens": "Tokens/s", "first": "First token p50",
    "between": "Between tokens p50", "p95": "Request p95", "errors": "Errors", "memory": "Host memory",
}  # fmt: skip


class NowPage:
    """Numbers, charts, and a table by adapter."""

    def __init__(self, session: Session):
        self._session = session
        self._shown = 0.0
        with ui.element("div").classes("qaa-cards"):
            self._numbers = {
                title: _tile(title)
                for title in ("Running", "Waiting", "Requests/s", "Tokens/s", "First token p95", "Memory")
            }
        with (
            ui.element("div")
            .classes("qaa-cards")
            .style("grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr))")
        ):
            self._charts = {title: _chart(title, lines) for title, lines in _CHARTS.items()}
        ui.label("By adapter, over the last five minutes").classes("qaa-title")
        columns = [
            {"name": name, "label": label, "field": name, "align": "left" if name == "adapter" else "right"}
            for name, label in _COLUMNS.items()
        ]
        self._table = ui.table(columns=columns, rows=[], row_key="adapter").props("flat dense")

    async def refresh(self) -> None:
        """Show the newest numbers, if there are newer ones."""
        newest = self._session.observer.newest
        if newest is None or newest.time == self._shown:
            return
        self._shown = newest.time
        steps = list(self._session.observer.steps())
        for title, lines in _CHARTS.items():
            chart = self._charts[title]
            for series, value in zip(chart.options["series"], lines.values(), strict=True):
                series["data"] = [[round(at * 1000), value(use, seconds)] for at, seconds, use in steps]
            chart.update()
        self._show_numbers(newest.total, steps)
        await self._show_table()

    def _show_numbers(self, total: Use, steps: list[tuple[float, float, Use]]) -> None:
        running = total.total("qaa_requests_in_flight") - total.total("qaa_requests_waiting")
        shown = {
            "Running": f"{running:.0f}",
            "Waiting": f"{total.total('qaa_requests_waiting'):.0f}",
            "Memory": show_bytes(total.total("qaa_process_memory_bytes")),
        }
        if steps:
            _, seconds, use = steps[-1]
            shown["Requests/s"] = f"{use.total(_REQUESTS) / seconds:.3g}"
            shown["Tokens/s"] = f"{use.total(_TOKENS, 'generated') / seconds:.3g}"
        recent = [use.histograms[_FIRST].quantile(0.95) for _, _, use in steps if _FIRST in use.histograms]
        known = [seconds for seconds in recent if seconds is not None]
        shown["First token p95"] = show_seconds(known[-1]) if known else "-"
        for title, text in shown.items():
            self._numbers[title].text = text

    async def _show_table(self) -> None:
        seconds, uses = self._session.observer.by_adapter(_TABLE_S)
        if not self._session.api.is_admin:  # who may use some models sees these
            models = {*await models_of(self._session)}
            uses = {name: use for name, use in uses.items() if name in models}
        busiest = sorted(uses.items(), key=lambda item: -item[1].total(_REQUESTS))[:_MOST_ROWS]
        self._table.rows = [_row(name, use, seconds) for name, use in busiest]


def _row(name: str, use: Use, seconds: float) -> dict[str, Any]:
    def quantile(series: str, q: float) -> str:
        return show_seconds(use.histograms[series].quantile(q)) if series in use.histograms else ""

    return {
        "adapter": name,
        "requests": f"{use.total(_REQUESTS) / seconds * 60:.3g}",
        "tokens": f"{use.total(_TOKENS, 'generated') / seconds:.3g}",
        "first": quantile(_FIRST, 0.5),
        "between": quantile(_BETWEEN, 0.5),
        "p95": quantile("qaa_request_seconds", 0.95),
        "errors": f"{use.errors:.0f}",
        "memory": show_bytes(use.counts.get(("qaa_adapter_bytes", "host"))),
    }


def _tile(title: str) -> ui.label:
    with ui.element("div").classes("qaa-card"):
        ui.label(title).classes("qaa-quiet")
        return ui.label("-").classes("qaa-number")


def _chart(title: str, lines: Iterable[str]) -> ui.echart:
    names = [*lines]
    stacked = {"stack": "all", "areaStyle": {"opacity": 0.5}} if title.startswith("Memory") else {}
    series = [{"name": name, "type": "line", "showSymbol": False, "data": [], **stacked} for name in names]
    return ui.echart(
        {
            "title": {"text": title, "left": 0, "textStyle": {"fontSize": 13, "color": "#888"}},
            "animation": False,
            "grid": {"left": 55, "right": 15, "top": 55, "bottom": 25},
            "legend": {"top": 22, "data": names, "textStyle": {"color": "#888"}},
            "tooltip": {"trigger": "axis"},
            "xAxis": {"type": "time"},
            "yAxis": {"type": "value", "min": 0},
            "series": series,
        }
    ).classes("qaa-chart")  # fmt: skip
