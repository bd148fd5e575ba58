"""What an adapter is: its facts, circuit, norms and card."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import ui

from qaa_serve.console.api import ApiError
from qaa_serve.console.inspector import Inspected, inspect
from qaa_serve.console.session import Session
from qaa_serve.console.widgets import NameInput, show_bytes

_NORMS = {"update_frobenius": "Frobenius norm of the update", "relative_update": "Update beside W x"}


class InsidePage:
    """Choose an adapter and look inside.

    Attributes:
        name: whose.
    """

    def __init__(self, session: Session):
        self._session = session
        with ui.element("div").classes("qaa-row"):
            self.name = NameInput(session, "Adapter")
            self.name.field.on("keydown.enter", self.look)
            ui.button("Look", on_click=self.look)
        self._said = ui.label().classes("qaa-bad").props("role=status")
        self._body = ui.element("div").style("width: 100%; display: flex; flex-direction: column; gap: 0.75rem")
        session.on_keys(self.name.suggest)

    @property
    def path(self) -> str:
        """Of this page, for the address bar."""
        return f"/inside/{quote(self.name.value)}" if self.name.value else "/inside"

    async def look(self) -> None:
        """Show the adapter that is named."""
        self._said.text = ""
        self._body.clear()
        name = self.name.value.partition("@")[0]
        if not name:
            return
        ui.navigate.history.replace(self.path)
        api = self._session.api
        try:
            if not await api.may_see(name):
                raise ApiError(404, f"there is no adapter {name!r} that these keys may see")
            if api.is_admin:
                self._show_served(await api.adapter(name))
        except ApiError as error:
            self._said.text = str(error)
            return
        root = self._session.settings.adapters
        if root is None:
            with self._body:
                ui.label("Circuits, norms and cards need the files: start the console with --adapters DIR.")
        elif not (directory := root / name).is_dir() or "/" in name or name.startswith("."):
            with self._body:
                ui.label(f"The console's --adapters has no directory {name}: what the API says is all there is.")
        else:
            await self._inspect(directory)

    async def _inspect(self, directory: Path) -> None:
        with self._body:
            spinner = ui.spinner(size="2rem")
        found = await inspect(directory)
        spinner.delete()
        if found.problem:
            self._said.text = found.problem
        with self._body:
            if found.facts is not None:
                _show_facts(found.facts)
            if found.drawing is not None:
                self._show_circuit(directory, found)
            if found.facts is not None and found.facts.get("modules"):
                _show_norms(found.facts["modules"])
            if found.card is not None:
                with ui.expansion("Card", value=True).style("width: 100%"):
                    ui.markdown(_without_front_matter(found.card))

    def _show_served(self, adapter: dict[str, Any]) -> None:
        with self._body:
            rejection = adapter.get("rejection")
            if rejection:
                ui.label(f"Not served: {rejection['reason']}").classes("qaa-bad")
            facts = {
                "Served": adapter["revision"] or adapter["state"], "Kind": adapter["kind"],
                "Rank": adapter["rank"], **(adapter.get("details") or {}),
            }  # fmt: skip
            _show_table("What the server says", facts)

    def _show_circuit(self, directory: Path, found: Inspected) -> None:
        """The drawing, and a choice of the module that it is of."""
        names = [module["name"] for module in (found.facts or {}).get("modules", [])]

        async def redraw() -> None:
            choice.disable()
            other = await inspect(directory, choice.value)
            self._said.text = other.problem or ""
            if other.drawing is not None:
                picture.set_content(_picture(other.drawing))
            choice.enable()

        choice = ui.select(names, value=names[0] if names else None, label="Circuit of", on_change=redraw)
        choice.props("outlined dense").style("max-width: 30rem")
        picture = ui.html(_picture(found.drawing or b""), sanitize=False).classes("qaa-drawing")
        picture.props('tabindex=0 aria-label="Circuit"')


def _picture(drawing: bytes) -> str:
    data = base64.b64encode(drawing).decode()
    return f'<img alt="the circuit with its trained angles" src="data:image/svg+xml;base64,{data}">'


def _show_facts(facts: dict[str, Any]) -> None:
    base, sizes = facts.get("base") or {}, facts.get("sizes") or {}
    fits = {True: "fits", False: "does not fit", None: f"not checked: {base.get('problem')}"}[base.get("fits")]
    shown = {
        "Revision in the directory": facts.get("revision"),
        "Can be served": "yes" if facts.get("can_be_served") else f"no: {facts.get('reason')}",
        "Base model": f"{base.get('named')} ({fits})",
        "Modules": sizes.get("modules"),
        "Trained parameters": sizes.get("parameters"),
        "of them angles": sizes.get("angles"),
        "On disk": show_bytes(sizes.get("bytes_on_disk")),
        "LoRA of the same size has rank": sizes.get("equal_lora_rank"),
    }
    _show_table("What qaa-serve inspect says", shown)
    for note in facts.get("notes") or []:
        ui.label(note).classes("qaa-quiet")


def _show_table(title: str, facts: dict[str, Any]) -> None:
    rows = [
        {"what": what, "value": f"{value:,}" if isinstance(value, int) else str(value)}
        for what, value in facts.items()
        if value not in (None, "")
    ]
    columns = [
        {"name": name, "label": name, "field": name, "align": "left", "style": "white-space: normal"}
        for name in ("what", "value")
    ]
    ui.table(rows=rows, columns=columns, row_key="what", title=title).props("flat dense bordered hide-header")


def _show_norms(modules: list[dict[str, Any]]) -> None:
    """The size of the updates by layer, a line a kind of module."""
    with ui.element("div").classes("qaa-cards"):
        for key, title in _NORMS.items():
            kinds: dict[str, list[list[float]]] = {}
            for module in modules:
                if module.get(key) is not None and module.get("layer") is not None:
                    kinds.setdefault(module["kind"], []).append([module["layer"], round(module[key], 6)])
            if not kinds:
                continue
            ui.echart(
                {
                    "title": {"text": title, "left": 0, "textStyle": {"fontSize": 13, "color": "#888"}},
                    "legend": {"top": 22, "textStyle": {"color": "#888"}},
                    "grid": {"left": 55, "right": 15, "top": 75, "bottom": 35},
                    "tooltip": {"trigger": "axis"},
                    "xAxis": {"type": "value", "name": "layer", "nameLocation": "middle", "nameGap": 22,
                              "minInterval": 1},
                    "yAxis": {"type": "value", "min": 0},
                    "series": [
                        {"name": kind, "type": "line", "data": sorted(points)} for kind, points in kinds.items()
                    ],
                }
            ).classes("qaa-chart").style("height: 18rem").props('aria-label="Norms by layer"')  # fmt: skip


def _without_front_matter(card: str) -> str:
    if card.startswith("---\n"):
        return card[4:].partition("\n---\n")[2] or card
    return card
