"""Parts that several pages have."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any
from urllib.parse import quote

from nicegui import ui
from rich.filesize import decimal

from qaa_serve.console.api import ApiError
from qaa_serve.console.session import Session

#: Names that are suggested at once.
_SUGGESTED = 20


def row() -> ui.element:
    """A line of fields and buttons, which breaks where the page is narrow."""
    return ui.element("div").classes("qaa-row")


def text_input(label: str, **given: Any) -> ui.input:
    """A line to write in, of which the browser keeps nothing."""
    return ui.input(label, **given).props("outlined dense autocomplete=off")


def name_input(session: Session, label: str) -> ui.input:
    """A model's or adapter's name, with suggestions from what the session's client may see."""

    async def suggest() -> None:
        written = written_in(field)
        found = [name for name in await session.models() if written in name][:_SUGGESTED]
        names.set_content("".join(f'<option value="{escape(name)}">' for name in found))

    names = ui.html("", tag="datalist", sanitize=False)
    field = text_input(label, on_change=suggest).props(f"list={names.html_id}")
    return field.on("focus", suggest)


def written_in(field: ui.input) -> str:
    """A field's text, without spaces around it."""
    return str(field.value or "").strip()


@contextmanager
def dialog() -> Iterator[ui.dialog]:
    """A dialog to be filled. It is gone from the page once it is closed, however that is done."""
    with ui.dialog(value=True) as shown, ui.card().classes("qaa-dialog"):
        yield shown
    shown.on("hide", shown.delete)


def html_table(rows: Iterable[Mapping[str, Any]], left: Container[str], linked: bool = False) -> str:
    """Rows of text as HTML: a thousand cells that are no elements of the page are drawn at once.

    Args:
        rows: each with a value by the column's title, the same columns in all; None is shown as nothing.
        left: columns of words; the others are numbers.
        linked: the first column has names of adapters, and links to them.
    """

    def line(tag: str, cells: Mapping[str, Any]) -> str:
        parts = []
        for number, (title, value) in enumerate(cells.items()):
            text = "" if value is None else escape(str(value))
            if linked and tag == "td" and not number:
                text = f'<a href="/adapters/{quote(str(value), safe="")}">{text}</a>'
            parts.append(f'<{tag} class="text-{"left" if title in left else "right"}">{text}</{tag}>')
        return f"<tr>{''.join(parts)}</tr>"

    rows = list(rows)
    head = line("th", dict(zip(rows[0], rows[0], strict=True))) if rows else ""
    body = "".join(line("td", cells) for cells in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


class Changes:
    """Changes of what is served: each is asked first, and below is shown what became of the last one."""

    def __init__(self, session: Session):
        self._session = session
        self._said = ui.label().classes("qaa-bad").props("role=alert")
        self._audit = ui.label().classes("qaa-audit").props('role=status aria-label="Audit line"')
        self._audit.bind_visibility_from(self._audit, "text", backward=bool)

    async def make(self, question: str, action: str, name: str, method: str, path: str, **request: Any) -> bool:
        """Ask, make the change, and show the newest line that the server's audit log has of this name.

        Args:
            question: what will be done, in one sentence.
            action: the word for it.
            name: the adapter or alias.
            method: of the admin's route that makes the change; what the server refuses is shown.
            path: the route's.
            request: `json`, `files` and `headers` for it.

        Returns:
            Whether the change was made.
        """
        api = self._session.api
        with dialog() as asked:
            ui.label(question).style("overflow-wrap: anywhere")
            with ui.row():
                ui.button(action, on_click=lambda: asked.submit(True))
                ui.button("Cancel", on_click=asked.close).props("flat autofocus")
        if not await asked:
            return False
        self.say()
        refused = ""
        try:
            await api.admin(method, path, **request)
        except ApiError as error:
            refused = str(error)
        try:
            lines = (await api.admin("GET", "/v1/audit", params={"adapter": name, "limit": 1}))["data"]
            audit = json.dumps(lines[0]) if lines else f"{action} {name}: the audit log has no line for it"
        except ApiError as error:
            audit = f"the audit log cannot be read: {error}"
        self.say(refused, audit)
        return not refused

    def say(self, problem: str = "", audit: str = "") -> None:
        """Show why something cannot be done, and a line of the audit log, in place of what was shown before."""
        self._said.text, self._audit.text = problem, audit


def line_chart(title: str, x_axis: Mapping[str, Any], series: list[dict[str, Any]]) -> ui.echart:
    """Lines with a title and a legend; `series` as echarts takes them."""
    label, faint = {"color": "#888"}, {"lineStyle": {"color": "#8884"}}
    return ui.echart(
        {
            "title": {"text": title, "padding": 0, "textStyle": {"fontSize": 13, "color": "#888"}},
            "animation": False,
            "grid": {"left": 55, "right": 15, "top": 55, "bottom": 35},
            "legend": {"top": 22, "textStyle": label},
            "tooltip": {"trigger": "axis"},
            "xAxis": {**x_axis, "axisLabel": label, "splitLine": {"show": False}},
            "yAxis": {"type": "value", "min": 0, "axisLabel": label, "splitLine": faint},
            "series": [{"type": "line", **one} for one in series],
        }
    ).classes("qaa-chart")  # fmt: skip


def show_bytes(count: float | None) -> str:
    """A number of bytes for people."""
    return decimal(int(count)) if count else "" if count is None else "0"


def show_seconds(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return ""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
