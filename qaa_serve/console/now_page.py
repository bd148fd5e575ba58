"""What the server does now, and did in the last minutes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nicegui import ui

from qaa_serve.console.metrics import Step, Use
from qaa_serve.console.session import Page, Session
from qaa_serve.console.widgets import html_table, line_chart, show_bytes, show_seconds

_REQUESTS, _TOKENS = "qaa_requests_total", "qaa_tokens_total"
_FIRST, _BETWEEN = "qaa_time_to_first_token_seconds", "qaa_inter_token_seconds"

#: The table of adapters is of about so many last seconds, and as long at most.
_TABLE_S, _MOST_ROWS = 300.0, 50


def _rate(step: Step, name: str, *kinds: str) -> float:
    return round(step.added.total(name, *kinds) / step.seconds, 3)


def _milliseconds(step: Step, name: str, q: float) -> float | None:
    seconds = step.added.quantile(name, q)
    return None if seconds is None else round(seconds * 1000, 2)


def _megabytes(step: Step, kind: str) -> float:
    return round(step.added.total("qaa_device_memory_bytes", kind) / 1e6, 1)


#: The charts, each with its lines: numbers of what was added in a step; None where there is none.
_CHARTS: dict[str, dict[str, Callable[[Step], float | None]]] = {
    "Requests/s": {
        "success": lambda step: _rate(step, _REQUESTS, "success"),
        "rejected": lambda step: _rate(step, _REQUESTS, "rejected"),
        "failed": lambda step: _rate(step, _REQUESTS, "client_error", "server_error"),
    },
    "Tokens/s": {
        "generated": lambda step: _rate(step, _TOKENS, "generated"),
        "prompt": lambda step: _rate(step, _TOKENS, "prompt"),
    },
    "First token, ms": {f"p{q}": partial(_milliseconds, name=_FIRST, q=q / 100) for q in (50, 95)},
    "Between tokens, ms": {f"p{q}": partial(_milliseconds, name=_BETWEEN, q=q / 100) for q in (50, 95)},
    "Memory, MB": {
        kind: partial(_megabytes, kind=kind) for kind in ("weights", "kv_cache", "adapters", "other", "free")
    },
    "Cold loads": {
        "loads": lambda step: step.added.count("qaa_adapter_load_seconds"),
        "evictions": lambda step: step.added.total("qaa_adapter_evictions_total"),
    },
}
_STACKED = {"Memory, MB": {"stack": "all", "areaStyle": {"opacity": 0.5}}}

#: The numbers on top. In what was added, gauges are what they are.
_NUMBERS: dict[str, Callable[[Step], str]] = {
    "Running": lambda step: (
        f"{step.added.total('qaa_requests_in_flight') - step.added.total('qaa_requests_waiting'):.0f}"
    ),
    "Waiting": lambda step: f"{step.added.total('qaa_requests_waiting'):.0f}",
    "Memory": lambda step: show_bytes(step.added.total("qaa_process_memory_bytes")),
    "Requests/s": lambda step: f"{_rate(step, _REQUESTS):.3g}",
    "Tokens/s": lambda step: f"{_rate(step, _TOKENS, 'generated'):.3g}",
    "First token p95": lambda step: show_seconds(step.added.quantile(_FIRST, 0.95)),
}


def _row(name: str, use: Use, seconds: float) -> dict[str, Any]:
    """What one adapter did in so many seconds."""
    return {
        "Adapter": name,
        "Requests/min": f"{use.total(_REQUESTS) / seconds * 60:.3g}",
        "Tokens/s": f"{use.total(_TOKENS, 'generated') / seconds:.3g}",
        "First token p50": show_seconds(use.quantile(_FIRST, 0.5)),
        "Between tokens p50": show_seconds(use.quantile(_BETWEEN, 0.5)),
        "Request p95": show_seconds(use.quantile("qaa_request_seconds", 0.95)),
        "Errors": f"{use.errors:.0f}",
        "Host memory": show_bytes(use.total("qaa_adapter_bytes", "host")),
    }


class NowPage(Page):
    """Numbers, charts, and a table by adapter."""

    path = "/now"

    def __init__(self, session: Session):
        super().__init__(session)
        self._shown = 0.0
        self._numbers = {}
        with ui.element("div").classes("qaa-cards qaa-tiles"):
            for title in _NUMBERS:
                with ui.element("div").classes("qaa-card"):
                    ui.label(title).classes("qaa-quiet")
                    self._numbers[title] = ui.label("-").classes("qaa-number")
        with ui.element("div").classes("qaa-cards qaa-wide"):
            self._charts = {}
            for title, lines in _CHARTS.items():
                series = [{"name": name, "showSymbol": False, **_STACKED.get(title, {})} for name in lines]
                self._charts[title] = line_chart(title, {"type": "time"}, series)
        ui.label("By adapter, over the last five minutes").classes("qaa-title")
        self._table = ui.html(sanitize=False).classes("qaa-table")

    async def show(self, name: str | None) -> None:
        """Show the newest numbers."""
        self._shown = 0.0
        await self.tick()

    async def tick(self) -> None:
        """Show newer numbers, if there are any."""
        steps = self.session.observer.steps
        if not steps or steps[-1].time == self._shown:
            return
        self._shown = steps[-1].time
        for title, text_of in _NUMBERS.items():
            self._numbers[title].text = text_of(steps[-1]) or "-"
        for title, lines in _CHARTS.items():
            for series, value_of in zip(self._charts[title].options["series"], lines.values(), strict=True):
                series["data"] = [[round(step.time * 1000), value_of(step)] for step in steps]
            self._charts[title].update()
        seconds, uses = self.session.observer.by_adapter(_TABLE_S)
        if not self.session.api.is_admin:  # who may use some models sees these
            models = {*await self.session.models()}
            uses = {name: use for name, use in uses.items() if name in models}
        busiest = sorted(uses, key=lambda name: -uses[name].total(_REQUESTS))[:_MOST_ROWS]
        rows = (_row(name, uses[name], seconds) for name in busiest)
        self._table.set_content(html_table(rows, ("Adapter",)))
