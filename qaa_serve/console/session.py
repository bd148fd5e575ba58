"""What a page knows: the console's settings, and the keys that were typed into this browser tab."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from nicegui import ui

from qaa_serve.console.api import Api, Connection
from qaa_serve.console.metrics import Observer


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        url: the server's.
        admin_url: of its admin routes; None: what the server noted on this machine, else `url`.
        host: address that the page is at.
        port: its port.
        adapters: a directory of adapters; None: what the API says is all there is.
        end_with: end when the process of this id does; None: at a signal.
    """

    url: str
    admin_url: str | None
    host: str
    port: int
    adapters: Path | None
    end_with: int | None


class Session:
    """One browser tab. The browser keeps the keys while the tab is open, and this process has them meanwhile.

    Attributes:
        api: the server's, with these keys.
        observer: of the server, shared by all tabs.
    """

    def __init__(self, settings: Settings, connection: Connection, observer: Observer):
        self.settings = settings
        self.observer = observer
        self.api = Api(connection)
        self._connection = connection
        self._on_keys: list[Callable[[], Awaitable[None]]] = []

    def on_keys(self, call: Callable[[], Awaitable[None]]) -> None:
        """Call this when the keys are known, and whenever they change."""
        self._on_keys.append(call)

    async def restore(self) -> None:
        """Take the keys that the browser has kept for this tab."""
        kept = await ui.run_javascript("return qaaConsole.keys()", timeout=10.0)
        await self._take(str(kept[0]), str(kept[1]))

    async def set_keys(self, client_key: str, admin_key: str) -> None:
        """Take other keys.

        Raises:
            ValueError: if one holds what no header can carry.
            ApiError: if the server does not take one.
        """
        if not all(re.fullmatch("[!-~]*", key) for key in (client_key, admin_key)):
            raise ValueError("a key has no spaces and no letters beyond ASCII")
        await Api(self._connection, client_key, admin_key).check()
        ui.run_javascript(f"qaaConsole.keepKeys({json.dumps([client_key, admin_key])})")
        await self._take(client_key, admin_key)

    async def _take(self, client_key: str, admin_key: str) -> None:
        self.api = Api(self._connection, client_key, admin_key)
        for call in self._on_keys:
            await call()
