"""The adapters: a list in pages, one of them with its history, uploads, and aliases."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any
from urllib.parse import quote

from nicegui import ui
from nicegui.events import GenericEventArguments

from qaa_serve.console.aliases_part import AliasesPart
from qaa_serve.console.api import ApiError
from qaa_serve.console.changes import Changes
from qaa_serve.console.metrics import Use
from qaa_serve.console.session import Session
from qaa_serve.console.upload_part import UploadPart
from qaa_serve.console.widgets import models_of, show_bytes, show_seconds

_PAGE = 50

#: The list that is shown is asked for anew so often.
_LIST_AGE_S = 10.0

_COLUMNS = {
    "id": "Adapter", "state": "State", "kind": "Kind", "revision": "Revision", "store": "On disk",
    "host": "In memory", "slot": "In slots", "requests": "Requests", "p50": "p50", "p95": "p95",
    "errors": "Errors", "running": "Running", "waiting": "Waiting", "reason": "Not served because",
}  # fmt: skip
_LEFT = {"id", "state", "kind", "revision", "reason"}

_HISTORY = {
    "revision": "Revision", "state": "State", "loaded": "In memory", "pinned": "Pinned", "in_flight": "In use",
    "bytes": "On disk", "do": "",
}  # fmt: skip

#: The actions of a row of the history; each says itself to the page.
_ROW_ACTIONS = """
<q-td :props="props">
  <q-btn v-for="action in props.row.actions.split(' ')" :key="action" flat dense no-caps size="sm"
    :label="action" :aria-label="action + ' ' + props.row.revision"
    @click="$parent.$emit('act', action, props.row.revision)" />
</q-td>
"""

_NAME = """
<q-td :props="props">
  <a :href="'/adapters/' + encodeURIComponent(props.value)"
    @click.prevent="$parent.$emit('choose', props.value)">{{ props.value }}</a>
</q-td>
"""


class AdaptersPage:
    """The list; or, of the chosen one, all there is to say and do.

    Attributes:
        chosen: the adapter whose page is shown; "": the list is.
        on_look_inside: told of an adapter to look into.
    """

    def __init__(self, session: Session):
        self._session = session
        self.chosen = ""
        self.on_look_inside: Callable[[str], Awaitable[None]] | None = None
        self._pages = [""]  # the name that each page so far comes after
        self._next: str | None = None
        self._listed = 0.0
        self._note = ui.label().classes("qaa-quiet")
        self._list = ui.element("div").classes("qaa-page").style("padding: 0")
        self._one = ui.element("div").classes("qaa-page").style("padding: 0")
        self._changes = Changes(session)
        with self._list:
            self._make_list()
            self._upload = UploadPart(session, self._changes, self.refresh)
            self._aliases = AliasesPart(session, self._changes)
        session.on_keys(self.refresh)

    @property
    def path(self) -> str:
        """Of what is shown, for the address bar."""
        return f"/adapters/{quote(self.chosen)}" if self.chosen else "/adapters"

    async def choose(self, name: str) -> None:
        """Show one adapter; "": the list."""
        self.chosen = name
        self._changes.clear()
        ui.navigate.history.replace(self.path)
        await self.refresh()

    async def refresh(self) -> None:
        """Ask the server anew."""
        self._list.set_visibility(not self.chosen)
        self._one.set_visibility(bool(self.chosen))
        try:
            if self.chosen:
                await self._show_one(self.chosen)
            else:
                await self._show_list()
        except ApiError as error:
            self._note.text = str(error)

    async def tick(self) -> None:
        """Keep the list up to date; one adapter's page stays as it is, for who is about to press a button."""
        if not self.chosen and time.monotonic() - self._listed >= _LIST_AGE_S:
            await self.refresh()

    # ------------------------------------------------------------------------------------------------- the list

    def _make_list(self) -> None:
        with ui.element("div").classes("qaa-row"):
            self._query = ui.input("Part of the name", on_change=self._search).props("outlined dense debounce=300")
            states = ["", "known", "served", "rejected"]
            labels = {state: state or "any" for state in states}
            self._state = ui.select(labels, value="", label="State", on_change=self._search)
            self._state.props("outlined dense").classes("qaa-short")
            self._back = ui.button("Previous", on_click=self._previous).props("flat")
            self._forth = ui.button("Next", on_click=self._following).props("flat")
            ui.button(icon="refresh", on_click=self.refresh).props('flat round aria-label="Refresh"')
        columns = [
            {"name": name, "label": label, "field": name, "align": "left" if name in _LEFT else "right"}
            for name, label in _COLUMNS.items()
        ]
        self._table = ui.table(columns=columns, rows=[], row_key="id").props("flat dense")
        self._table.add_slot("body-cell-id", _NAME)

        async def choose(event: GenericEventArguments) -> None:
            await self.choose(str(event.args))

        self._table.on("choose", choose)

    async def _search(self) -> None:
        self._pages = [""]
        await self.refresh()

    async def _previous(self) -> None:
        self._pages = self._pages[:-1] or [""]
        await self.refresh()

    async def _following(self) -> None:
        if self._next is not None:
            self._pages.append(self._next)
            await self.refresh()

    async def _show_list(self) -> None:
        self._listed = time.monotonic()
        query, after = str(self._query.value or ""), self._pages[-1]
        if self._session.api.is_admin:
            answer = await self._session.api.adapters(q=query, state=self._state.value, limit=_PAGE, after=after)
            adapters, more = answer["data"], answer["has_more"]
            self._note.text = f"{answer['total']:,} adapters, in the order of their names."
        else:
            names = sorted(name for name in await models_of(self._session) if query in name and name > after)
            adapters, more = [{"id": name} for name in names[:_PAGE]], len(names) > _PAGE
            self._note.text = "Models that the client key may use; an admin key shows the rest, and changes it."
        self._table.rows = [self._row(adapter) for adapter in adapters]
        self._next = adapters[-1]["id"] if more else None
        self._back.set_enabled(len(self._pages) > 1)
        self._forth.set_enabled(more)
        for part in (self._upload.root, self._aliases.root, self._state):
            part.set_visibility(self._session.api.is_admin)
        if self._session.api.is_admin:
            await self._aliases.refresh()

    def _use(self, name: str) -> Use:
        newest = self._session.observer.newest
        return newest.adapters.get(name, Use()) if newest else Use()

    def _row(self, adapter: dict[str, Any]) -> dict[str, Any]:
        use, nbytes = self._use(adapter["id"]), adapter.get("bytes") or {}
        seconds = use.histograms.get("qaa_request_seconds")
        return {
            **{key: adapter.get(key) for key in ("id", "state", "kind", "running", "waiting")},
            **{tier: show_bytes(nbytes.get(tier)) for tier in ("store", "host", "slot")},
            "revision": (adapter.get("revision") or "").partition("@")[2],
            "requests": f"{use.total('qaa_requests_total'):.0f}",
            "p50": show_seconds(seconds.quantile(0.5)) if seconds else "",
            "p95": show_seconds(seconds.quantile(0.95)) if seconds else "",
            "errors": f"{use.errors:.0f}",
            "reason": (adapter.get("rejection") or {}).get("reason", ""),
        }

    # ---------------------------------------------------------------------------------------------- one adapter

    async def _show_one(self, name: str) -> None:
        if not self._session.api.is_admin:
            self._one.clear()
            with self._one:
                self._show_head(name)
            self._note.text = "An admin key shows its state and history."
            return
        try:
            adapter = await self._session.api.adapter(name)
        except ApiError as error:
            if error.status != 404:
                raise
            self._show_missing(name)
            return
        self._note.text = ""
        self._one.clear()
        with self._one:
            self._show_head(name)
            row = self._row(adapter)
            pinned = " · pinned" if adapter["pinned"] else ""
            facts = [adapter["kind"], f"rank {adapter['rank']}" if adapter["rank"] else None,
                     adapter["revision"], _when("published", adapter["published"]),
                     _when("last used", adapter["last_used"])]  # fmt: skip
            ui.label(f"{adapter['state']}{pinned} · " + " · ".join(fact for fact in facts if fact))
            uses = (f"{row['store']} on disk", f"{row['host']} in memory", f"{row['slot']} in slots",
                    f"{row['requests']} requests", f"{row['errors']} errors", f"p50 {row['p50'] or '-'}",
                    f"p95 {row['p95'] or '-'}")  # fmt: skip
            ui.label(" · ".join(uses)).classes("qaa-quiet")
            if row["reason"]:
                ui.label(f"The newest content is not served: {row['reason']}").classes("qaa-bad")
            with ui.element("div").classes("qaa-row"):
                for action in ("Load", "Unpin" if adapter["pinned"] else "Pin", "Roll back", "Delete"):
                    ui.button(action, on_click=lambda action=action: self._act(action, adapter, None)).props(
                        "outline no-caps"
                    )
            self._show_history(adapter)

    def _show_missing(self, name: str) -> None:
        self._note.text = f"No adapter {name} is served. If it was deleted, its history may bring it back."
        self._one.clear()
        with self._one:
            self._show_head(name)
            gone = {"id": name, "revision": None}
            ui.button("Roll back", on_click=lambda: self._act("Roll back", gone, None)).props("outline no-caps")

    def _show_head(self, name: str) -> None:
        async def back() -> None:
            await self.choose("")

        async def look() -> None:
            if self.on_look_inside is not None:
                await self.on_look_inside(name)

        with ui.element("div").classes("qaa-row"):
            ui.button("All adapters", icon="arrow_back", on_click=back).props("flat no-caps")
            ui.label(name).classes("qaa-number").style("overflow-wrap: anywhere")
            ui.button("Look inside", on_click=look).props("flat no-caps")

    def _show_history(self, adapter: dict[str, Any]) -> None:
        rows = [
            {
                "revision": one["revision"], "state": one["state"], "loaded": "yes" if one["loaded"] else "",
                "pinned": "yes" if one["pinned"] else "", "in_flight": one["in_flight"],
                "bytes": show_bytes(one["bytes"]["store"]),
                "actions": " ".join(
                    ["Load", "Unpin" if one["pinned"] else "Pin"] + ["Rollback"] * (one["state"] == "kept")
                ),
            }
            for one in adapter["revisions"]
        ]  # fmt: skip
        columns = [
            {"name": name, "label": label, "field": name, "align": "left"} for name, label in _HISTORY.items()
        ]
        table = ui.table(columns=columns, rows=rows, row_key="revision", title="History").props("flat dense")
        table.add_slot("body-cell-do", _ROW_ACTIONS)

        async def act(event: GenericEventArguments) -> None:
            action, revision = event.args
            await self._act(action, adapter, revision)

        table.on("act", act)

    async def _act(self, action: str, adapter: dict[str, Any], revision: str | None) -> None:
        """Do what a button says, to the adapter or to one of its revisions."""
        name, served = adapter["id"], adapter["revision"]
        route = f"/v1/adapters/{quote(name, safe='')}"
        verb = action.replace(" ", "").lower()
        question = {
            "load": f"Bring {revision or name} into the engine's memory?",
            "pin": f"Keep {revision or name} in the memory of every server?",
            "unpin": f"Let {revision or name} leave memory when others need the room?",
            "rollback": f"Serve {revision or 'the revision before'} as {name}, on every server?",
            "delete": f"Serve {name} no more, on every server? Its history stays, and a rollback brings it back.",
        }[verb]
        api = self._session.api
        # What the page shows must be what is served, or the answer to the question was to another one.
        if_match = served if served and verb in ("rollback", "delete") else None

        async def call() -> None:
            if verb == "delete":
                await api.change("DELETE", route, if_match=if_match)
            else:
                await api.change("POST", f"{route}/{verb}", if_match=if_match, json={"revision": revision})

        await self._changes.make(question, action, name, call)
        await self.refresh()


def _when(what: str, seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{what} {datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S}"
