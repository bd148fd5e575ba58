"""The adapters: a list in pages, one of them with its history, uploads, and aliases."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote

from nicegui import ui

from qaa_serve.console.aliases_part import AliasesPart
from qaa_serve.console.api import ApiError, adapter_path
from qaa_serve.console.session import Page, Session
from qaa_serve.console.upload_part import UploadPart
from qaa_serve.console.widgets import Changes, Table, row, show_bytes, show_seconds

#: Adapters a page of the list, and how many seconds old it becomes.
_PAGE, _LIST_AGE_S = 50, 10.0

_COLUMNS = {
    "id": "Adapter", "state": "State", "kind": "Kind", "revision": "Revision", "store": "On disk",
    "host": "In memory", "slot": "In slots", "requests": "Requests", "p50": "p50", "p95": "p95",
    "errors": "Errors", "running": "Running", "waiting": "Waiting", "reason": "Not served because",
}  # fmt: skip
_WORDS = ("id", "state", "kind", "revision", "reason")
_STATES = {"": "any", "known": "known", "served": "served", "rejected": "rejected"}

_HISTORY = ("Revision", "State", "In memory", "Pinned", "In use", "On disk", "")

#: What can be done, by the last part of its route, and what is asked first: `{it}` is the revision or the adapter.
_QUESTIONS = {
    "load": "Bring {it} into the engine's memory?",
    "pin": "Keep {it} in the memory of every server?",
    "unpin": "Let {it} leave memory when others need the room?",
    "rollback": "Serve {before} as {name}, on every server?",
    "delete": "Serve {name} no more, on every server? Its history stays, and a rollback brings it back.",
}


class AdaptersPage(Page):
    """The list; or, of the chosen one, all there is to say and do."""

    path = "/adapters"

    def __init__(self, session: Session):
        super().__init__(session)
        self._chosen = ""  # the adapter whose page is shown; "": the list is
        self._pages = [""]  # the name that each page of the list so far comes after
        self._last = ""  # the last name of the page that is shown
        self._listed = 0.0
        self._note = ui.label().classes("qaa-quiet")
        self._list, self._one = (ui.element("div").classes("qaa-column") for _ in range(2))
        self._changes = Changes(session)
        with self._list:
            with row():
                self._query = ui.input("Part of the name", on_change=self._search)
                self._query.props("outlined dense debounce=300")
                self._state = ui.select(_STATES, value="", label="State", on_change=self._search)
                self._state.props("outlined dense").classes("qaa-short")
                self._back = ui.button("Previous", on_click=self._previous).props("flat")
                self._forth = ui.button("Next", on_click=self._following).props("flat")
                ui.button(icon="refresh", on_click=self._refresh).props('flat round aria-label="Refresh"')
            self._table = Table(_COLUMNS, left=_WORDS, choose=self.show)
            self._upload = UploadPart(session, self._changes, self._refresh)
            self._aliases = AliasesPart(session, self._changes)

    async def show(self, name: str | None) -> None:
        """Show one adapter's page, or the list."""
        if name is not None:
            self._chosen = name
            self.path = f"/adapters/{quote(name)}" if name else "/adapters"
            self._changes.clear()
            ui.navigate.history.replace(self.path)
        await self._refresh()

    async def tick(self) -> None:
        """Keep the list up to date; one adapter's page stays as it is, for who is about to press a button."""
        if not self._chosen and time.monotonic() - self._listed >= _LIST_AGE_S:
            await self._refresh()

    async def _refresh(self) -> None:
        """Ask the server anew."""
        self._list.set_visibility(not self._chosen)
        self._one.set_visibility(bool(self._chosen))
        try:
            await (self._show_one(self._chosen) if self._chosen else self._show_list())
        except ApiError as error:
            self._note.text = str(error)

    # ------------------------------------------------------------------------------------------------- the list

    async def _search(self) -> None:
        self._pages = [""]
        await self._refresh()

    async def _previous(self) -> None:
        self._pages = self._pages[:-1] or [""]
        await self._refresh()

    async def _following(self) -> None:
        self._pages.append(self._last)
        await self._refresh()

    async def _show_list(self) -> None:
        self._listed = time.monotonic()
        api, query, after = self.session.api, str(self._query.value or ""), self._pages[-1]
        if api.is_admin:
            asked = {"q": query, "state": self._state.value, "limit": _PAGE, "after": after}
            params = {key: value for key, value in asked.items() if value}
            answer = await api.admin("GET", "/v1/adapters", params=params)
            adapters, more = answer["data"], answer["has_more"]
            self._note.text = f"{answer['total']:,} adapters, in the order of their names."
        else:
            names = sorted(name for name in await self.session.models() if query in name and name > after)
            adapters, more = [{"id": name} for name in names[:_PAGE]], len(names) > _PAGE
            self._note.text = "Models that the client key may use; an admin key shows the rest, and changes it."
        self._table.show(self._row(adapter) for adapter in adapters)
        self._last = adapters[-1]["id"] if adapters else after
        self._back.set_enabled(len(self._pages) > 1)
        self._forth.set_enabled(more)
        for part in (self._upload.root, self._aliases.root, self._state):
            part.set_visibility(api.is_admin)
        if api.is_admin:
            await self._aliases.refresh()

    def _row(self, adapter: Mapping[str, Any]) -> dict[str, Any]:
        use, nbytes = self.session.observer.use_of(adapter["id"]), adapter.get("bytes") or {}
        return {
            **{key: adapter.get(key) for key in ("id", "state", "kind", "running", "waiting")},
            **{tier: show_bytes(nbytes.get(tier)) for tier in ("store", "host", "slot")},
            "revision": (adapter.get("revision") or "").partition("@")[2],
            "requests": f"{use.total('qaa_requests_total'):.0f}",
            "p50": show_seconds(use.quantile("qaa_request_seconds", 0.5)),
            "p95": show_seconds(use.quantile("qaa_request_seconds", 0.95)),
            "errors": f"{use.errors:.0f}",
            "reason": (adapter.get("rejection") or {}).get("reason"),
        }

    # ---------------------------------------------------------------------------------------------- one adapter

    async def _show_one(self, name: str) -> None:
        adapter: dict[str, Any] | None = None
        self._note.text = "" if self.session.api.is_admin else "An admin key shows its state and history."
        if self.session.api.is_admin:
            try:
                adapter = await self.session.api.adapter(name)
            except ApiError as error:
                if error.status != 404:
                    raise
                self._note.text = f"No adapter {name} is served. If it was deleted, its history may bring it back."
        self._one.clear()
        with self._one:
            with row():
                ui.button("All adapters", icon="arrow_back", on_click=lambda: self.show("")).props("flat no-caps")
                ui.label(name).classes("qaa-number").style("overflow-wrap: anywhere")
                ui.button("Look inside", on_click=lambda: self.session.open("inside", name)).props("flat no-caps")
            if adapter is not None:
                self._show_state(adapter)
            elif self.session.api.is_admin:
                self._button("Roll back", {"id": name, "revision": None})

    def _show_state(self, adapter: Mapping[str, Any]) -> None:
        shown = self._row(adapter)
        facts = (
            adapter["state"], "pinned" if adapter["pinned"] else None, adapter["kind"],
            f"rank {adapter['rank']}" if adapter["rank"] else None, adapter["revision"],
            _when("published", adapter["published"]), _when("last used", adapter["last_used"]),
        )  # fmt: skip
        ui.label(" · ".join(fact for fact in facts if fact))
        ui.label(
            f"{shown['store']} on disk · {shown['host']} in memory · {shown['slot']} in slots · "
            f"{shown['requests']} requests · {shown['errors']} errors · p50 {shown['p50'] or '-'} · "
            f"p95 {shown['p95'] or '-'}"
        ).classes("qaa-quiet")
        if shown["reason"]:
            ui.label(f"The newest content is not served: {shown['reason']}").classes("qaa-bad")
        with row():
            for action in ("Load", _pin(adapter), "Roll back", "Delete"):
                self._button(action, adapter)
        ui.label("History").classes("qaa-title")
        with ui.element("q-markup-table").props("flat dense"), ui.element("tbody"):
            self._line(*_HISTORY)
            for one in adapter["revisions"]:
                marks = ["yes" if one[key] else "" for key in ("loaded", "pinned")]
                stored = show_bytes(one["bytes"]["store"])
                line = self._line(one["revision"], one["state"], *marks, one["in_flight"], stored)
                with line, ui.element("td"):
                    for action in ("Load", _pin(one), *["Rollback"] * (one["state"] == "kept")):
                        self._button(action, adapter, one["revision"])

    def _line(self, *cells: object) -> ui.element:
        line = ui.element("tr")
        with line:
            for cell in cells:
                with ui.element("td").classes("text-left"):
                    ui.label(str(cell))
        return line

    def _button(self, action: str, adapter: Mapping[str, Any], revision: str | None = None) -> None:
        """A button that does what it says, to the adapter or to one of its revisions, if that is confirmed."""
        name, verb, api = adapter["id"], action.replace(" ", "").lower(), self.session.api
        it, before = revision or name, revision or "the revision before"
        # What the page shows must be what is served, or the answer to the question was to another one.
        checked = adapter["revision"] and verb in ("rollback", "delete")
        headers = {"If-Match": f'"{adapter["revision"]}"'} if checked else {}

        async def call() -> None:
            if verb == "delete":
                await api.admin("DELETE", adapter_path(name), headers=headers)
            else:
                await api.admin("POST", adapter_path(name, verb), headers=headers, json={"revision": revision})

        async def act() -> None:
            question = _QUESTIONS[verb].format(it=it, name=name, before=before)
            await self._changes.make(question, action, name, call)
            await self._refresh()

        look = f'flat dense size=sm aria-label="{action} {revision}"' if revision else "outline"
        ui.button(action, on_click=act).props(f"no-caps {look}")


def _pin(shown: Mapping[str, Any]) -> str:
    return "Unpin" if shown["pinned"] else "Pin"


def _when(what: str, seconds: float | None) -> str | None:
    return f"{what} {datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}" if seconds else None
