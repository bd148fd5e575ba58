"""What an adapter is: its facts, circuit, norms and card."""

from __future__ import annotations

import base64
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import ui

from qaa_serve.console.api import ApiError
from qaa_serve.console.inspector import inspect
from qaa_serve.console.session import Page, Session
from qaa_serve.console.widgets import line_chart, name_input, row, show_bytes, written_in

_NORMS = {"update_frobenius": "Frobenius norm of the update", "relative_update": "Update beside W x"}
_FITS = {True: "fits", False: "does not fit", None: "not checked"}


class InsidePage(Page):
    """Choose an adapter and look inside."""

    path = "/inside"

    def __init__(self, session: Session):
        super().__init__(session)
        with row():
            self._name = name_input(session, "Adapter")
            self._name.on("keydown.enter", self._look)
            ui.button("Look", on_click=self._look)
        self._said = ui.label().classes("qaa-bad").props("role=status")
        self._body = ui.element("div").classes("qaa-column")

    async def show(self, name: str | None) -> None:
        """Look into another adapter, or leave what is shown."""
        if name:
            self._name.value = name
            await self._look()

    async def _look(self) -> None:
        self._said.text = ""
        self._body.clear()
        name = written_in(self._name).partition("@")[0]
        self.path = f"/inside/{quote(name)}" if name else "/inside"
        ui.navigate.history.replace(self.path)
        if name:
            with self._body:
                try:
                    await self._show(name)
                except ApiError as error:
                    self._said.text = str(error)

    async def _show(self, name: str) -> None:
        api, root = self.session.api, self.session.adapters
        if api.is_admin:
            adapter = await api.adapter(name)
            if adapter.get("rejection"):
                ui.label(f"Not served: {adapter['rejection']['reason']}").classes("qaa-bad")
            details = adapter.get("details") or {}
            served = {"Served": adapter["revision"] or adapter["state"], "Kind": adapter["kind"]}
            _show_facts("What the server says", served | {"Rank": adapter["rank"], **details})
        elif name not in await api.models():
            raise ApiError(404, f"there is no adapter {name!r} that these keys may see")
        if root is None:
            ui.label("Circuits, norms and cards need the files: start the console with --adapters DIR.")
        elif "/" in name or name.startswith(".") or not (root / name).is_dir():
            ui.label(f"The console's --adapters has no directory {name}: what the API says is all there is.")
        else:
            await self._inspect(root / name)

    async def _inspect(self, directory: Path) -> None:
        spinner = ui.spinner(size="2rem")
        facts, drawing, self._said.text = await inspect(directory)
        spinner.delete()
        modules = facts.get("modules", [])
        if facts:
            base, sizes = facts.get("base") or {}, facts.get("sizes") or {}
            problem = f": {base['problem']}" if base.get("problem") else ""
            served = "yes" if facts.get("can_be_served") else f"no: {facts.get('reason')}"
            told = {
                "Revision in the directory": facts.get("revision"),
                "Can be served": served,
                "Base model": f"{base.get('named')} ({_FITS[base.get('fits')]}{problem})",
                "Modules": sizes.get("modules"),
                "Trained parameters": sizes.get("parameters"),
                "of them angles": sizes.get("angles"),
                "On disk": show_bytes(sizes.get("bytes_on_disk")),
                "LoRA of the same size has rank": sizes.get("equal_lora_rank"),
            }
            _show_facts("What qaa-serve inspect says", told)
            for note in facts.get("notes") or []:
                ui.label(note).classes("qaa-quiet")
        if drawing:
            self._show_circuit(directory, [module["name"] for module in modules], drawing)
        _show_norms(modules)
        card = directory / "README.md"
        if card.is_file():
            text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(errors="replace")[:200_000], flags=re.DOTALL)
            with ui.expansion("Card", value=True).classes("qaa-column"):
                # Names have_underscores, which are no emphasis.
                ui.markdown(text, extras=["fenced-code-blocks", "tables", "code-friendly"])

    def _show_circuit(self, directory: Path, modules: list[str], drawing: bytes) -> None:
        """The drawing, and a choice of the module that it is of."""

        def show(svg: bytes) -> None:
            data = base64.b64encode(svg).decode()
            alt = "the circuit with its trained angles"
            picture.set_content(f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">')

        async def redraw() -> None:
            choice.disable()
            _, other, self._said.text = await inspect(directory, choice.value)
            if other:
                show(other)
            choice.enable()

        choice = ui.select(modules, value=modules[0] if modules else None, label="Circuit of", on_change=redraw)
        choice.props("outlined dense").style("max-width: 30rem")
        picture = ui.html(sanitize=False).classes("qaa-drawing").props('tabindex=0 aria-label="Circuit"')
        show(drawing)


def _show_facts(title: str, facts: Mapping[str, Any]) -> None:
    ui.label(title).classes("qaa-title")
    with ui.element("div").classes("qaa-pairs"):
        for what, value in facts.items():
            if value not in (None, ""):
                ui.label(what).classes("qaa-quiet")
                ui.label(f"{value:,}" if isinstance(value, int) else str(value))


def _show_norms(modules: list[dict[str, Any]]) -> None:
    """The size of the updates by layer, a line a kind of module."""
    axis = {"type": "value", "name": "layer", "nameLocation": "middle", "nameGap": 22, "minInterval": 1}
    with ui.element("div").classes("qaa-cards qaa-wide"):
        for key, title in _NORMS.items():
            points: dict[str, list[list[float]]] = defaultdict(list)
            for module in modules:
                if module.get(key) is not None and module.get("layer") is not None:
                    points[module["kind"]].append([module["layer"], round(module[key], 6)])
            if points:
                lines = [{"name": kind, "data": sorted(line)} for kind, line in points.items()]
                line_chart(title, axis, lines).props('aria-label="Norms by layer"')
