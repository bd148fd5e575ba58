"""What the pages of one browser tab share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from qaa_serve.console.api import Api, ApiError
from qaa_serve.console.metrics import Observer


@dataclass
class Session:
    """One browser tab.

    Attributes:
        url: the server's.
        api: the server's, with the keys that were typed into this tab.
        observer: of the server, shared by all tabs.
        adapters: a directory of adapters; None: what the API says is all there is.
        open: shows another page: its section, and the adapter's name; the frame around the pages sets it.
    """

    url: str
    api: Api
    observer: Observer
    adapters: Path | None
    open: Callable[[str, str], Awaitable[None]] = field(init=False)

    async def models(self) -> list[str]:
        """Names that the tab's client may ask for; none if the server does not say."""
        try:
            return await self.api.models()
        except ApiError:
            return []


class Page:
    """One of the console's pages: made when it is first shown, and kept.

    Attributes:
        session: the tab's.
        path: of what is shown, for the address bar.
    """

    path: str

    def __init__(self, session: Session):
        self.session = session

    async def show(self, name: str | None) -> None:
        """Show an adapter, by its name, or none, by ""; None: what was shown, as it is now."""

    async def tick(self) -> None:
        """Called every second while the page is shown."""
