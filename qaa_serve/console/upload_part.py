"""Uploading an adapter: its two files, dropped onto the page."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from nicegui import ui
from nicegui.events import UploadEventArguments

from qaa_serve.console.api import ApiError, adapter_path
from qaa_serve.console.session import Session
from qaa_serve.console.widgets import Changes, row, text_input, written_in

#: The files of an adapter, and the parts of the form that uploads them.
_PARTS = {"adapter_config.json": "config", "adapter_model.safetensors": "weights"}

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
        self._scratch = Path(tempfile.mkdtemp(dir=session.scratch))
        self._sizes: dict[str, int] = {}
        self.root = ui.expansion("Upload an adapter", icon="upload").classes("qaa-column")
        with self.root:
            ui.label(f"Drop {' and '.join(_PARTS)} here; then give the name.")
            self._drop = ui.upload(
                label="The two files", multiple=True, auto_upload=True, max_file_size=_MAX_BYTES,
                on_upload=self._take, on_rejected=lambda: changes.refuse("that file is too large"),
            ).props("flat bordered")  # fmt: skip
            with row():
                self._name = text_input("Adapter's name")
                ui.button("Upload", on_click=self._upload)
            self._have = ui.label().classes("qaa-quiet").props("role=status")
        ui.context.client.on_delete(lambda: shutil.rmtree(self._scratch, ignore_errors=True))

    async def _take(self, event: UploadEventArguments) -> None:
        name = event.file.name
        if name not in _PARTS:
            self._changes.refuse(f"{name} is none of {', '.join(_PARTS)}")
            return
        await event.file.save(self._scratch / name)
        self._sizes[name] = event.file.size()
        self._have.text = ", ".join(f"{file}: {size:,} bytes" for file, size in sorted(self._sizes.items()))

    async def _upload(self) -> None:
        name, api = written_in(self._name), self._session.api
        if missing := [file for file in _PARTS if file not in self._sizes] + ([] if name else ["a name"]):
            self._changes.refuse(f"first give {' and '.join(missing)}")
            return
        try:
            served = (await api.adapter(name))["revision"]
        except ApiError as error:
            if error.status != 404:
                self._changes.refuse(str(error))
                return
            served = None
        # What the question says must be what is there when the answer comes.
        headers = {"If-Match": f'"{served}"'} if served else {"If-None-Match": "*"}

        async def put() -> None:
            files = {part: (self._scratch / file).open("rb") for file, part in _PARTS.items()}
            try:
                await api.admin("PUT", adapter_path(name), headers=headers, files=files)
            finally:
                for file in files.values():
                    file.close()

        place = f"in place of {served}" if served else "under a name that is new"
        question = f"Serve these files as {name}, {place}, on every server?"
        if await self._changes.make(question, "Upload", name, put):
            self._sizes.clear()
            self._drop.reset()
            self._have.text = ""
        await self._done()
