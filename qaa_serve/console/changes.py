"""Changes of what is served: each is asked first, and the audit line is shown after."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui

from qaa_serve.console.api import ApiError
from qaa_serve.console.session import Session
from qaa_serve.console.widgets import confirm


class Changes:
    """Makes changes, and says below them what became of the last one."""

    def __init__(self, session: Session):
        self._session = session
        self._said = ui.label().classes("qaa-bad").props("role=alert")
        self._audit = ui.label().classes("qaa-audit").props('role=status aria-label="Audit line"')
        self._audit.set_visibility(False)

    async def make(self, question: str, action: str, name: str, call: Callable[[], Awaitable[Any]]) -> bool:
        """Ask, make the change, and show the newest line that the server's audit log has of this name.

        Args:
            question: what will be done, in one sentence.
            action: the word for it.
            name: the adapter or alias.
            call: makes the change; what the server refuses is shown.

        Returns:
            Whether the change was made.
        """
        if not await confirm(question, action):
            return False
        self.clear()
        made = True
        try:
            await call()
        except ApiError as error:
            made = False
            self.refuse(str(error))
        try:
            line = await self._session.api.audit(name)
        except ApiError as error:
            line = {"audit": f"cannot be read: {error}"}
        self._audit.text = json.dumps(line) if line else f"{action} {name}: ok; the audit log has no line for it"
        self._audit.set_visibility(True)
        return made

    def refuse(self, reason: str) -> None:
        """Say why something cannot be done."""
        self._said.text = reason

    def clear(self) -> None:
        """Take away what was said of the last change."""
        self._said.text = self._audit.text = ""
        self._audit.set_visibility(False)
