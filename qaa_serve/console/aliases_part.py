"""Aliases, and a slider for each share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from nicegui import ui

from qaa_serve.console.session import Session
from qaa_serve.console.widgets import Changes, row, text_input, written_in


class AliasesPart:
    """All aliases; each is changed in place."""

    def __init__(self, session: Session, changes: Changes):
        self._session, self._changes = session, changes
        self._shown: list[dict[str, Any]] | None = None
        with ui.expansion("Aliases", icon="alt_route").classes("qaa-column"):
            self._list = ui.element("div").classes("qaa-column")
            with row():
                name, target = text_input("New alias"), text_input("leads to (NAME or NAME@REVISION)")
                ui.button("Add", on_click=lambda: self._put(written_in(name), {written_in(target): 100}))

    async def refresh(self) -> None:
        """Ask the server anew; sliders that were moved stay so, unless an alias was changed meanwhile."""
        aliases = (await self._session.api.admin("GET", "/v1/aliases"))["data"]
        if aliases != self._shown:
            self._shown = aliases
            self._list.clear()
            with self._list:
                for alias in aliases:
                    self._show(alias["id"], alias["to"])

    def _show(self, name: str, shares: Mapping[str, int]) -> None:
        """One alias: a slider a target, from 0 to 100; the shares are relative to their sum."""
        rows: dict[str, tuple[ui.slider, ui.label]] = {}

        def given() -> dict[str, int]:
            return {target: int(slider.value) for target, (slider, _) in rows.items()}

        def show_parts() -> None:
            total = sum(given().values())
            for slider, part in rows.values():
                part.text = f"{slider.value / total:.0%}" if total else "-"

        def add(target: str, share: int) -> None:
            if not target or target in rows:
                return
            with targets, row().style("flex-wrap: nowrap"):
                ui.label(target).style("flex: 1 1 40%; overflow-wrap: anywhere")
                slider = ui.slider(min=0, max=100, value=share, on_change=show_parts).style("flex: 1 1 40%")
                slider.props(f'aria-label="share of {target}"')
                rows[target] = slider, ui.label().style("flex: 0 0 3rem; text-align: right")
            show_parts()

        async def end() -> None:
            await self._change(f"End the alias {name}? What it leads to stays.", "End", name, "DELETE")

        with ui.element("section").classes("qaa-card"):
            with row():
                ui.label(name).style("font-weight: 600; flex: 1")
                ui.button("Save", on_click=lambda: self._put(name, given())).props("outline no-caps")
                ui.button("End", on_click=end).props("flat no-caps")
            targets = ui.element("div").classes("qaa-column")
            with row():
                other = text_input("Another target")
                ui.button("Add target", on_click=lambda: add(written_in(other), 0)).props("flat no-caps")
        for target, share in shares.items():
            add(target, round(100 * share / sum(shares.values())))

    async def _put(self, name: str, shares: Mapping[str, int]) -> None:
        total = sum(shares.values())
        if not name or not total or "" in shares:
            self._changes.say("an alias needs a name, and a target with a share")
            return
        said = ", ".join(f"{share / total:.0%} to {target}" for target, share in shares.items() if share)
        await self._change(f"Let {name} lead {said}, on every server?", "Save", name, "PUT", json={"to": shares})

    async def _change(self, question: str, action: str, name: str, method: str, **request: Any) -> None:
        path = f"/v1/aliases/{quote(name, safe='')}"
        await self._changes.make(question, action, name, method, path, **request)
        self._shown = None
        await self.refresh()
