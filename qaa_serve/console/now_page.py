"""What the server does now, and did in the last minutes."""

from __future__ import annotations

from collections.abc import Callable

from nicegui import ui

from qaa_serve.console.metrics import Step, Use
from qaa_serve.console.session import Page, Session
from qaa_serve.console.widgets import Table, line_chart, show_bytes, show_seconds

_REQUESTS, _TOKENS = "qaa_requests_total", "qaa_tokens_total"
_FIRST, _BETWEEN = "qaa_time_to_first_token_seconds", "qaa_inter_token_seconds"

#: The table of adapters is of about so many last seconds, and as long at most.
_TABLE_S, _MOST_ROWS = 300.0, 50

#: A number of what was added in a step; None if there is none.
_Value = Callable[[Step], float | None]


def _rate(name: str, *kinds: str) -> _Value:
    return lambda step: round(step.added.total(name, *kinds) / step.seconds, 3)


def _milliseconds(name: str, q: float) -> _Value:
    def value(step: Step) -> float | None:
        seconds = step.added.quantile(name, q)
        return None if seconds is None else round(seconds * 1000, 2)

    return value


def _megabytes(kind: str) -> _Value:
    return lambda step: round(step.added.total("qaa_device_memory_bytes", kind) / 1e6, 1)


#: The charts, each with its lines.
_CHARTS: dict[str, dict[str, _Value]] = {
    "Requests/s": {
        "success": _rate(_REQUESTS, "success"),
        "rejected": _rate(_REQUESTS, "rejected"),
        "failed": _rate(_REQUESTS, "client_error", "server_error"),
    },
    "Tokens/s": {"generated": _rate(_TOKENS, "generated"), "prompt": _rate(_TOKENS, "prompt")},
    "First token, ms": {"p50": _milliseconds(_FIRST, 0.5), "p95": _milliseconds(_FIRST, 0.95)},
    "Between tokens, ms": {"p50": _milliseconds(_BETWEEN, 0.5), "p95": _milliseconds(_BETWEEN, 0.95)},
    "Memory, MB": {kind: _megabytes(kind) for kind in ("weights", "kv_cache", "adapters", "other", "free")},
    "Cold loads": {
        "loads": lambda step: step.added.count("qaa_adapter_load_seconds"),
        "evictions": lambda step: step.added.total("qaa_adapter_evictions_total"),
    },
}
_STACKED = {"Memory, MB": {"stack": "all", "areaStyle": {"opacity": 0.5}}}

#: The numbers on top: of the server as it is, and of the last step.
_GAUGES: dict[str, Callable[[Use], str]] = {
    "Running": lambda use: f"{use.total('qaa_requests_in_flight') - use.total('qaa_requests_waiting'):.0f}",
    "Waiting": lambda use: f"{use.total('qaa_requests_waiting'):.0f}",
    "Memory": lambda use: show_bytes(use.total("qaa_process_memory_bytes")),
}
_RATES: dict[str, Callable[[Step], str]] = {
    "Requests/s": lambda step: f"{step.added.total(_REQUESTS) / step.seconds:.3g}",
    "Tokens/s": lambda step: f"{step.added.total(_TOKENS, 'generated') / step.seconds:.3g}",
    "First token p95": lambda step: show_seconds(step.added.quantile(_FIRST, 0.95)),
}

#: The table by adapter: of each column its title, and its text of what was added in so many seconds.
_COLUMNS: dict[str, Callable[[Use, float], str]] = {
    "Requests/min": lambda use, seconds: f"{use.total(_REQUESTS) / seconds * 60:.3g}",
    "Tokens/s": lambda use, seconds: f"{use.total(_TOKENS, 'generated') / seconds:.3g}",
    "First token p50": lambda use, _: show_seconds(use.quantile(_FIRST, 0.5)),
    "Between tokens p50": lambda use, _: show_seconds(use.quantile(_BETWEEN, 0.5)),
    "Request p95": lambda use, _: show_seconds(use.quantile("qaa_request_seconds", 0.95)),
    "Errors": lambda use, _: f"{use.errors:.0f}",
    "Host memory": lambda use, _: show_bytes(use.total("qaa_adapter_bytes", "host")),
}


class NowPage(Page):
    """Numbers, charts, and a table by adapter."""

    path = "/now"

    def __init__(self, session: Session):
        super().__init__(session)
        self._shown = 0.0
        self._numbers = {}
        with ui.element("div").classes("qaa-cards qaa-tiles"):
            for title in (*_GAUGES, *_RATES):
                with ui.element("div").classes("qaa-card"):
                    ui.label(title).classes("qaa-quiet")
                    self._numbers[title] = ui.label("-").classes("qaa-number")
        with ui.element("div").classes("qaa-cards qaa-wide"):
            self._charts = {
                title: line_chart(
                    title, {"type": "time"},
                    [{"name": name, "showSymbol": False, **_STACKED.get(title, {})} for name in lines],
                )
                for title, lines in _CHARTS.items()
            }  # fmt: skip
        ui.label("By adapter, over the last five minutes").classes("qaa-title")
        self._table = Table({"": "Adapter", **{title: title for title in _COLUMNS}}, left=[""])

    async def show(self, name: str | None) -> None:
        """Show the newest numbers."""
        self._shown = 0.0
        await self.tick()

    async def tick(self) -> None:
        """Show newer numbers, if there are any."""
        observer = self.session.observer
        if observer.newest is None or observer.newest.time == self._shown:
            return
        self._shown = observer.newest.time
        for title, text in _GAUGES.items():
            self._numbers[title].text = text(observer.newest.total)
        if observer.steps:
            for title, text_of in _RATES.items():
                self._numbers[title].text = text_of(observer.steps[-1]) or "-"
        for title, lines in _CHARTS.items():
            for series, value in zip(self._charts[title].options["series"], lines.values(), strict=True):
                series["data"] = [[round(step.time * 1000), value(step)] for step in observer.steps]
            self._charts[title].update()
        seconds, uses = observer.by_adapter(_TABLE_S)
        if not self.session.api.is_admin:  # who may use some models sees these
            models = {*await self.session.models()}
            uses = {name: use for name, use in uses.items() if name in models}
        busiest = sorted(uses, key=lambda name: -uses[name].total(_REQUESTS))[:_MOST_ROWS]
        self._table.show(
            {"": name, **{title: text(uses[name], seconds) for title, text in _COLUMNS.items()}}
            for name in busiest
        )
