"""The page around the pages: which there are, the keys, and whether the server is there."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
from fastapi import Request, Response
from nicegui import app, ui
from starlette.middleware.base import RequestResponseEndpoint

from qaa_serve.console.adapters_page import AdaptersPage
from qaa_serve.console.api import Api, ApiError, connect
from qaa_serve.console.inside_page import InsidePage
from qaa_serve.console.metrics import Observer
from qaa_serve.console.now_page import NowPage
from qaa_serve.console.session import Page, Session
from qaa_serve.console.try_page import TryPage
from qaa_serve.console.widgets import dialog, text_input, written_in
from qaa_serve.server.runfile import find_server

_HERE = Path(__file__).parent
_PAGES: dict[str, tuple[str, type[Page]]] = {
    "try": ("Try", TryPage), "adapters": ("Adapters", AdaptersPage), "inside": ("Look inside", InsidePage),
    "now": ("Now", NowPage),
}  # fmt: skip

#: Nothing is asked of anybody but this process: no picture that an adapter's card names, no font, no script.
#: NiceGUI's own scripts are inline and compile the page's templates.
_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def run(
    url: str, admin_url: str | None, host: str, port: int, adapters: Path | None, end_with: int | None
) -> None:
    """Serve the page until a signal.

    Args:
        url: the server's.
        admin_url: of its admin routes; None: what the server noted on this machine, else `url`.
        host: address that the page is at.
        port: its port.
        adapters: a directory of adapters; None: what the API says is all there is.
        end_with: end when the process of this id does, too.
    """
    if admin_url is None:
        noted = find_server(url)
        admin_url = url if noted is None else noted.admin_url
    api = Api(connect(url), connect(admin_url))
    observer = Observer(api)
    scratch = tempfile.TemporaryDirectory(prefix="qaa-console-")
    tempfile.tempdir = scratch.name  # of uploads, and of NiceGUI's copies of them

    async def follow() -> None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(end_with)
            while process.is_running():
                await asyncio.sleep(0.5)
        app.shutdown()

    def serve(section: str, *paths: str) -> None:
        async def page(name: str = "") -> None:
            await _show(Session(url, api, observer, adapters), section, name)

        for path in paths:
            ui.page(path)(page)

    serve("try", "/")
    for section in _PAGES:
        serve(section, f"/{section}", f"/{section}/{{name}}")

    @app.middleware("http")
    async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    app.on_startup(observer.run)
    if end_with is not None:
        app.on_startup(follow)
    app.on_startup(lambda: print(f"Console on http://{host}:{port}", flush=True))
    app.on_shutdown(scratch.cleanup)  # a signal ends the process right after this
    ui.run(
        host=host, port=port, title="qaa-serve", dark=None, tailwind=False, show=False, reload=False,
        show_welcome_message=False, access_log=False, reconnect_timeout=30.0,
    )  # fmt: skip


async def _show(session: Session, section: str, name: str) -> None:
    """One tab's page."""
    ui.add_css((_HERE / "console.css").read_text())
    ui.add_head_html(f"<script>{(_HERE / 'console.js').read_text()}</script>")
    ui.colors(primary="#1565c0")
    dark = ui.dark_mode(None)
    pages: dict[str, Page] = {}

    def shown() -> Page:
        """The page of the tab that is open; it is made when that is opened first, charts and all."""
        key = str(tabs.value)
        if key not in pages:
            with panels[key]:
                pages[key] = _PAGES[key][1](session)
        return pages[key]

    async def open_page(key: str, adapter: str) -> None:
        tabs.value = key
        await shown().show(adapter)

    async def switch() -> None:
        ui.navigate.history.replace(shown().path)
        await shown().show(None)

    async def take_keys(client_key: str, admin_key: str) -> None:
        session.api = replace(session.api, client_key=client_key, admin_key=admin_key)
        await shown().show(None)

    async def tick() -> None:
        problem, was_away = session.observer.problem, away.visible
        away.set_visibility(bool(problem))
        if problem and not was_away:
            away.text = f"The server at {session.url} is away: {problem}. The page goes on when it is back."
        if was_away and not problem:
            await shown().show(None)
        await shown().tick()

    async def turn() -> None:
        dark.value = not await ui.run_javascript("return document.body.classList.contains('body--dark')")

    async def ask_keys() -> None:
        async def use() -> None:
            given = written_in(client_key), written_in(admin_key)
            if not all(re.fullmatch("[!-~]*", key) for key in given):
                said.text = "a key has no spaces and no letters beyond ASCII"
                return
            api = replace(session.api, client_key=given[0], admin_key=given[1])
            try:
                if given[0]:
                    await api.models()
                if given[1]:
                    await api.admin("GET", "/v1/adapters", params={"limit": 1})
            except ApiError as error:
                said.text = str(error)
                return
            ui.run_javascript(f"qaaConsole.keepKeys({json.dumps(given)})")
            await take_keys(*given)
            asked.close()

        with dialog() as asked:
            ui.label("Keys are kept by the browser until this tab is closed.")
            client_key = text_input("Client key", password=True).props("autofocus")
            admin_key = text_input("Admin key", password=True)
            said = ui.label().classes("qaa-bad")
            with ui.row():
                ui.button("Use", on_click=use)
                ui.button("Cancel", on_click=asked.close).props("flat")

    with ui.element("header").classes("qaa-bar"):
        ui.label("qaa-serve").classes("qaa-title")
        with ui.tabs().props("dense no-caps inline-label") as tabs:
            for key, (title, _) in _PAGES.items():
                ui.tab(key, title)
        ui.space()
        ui.button("Keys", icon="key", on_click=ask_keys).props("flat dense no-caps")
        ui.button(icon="contrast", on_click=turn).props('flat dense round aria-label="Dark or light"')
    away = ui.label().classes("qaa-away").props("role=alert")
    away.set_visibility(False)
    # Panels stay as they are while another one is shown: an answer goes on.
    with ui.tab_panels(tabs, value=section, animated=False, keep_alive=True) as all_panels:
        panels = {key: ui.tab_panel(key).classes("qaa-page") for key in _PAGES}
    ui.skip_link(target=all_panels)
    session.open = open_page
    shown()
    tabs.on_value_change(switch)
    await ui.context.client.connected(timeout=30.0)
    await take_keys(*await ui.run_javascript("return qaaConsole.keys()", timeout=10.0))
    if name:
        await shown().show(name)
    ui.timer(1.0, tick)
