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
from qaa_serve.console.widgets import Changes, html_table, row, show_bytes, show_seconds, text_input, written_in

#: Adapters a page of the list, and how many seconds old it becomes.
_PAGE, _LIST_AGE_S = 50, 10.0

#: Columns of words; the others are numbers.
_WORDS = ("Adapter", "State", "Kind", "Revision", "Not served because")
_STATES = {"": "any", "known": "known", "served": "served", "rejected": "rejected"}

#: A link is followed within the page, unless it is to be opened in another tab.
_FOLLOW = """(event) => {
    const link = event.target.closest("a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    emit(link.textContent);
}"""

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
                self._query = text_input("Part of the name", on_change=lambda: self._turn_to([""]))
                self._query.props("debounce=300")
                self._state = ui.select(_STATES, value="", label="State", on_change=lambda: self._turn_to([""]))
                self._state.props("outlined dense").classes("qaa-short")
                self._back = ui.button("Previous", on_click=lambda: self._turn_to(self._pages[:-1]))
                self._forth = ui.button("Next", on_click=lambda: self._turn_to([*self._pages, self._last]))
                for button in (self._back, self._forth):
                    button.props("flat")
                ui.button(icon="refresh", on_click=self._refresh).props('flat round aria-label="Refresh"')
            self._table = ui.html(sanitize=False).classes("qaa-table")
            self._table.on("click", lambda event: self.show(event.args), js_handler=_FOLLOW)
            with ui.element("div").classes("qaa-column") as self._admins:
                UploadPart(session, self._changes, self._refresh)
                self._aliases = AliasesPart(session, self._changes)

    async def show(self, name: str | None) -> None:
        """Show one adapter's page, or the list."""
        if name is not None:
            self._chosen = name
            self.path = f"/adapters/{quote(name)}" if name else "/adapters"
            self._changes.say()
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

    async def _turn_to(self, pages: list[str]) -> None:
        self._pages = pages
        await self._refresh()

    async def _show_list(self) -> None:
        self._listed = time.monotonic()
        api, query, after = self.session.api, written_in(self._query), self._pages[-1]
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
        self._table.set_content(html_table(map(self._row, adapters), _WORDS, linked=True))
        self._last = adapters[-1]["id"] if adapters else after
        self._back.set_enabled(len(self._pages) > 1)
        self._forth.set_enabled(more)
        self._admins.set_visibility(api.is_admin)
        self._state.set_visibility(api.is_admin)
        if api.is_admin:
            await self._aliases.refresh()

    def _row(self, adapter: Mapping[str, Any]) -> dict[str, Any]:
        use, nbytes = self.session.observer.use_of(adapter["id"]), adapter.get("bytes") or {}
        return {
            "Adapter": adapter["id"],
            "State": adapter.get("state"),
            "Kind": adapter.get("kind"),
            "Revision": (adapter.get("revision") or "").partition("@")[2],
            "On disk": show_bytes(nbytes.get("store")),
            "In memory": show_bytes(nbytes.get("host")),
            "In slots": show_bytes(nbytes.get("slot")),
            "Requests": f"{use.total('qaa_requests_total'):.0f}",
            "p50": show_seconds(use.quantile("qaa_request_seconds", 0.5)),
            "p95": show_seconds(use.quantile("qaa_request_seconds", 0.95)),
            "Errors": f"{use.errors:.0f}",
            "Running": adapter.get("running"),
            "Waiting": adapter.get("waiting"),
            "Not served because": (adapter.get("rejection") or {}).get("reason"),
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
        facts = [adapter["state"], "pinned" if adapter["pinned"] else None, adapter["kind"]]
        facts += [f"rank {adapter['rank']}" if adapter["rank"] else None, adapter["revision"]]
        for what, seconds in (("published", adapter["published"]), ("last used", adapter["last_used"])):
            facts.append(f"{what} {datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}" if seconds else None)
        ui.label(" · ".join(fact for fact in facts if fact))
        shown = self._row(adapter)
        used = (f"{title}: {text}" for title, text in shown.items() if title not in _WORDS and text)
        ui.label(" · ".join(used)).classes("qaa-quiet")
        if reason := shown["Not served because"]:
            ui.label(f"The newest content is not served: {reason}").classes("qaa-bad")
        with row():
            for action in ("Load", _pin(adapter), "Roll back", "Delete"):
                self._button(action, adapter)
        ui.label("History").classes("qaa-title")
        with ui.element("div").classes("qaa-table"), ui.element("table"):
            self._line("Revision", "State", "In memory", "Pinned", "In use", "On disk", "")
            for one in adapter["revisions"]:
                marks = ["yes" if one[key] else "" for key in ("loaded", "pinned")]
                stored = show_bytes(one["bytes"]["store"])
                line = self._line(one["revision"], one["state"], *marks, one["in_flight"], stored)
                with line, ui.element("td"):
                    for action in ("Load", _pin(one), *["Rollback"] * (one["state"] == "kept")):
                        self._button(action, adapter, one["revision"])

    def _line(self, *cells: object) -> ui.element:
        with ui.element("tr") as line:
            for cell in cells:
                with ui.element("td"):
                    ui.label(str(cell))
        return line

    def _button(self, action: str, adapter: Mapping[str, Any], revision: str | None = None) -> None:
        """A button that does what it says, to the adapter or to one of its revisions, if that is confirmed."""
        name, verb = adapter["id"], action.replace(" ", "").lower()
        question = _QUESTIONS[verb].format(
            it=revision or name, name=name, before=revision or "the revision before"
        )
        deletes = verb == "delete"
        method, path = ("DELETE", adapter_path(name)) if deletes else ("POST", adapter_path(name, verb))
        request: dict[str, Any] = {} if deletes else {"json": {"revision": revision}}
        # What the page shows must be what is served, or the answer to the question was to another one.
        if adapter["revision"] and verb in ("rollback", "delete"):
            request["headers"] = {"If-Match": f'"{adapter["revision"]}"'}

        async def act() -> None:
            await self._changes.make(question, action, name, method, path, **request)
            await self._refresh()

        look = f'flat dense size=sm aria-label="{action} {revision}"' if revision else "outline"
        ui.button(action, on_click=act).props(f"no-caps {look}")


def _pin(shown: Mapping[str, Any]) -> str:
    return "Unpin" if shown["pinned"] else "Pin"
