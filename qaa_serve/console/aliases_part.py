"""Aliases, and a slider for each share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from nicegui import ui

from qaa_serve.console.changes import Changes
from qaa_serve.console.session import Session


class AliasesPart:
    """All aliases; each is changed in place.

    Attributes:
        root: what holds it all.
    """

    def __init__(self, session: Session, changes: Changes):
        self._session, self._changes = session, changes
        self._shown: list[dict[str, Any]] | None = None
        self.root = ui.expansion("Aliases", icon="alt_route").style("width: 100%")
        with self.root:
            self._list = ui.element("div").style("width: 100%")
            with ui.element("div").classes("qaa-row"):
                self._name = ui.input("New alias").props("outlined dense autocomplete=off")
                self._target = ui.input("leads to (NAME or NAME@REVISION)").props(
                    "outlined dense autocomplete=off"
                )
                ui.button("Add", on_click=self._add)

    async def refresh(self) -> None:
        """Ask the server anew; sliders that were moved stay so, unless an alias was changed meanwhile."""
        aliases = await self._session.api.aliases()
        if aliases == self._shown:
            return
        self._shown = aliases
        self._list.clear()
        with self._list:
            for alias in aliases:
                _Alias(self, alias["id"], alias["to"])

    async def put(self, name: str, shares: Mapping[str, int]) -> None:
        """Let a name lead to targets by their shares, if that is confirmed."""
        total = sum(shares.values())
        if not name or not total:
            self._changes.refuse("an alias needs a name, and a target with a share")
            return
        said = ", ".join(f"{share / total:.0%} to {target}" for target, share in shares.items() if share)
        await self._change(
            f"Let {name} lead {said}, on every server?", "Save", name, "PUT", json={"to": dict(shares)}
        )

    async def end(self, name: str) -> None:
        """End an alias, if that is confirmed."""
        await self._change(f"End the alias {name}? What it leads to stays.", "End", name, "DELETE")

    async def _add(self) -> None:
        await self.put(str(self._name.value or "").strip(), {str(self._target.value or "").strip(): 100})

    async def _change(self, question: str, action: str, name: str, method: str, **request: Any) -> None:
        route = f"/v1/aliases/{quote(name, safe='')}"
        await self._changes.make(
            question, action, name, lambda: self._session.api.change(method, route, **request)
        )
        self._shown = None
        await self.refresh()


class _Alias:
    """One alias: a slider a target, from 0 to 100; the shares are relative to their sum."""

    def __init__(self, part: AliasesPart, name: str, shares: Mapping[str, int]):
        self._part, self._name = part, name
        total = sum(shares.values())
        self._sliders: dict[str, ui.slider] = {}
        self._labels: dict[str, ui.label] = {}
        with ui.element("section").classes("qaa-card").style("margin-bottom: 0.5rem"):
            with ui.element("div").classes("qaa-row"):
                ui.label(name).style("font-weight: 600; flex: 1")
                ui.button("Save", on_click=lambda: part.put(name, self._shares())).props("outline no-caps")
                ui.button("End", on_click=lambda: part.end(name)).props("flat no-caps")
            self._targets = ui.element("div").style("width: 100%")
            with ui.element("div").classes("qaa-row"):
                target = ui.input("Another target").props("outlined dense autocomplete=off")

                def add() -> None:
                    other = str(target.value or "").strip()
                    if other and other not in self._sliders:
                        self._add(other, 0)
                        target.value = ""

                ui.button("Add target", on_click=add).props("flat no-caps")
            for one, share in shares.items():
                self._add(one, round(100 * share / total))

    def _add(self, target: str, share: int) -> None:
        with self._targets, ui.element("div").classes("qaa-row").style("flex-wrap: nowrap"):
            ui.label(target).style("flex: 1 1 40%; overflow-wrap: anywhere")
            slider = ui.slider(min=0, max=100, value=share, on_change=self._show).style("flex: 1 1 40%")
            self._sliders[target] = slider.props(f'aria-label="share of {target}"')
            self._labels[target] = ui.label().style("flex: 0 0 3rem; text-align: right")
        self._show()

    def _shares(self) -> dict[str, int]:
        return {target: int(slider.value) for target, slider in self._sliders.items()}

    def _show(self) -> None:
        shares = self._shares()
        total = sum(shares.values())
        for target, label in self._labels.items():
            label.text = f"{shares[target] / total:.0%}" if total else "-"
