"""Uploading an adapter: its two files, dropped onto the page."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from nicegui import ui
from nicegui.events import UploadEventArguments

from qaa_serve.console.api import ADAPTER_FILES, ApiError
from qaa_serve.console.changes import Changes
from qaa_serve.console.session import Session

#: The most that the server takes unless it is told otherwise.
_MAX_BYTES = 1 << 30


class UploadPart:
    """A place to drop the files, and the name that they are to have.

    Attributes:
        root: what holds it all.
    """

    def __init__(self, session: Session, changes: Changes, done: Callable[[], Awaitable[None]]):
        """Build it.

        Args:
            session: the tab's.
            changes: asks, and says what became of it.
            done: called after an upload.
        """
        self._session, self._changes, self._done = session, changes, done
        self._scratch = tempfile.TemporaryDirectory(prefix="qaa-console-")
        self._files: dict[str, int] = {}
        self.root = ui.expansion("Upload an adapter", icon="upload").style("width: 100%")
        with self.root:
            ui.label(f"Drop {' and '.join(ADAPTER_FILES.values())} here; then give the name.")
            self._drop = ui.upload(
                label="The two files", multiple=True, auto_upload=True, max_file_size=_MAX_BYTES,
                on_upload=self._take, on_rejected=lambda: changes.refuse("that file is too large"),
            ).props("flat bordered")  # fmt: skip
            with ui.element("div").classes("qaa-row"):
                self._name = ui.input("Adapter's name").props("outlined dense autocomplete=off")
                ui.button("Upload", on_click=self._upload)
            self._have = ui.label().classes("qaa-quiet").props("role=status")
        ui.context.client.on_delete(self._scratch.cleanup)

    async def _take(self, event: UploadEventArguments) -> None:
        name = event.file.name
        if name not in ADAPTER_FILES.values():
            self._changes.refuse(f"{name} is none of {', '.join(ADAPTER_FILES.values())}")
            return
        await event.file.save(Path(self._scratch.name) / name)
        self._files[name] = event.file.size()
        self._have.text = ", ".join(f"{file}: {size:,} bytes" for file, size in sorted(self._files.items()))

    async def _upload(self) -> None:
        name = str(self._name.value or "").strip()
        missing = [file for file in ADAPTER_FILES.values() if file not in self._files]
        if missing or not name:
            self._changes.refuse(f"first give {' and '.join([*missing, *([] if name else ['a name'])])}")
            return
        try:
            served = (await self._session.api.adapter(name))["revision"]
        except ApiError as error:
            if error.status != 404:
                self._changes.refuse(str(error))
                return
            served = None
        place = f"in place of {served}" if served else "under a name that is new"
        question = f"Serve these files as {name}, {place}, on every server?"
        directory = Path(self._scratch.name)
        if await self._changes.make(
            question, "Upload", name, lambda: self._session.api.upload(name, directory, served)
        ):
            self._files.clear()
            self._drop.reset()
            self._have.text = ""
        await self._done()
