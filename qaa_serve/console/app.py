"""The page around the pages: which there are, the keys, and whether the server is there."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import psutil
from fastapi import Request, Response
from nicegui import app, ui
from starlette.middleware.base import RequestResponseEndpoint

from qaa_serve.console.adapters_page import AdaptersPage
from qaa_serve.console.api import ApiError, Connection
from qaa_serve.console.inside_page import InsidePage
from qaa_serve.console.metrics import Observer
from qaa_serve.console.now_page import NowPage
from qaa_serve.console.session import Session, Settings
from qaa_serve.console.try_page import TryPage
from qaa_serve.server.runfile import find_server

_HERE = Path(__file__).parent
_TITLES = {"try": "Try", "adapters": "Adapters", "inside": "Look inside", "now": "Now"}

#: Nothing is asked of anybody but this process: no picture that an adapter's card names, no font, no script.
#: NiceGUI's own scripts are inline and compile the page's templates.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def run(settings: Settings) -> None:
    """Serve the page until a signal, or the end of another process if the settings name one."""
    admin_url = settings.admin_url
    if admin_url is None:
        noted = find_server(settings.url)
        admin_url = settings.url if noted is None else noted.admin_url
    connection = Connection(settings.url, admin_url)
    observer = Observer(connection)
    tasks: list[asyncio.Task[None]] = []

    async def end_with(pid: int) -> None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            while process.is_running():
                await asyncio.sleep(0.5)
        app.shutdown()

    async def start() -> None:
        tasks.append(asyncio.create_task(observer.run()))
        if settings.end_with is not None:
            tasks.append(asyncio.create_task(end_with(settings.end_with)))
        print(f"Console on http://{settings.host}:{settings.port}", flush=True)

    async def stop() -> None:
        for task in tasks:
            task.cancel()
        await connection.close()

    def serve(path: str, section: str) -> None:
        @ui.page(path)
        async def page(name: str = "") -> None:
            await _show(Session(settings, connection, observer), section, name)

    serve("/", "try")
    for section in _TITLES:
        serve(f"/{section}", section)
    for section in ("adapters", "inside"):
        serve(f"/{section}/{{name}}", section)

    @app.middleware("http")
    async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["content-security-policy"] = _POLICY
        response.headers["referrer-policy"] = "no-referrer"
        response.headers["x-content-type-options"] = "nosniff"
        return response

    app.on_startup(start)
    app.on_shutdown(stop)
    ui.run(
        host=settings.host, port=settings.port, title="qaa-serve", dark=None, tailwind=False, show=False,
        reload=False, show_welcome_message=False, access_log=False, reconnect_timeout=30.0,
    )  # fmt: skip


async def _show(session: Session, section: str, name: str) -> None:
    """One tab's page."""
    ui.add_css((_HERE / "console.css").read_text())
    ui.add_head_html(f"<script>{(_HERE / 'console.js').read_text()}</script>")
    ui.colors(primary="#1565c0")
    dark = ui.dark_mode(None)
    with ui.element("header").classes("qaa-bar").style("width: 100%"):
        ui.label("qaa-serve").classes("qaa-title")
        tabs = ui.tabs().props("dense no-caps inline-label")
        with tabs:
            for key, title in _TITLES.items():
                ui.tab(key, title)
        tabs.set_value(section)
        ui.space()
        keys = ui.button("Keys", icon="key").props("flat dense no-caps")
        contrast = ui.button(icon="contrast").props('flat dense round aria-label="Dark or light"')
    away = ui.label().classes("qaa-away").props("role=alert")
    away.set_visibility(False)
    # Panels stay as they are while another one is shown: an answer goes on.
    with ui.tab_panels(tabs, value=section, animated=False, keep_alive=True).classes("w-full") as panels:
        with ui.tab_panel("try").classes("qaa-page"):
            TryPage(session)
        with ui.tab_panel("adapters").classes("qaa-page"):
            adapters = AdaptersPage(session)
        with ui.tab_panel("inside").classes("qaa-page"):
            inside = InsidePage(session)
        with ui.tab_panel("now").classes("qaa-page"):
            now = NowPage(session)
    panels.style("width: 100%")
    ui.skip_link(target=panels)

    async def open_section() -> None:
        path = {"adapters": adapters.path, "inside": inside.path}.get(tabs.value, f"/{tabs.value}")
        ui.navigate.history.replace(path)
        if tabs.value == "adapters":
            await adapters.refresh()

    async def look_inside(adapter: str) -> None:
        inside.name.field.value = adapter
        tabs.value = "inside"
        await inside.look()

    async def tick() -> None:
        problem = session.observer.problem
        if problem and not away.visible:
            away.text = (
                f"The server at {session.settings.url} is away: {problem}. The page goes on when it is back."
            )
        elif away.visible and not problem:
            await adapters.refresh()
        away.set_visibility(bool(problem))
        if tabs.value == "now":
            await now.refresh()
        if tabs.value == "adapters":
            await adapters.tick()

    async def turn() -> None:
        dark.value = not await ui.run_javascript("return document.body.classList.contains('body--dark')")

    contrast.on_click(turn)
    tabs.on_value_change(open_section)
    adapters.on_look_inside = look_inside
    keys.on_click(lambda: _ask_keys(session))
    await ui.context.client.connected(timeout=30.0)
    if section == "adapters" and name:
        adapters.chosen = name
    if section == "inside" and name:
        inside.name.field.value = name
    await session.restore()
    if section == "inside" and name:
        await inside.look()
    ui.timer(1.0, tick)


async def _ask_keys(session: Session) -> None:
    with ui.dialog() as dialog, ui.card():
        ui.label("Keys are kept by the browser until this tab is closed.")
        client_key = ui.input("Client key", password=True).props("outlined autocomplete=off autofocus")
        admin_key = ui.input("Admin key", password=True).props("outlined autocomplete=off")
        said = ui.label().classes("qaa-bad")

        async def take() -> None:
            try:
                await session.set_keys(str(client_key.value or "").strip(), str(admin_key.value or "").strip())
            except (ApiError, ValueError) as error:
                said.text = str(error)
            else:
                dialog.close()

        with ui.row():
            ui.button("Use", on_click=take)
            ui.button("Cancel", on_click=dialog.close).props("flat")
    await dialog
    dialog.delete()
