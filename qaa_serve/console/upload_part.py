"""Uploading an adapter: its two files, dropped onto the page."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

from nicegui import ui
from nicegui.elements.upload_files import FileUpload
from nicegui.events import UploadEventArguments

from qaa_serve.console.api import ApiError, adapter_path
from qaa_serve.console.session import Session
from qaa_serve.console.widgets import Changes, row, text_input, written_in

#: The files of an adapter, and the parts of the form that uploads them.
_PARTS = {"adapter_config.json": "config", "adapter_model.safetensors": "weights"}

#: The most that the server takes unless it is told otherwise.
_MAX_BYTES = 1 << 30


class UploadPart:
    """A place to drop the files, and the name that they are to have."""

    def __init__(self, session: Session, changes: Changes, done: Callable[[], Awaitable[None]]):
        """Build it.

        Args:
            session: the tab's.
            changes: asks, and says what became of it.
            done: called after an upload.
        """
        self._session, self._changes, self._done = session, changes, done
        self._files: dict[str, FileUpload] = {}
        with ui.expansion("Upload an adapter", icon="upload").classes("qaa-column"):
            ui.label(f"Drop {' and '.join(_PARTS)} here; then give the name.")
            self._drop = ui.upload(
                label="The two files", multiple=True, auto_upload=True, max_file_size=_MAX_BYTES,
                on_upload=self._take, on_rejected=lambda: changes.say("that file is too large"),
            ).props("flat bordered")  # fmt: skip
            with row():
                self._name = text_input("Adapter's name")
                ui.button("Upload", on_click=self._upload)
            self._have = ui.label().classes("qaa-quiet").props("role=status")

    def _take(self, event: UploadEventArguments) -> None:
        if event.file.name not in _PARTS:
            self._changes.say(f"{event.file.name} is none of {', '.join(_PARTS)}")
            return
        self._files[event.file.name] = event.file
        self._have.text = ", ".join(f"{name}: {file.size():,} bytes" for name, file in sorted(self._files.items()))

    async def _upload(self) -> None:
        name = written_in(self._name)
        if missing := [file for file in _PARTS if file not in self._files] + ([] if name else ["a name"]):
            self._changes.say(f"first give {' and '.join(missing)}")
            return
        served = None
        try:
            served = (await self._session.api.adapter(name))["revision"]
        except ApiError as error:
            if error.status != 404:
                self._changes.say(str(error))
                return
        place = f"in place of {served}" if served else "under a name that is new"
        question = f"Serve these files as {name}, {place}, on every server?"
        # What the question says must be what is there when the answer comes.
        headers = {"If-Match": f'"{served}"'} if served else {"If-None-Match": "*"}
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as opened:
            files = {}
            for file, part in _PARTS.items():
                await self._files[file].save(Path(scratch) / file)
                files[part] = opened.enter_context((Path(scratch) / file).open("rb"))
            made = await self._changes.make(
                question, "Upload", name, "PUT", adapter_path(name), headers=headers, files=files
            )
        if made:
            self._files.clear()
            self._drop.reset()
            self._have.text = ""
        await self._done()
