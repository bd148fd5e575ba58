"""Parts that several pages have."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from html import escape
from typing import Any
from urllib.parse import quote

from nicegui import ui
from nicegui.events import GenericEventArguments

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
    field.on("focus", suggest)
    return field


def written_in(field: ui.input | ui.textarea) -> str:
    """A field's text, without spaces around it."""
    return str(field.value or "").strip()


def open_dialog() -> ui.dialog:
    """A dialog that is gone from the page once it is closed, however that is done."""
    dialog = ui.dialog(value=True)
    return dialog.on("hide", dialog.delete)


class Table:
    """Rows of text. They are plain HTML: a thousand cells that are no elements of the page are drawn at once."""

    def __init__(
        self, columns: Mapping[str, str], left: Iterable[str] = (), choose: Callable[[str], Any] | None = None
    ):
        """Make an empty one.

        Args:
            columns: of each column of the rows, its title.
            left: columns of words; the others are numbers.
            choose: called with what is in the first column of a row, a link then, when it is chosen.
        """
        self._classes = {column: "text-left" if column in left else "text-right" for column in columns}
        self._links = choose is not None
        head = "".join(f'<th class="{self._classes[key]}">{escape(title)}</th>' for key, title in columns.items())
        with ui.element("q-markup-table").props("flat dense"):
            if any(columns.values()):
                ui.html(f"<tr>{head}</tr>", tag="thead", sanitize=False)
            self._body = ui.html("", tag="tbody", sanitize=False)
        if choose is not None:

            async def follow(event: GenericEventArguments) -> None:
                await choose(str(event.args))

            self._body.on("click", follow, js_handler=_FOLLOW)

    def show(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Show these, each with a value by column; None is shown as nothing."""
        self._body.set_content("".join(f"<tr>{self._cells(one)}</tr>" for one in rows))

    def _cells(self, values: Mapping[str, Any]) -> str:
        cells = []
        for number, (column, css) in enumerate(self._classes.items()):
            text = escape(str(value)) if (value := values.get(column)) is not None else ""
            if self._links and not number:
                text = f'<a href="/adapters/{quote(str(value), safe="")}">{text}</a>'
            cells.append(f'<td class="{css}">{text}</td>')
        return "".join(cells)


#: A link is followed within the page, unless it is to be opened in another tab.
_FOLLOW = """(event) => {
    const link = event.target.closest("a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    emit(link.textContent);
}"""


class Changes:
    """Changes of what is served: each is asked first, and below is shown what became of the last one."""

    def __init__(self, session: Session):
        self._session = session
        self._said = ui.label().classes("qaa-bad").props("role=alert")
        self._audit = ui.label().classes("qaa-audit").props('role=status aria-label="Audit line"')
        self.clear()

    async def make(self, question: str, action: str, name: str, call: Callable[[], Awaitable[Any]]) -> bool:
        """Ask, make the change, and show the newest line that the server's audit log has of this name.

        Args:
            question: what will be done, in one sentence.
            action: the word for it.
            name: the adapter or alias.
            call: makes the change; what the server refuses is shown.

        Returns:
            Whether the change was made.
        """
        with ui.dialog() as dialog, ui.card():
            ui.label(question).style("overflow-wrap: anywhere")
            with ui.row():
                ui.button(action, on_click=lambda: dialog.submit(True))
                ui.button("Cancel", on_click=dialog.close).props("flat autofocus")
        agreed = await dialog
        dialog.delete()
        if not agreed:
            return False
        self.clear()
        made = True
        try:
            await call()
        except ApiError as error:
            made = False
            self.refuse(str(error))
        try:
            asked = {"adapter": name, "limit": 1}
            lines = (await self._session.api.admin("GET", "/v1/audit", params=asked))["data"]
        except ApiError as error:
            lines = [{"audit": f"cannot be read: {error}"}]
        self._audit.text = json.dumps(lines[0]) if lines else f"{action} {name}: the audit log has no line for it"
        self._audit.set_visibility(True)
        return made

    def refuse(self, reason: str) -> None:
        """Say why something cannot be done."""
        self._said.text = reason

    def clear(self) -> None:
        """Take away what was said of the last change."""
        self._said.text = self._audit.text = ""
        self._audit.set_visibility(False)


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
    if not count:
        return "0" if count == 0 else ""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def show_seconds(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return ""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
