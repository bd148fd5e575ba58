"""Small parts that several pages have."""

from __future__ import annotations

from html import escape

from nicegui import ui

from qaa_serve.console.api import ApiError
from qaa_serve.console.session import Session

#: Names that are suggested at once.
_SUGGESTED = 20


class NameInput:
    """A model's or adapter's name, with suggestions from what the session's client may see."""

    def __init__(self, session: Session, label: str, value: str = ""):
        self._session = session
        self.field = ui.input(label, value=value, on_change=self.suggest)
        self._names = ui.html("", tag="datalist", sanitize=False)
        self.field.props(f"outlined dense autocomplete=off list={self._names.html_id}")

    @property
    def value(self) -> str:
        """What is written there."""
        return str(self.field.value or "").strip()

    async def suggest(self) -> None:
        """Offer names that hold what is written."""
        names = await models_of(self._session)
        found = [name for name in names if self.value in name][:_SUGGESTED]
        self._names.set_content("".join(f'<option value="{escape(name)}">' for name in found))


async def models_of(session: Session) -> list[str]:
    """Names that the session's client may ask for; none if the server does not say."""
    try:
        return await session.api.models()
    except ApiError:
        return []


async def confirm(question: str, action: str) -> bool:
    """Ask before something is done.

    Args:
        question: what will be done.
        action: the word on the button that does it.
    """
    with ui.dialog() as dialog, ui.card():
        ui.label(question).style("overflow-wrap: anywhere")
        with ui.row():
            ui.button(action, on_click=lambda: dialog.submit(True))
            ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("flat autofocus")
    answer = await dialog
    dialog.delete()
    return bool(answer)


def show_bytes(count: float | None) -> str:
    """A number of bytes for people."""
    if not count:
        return "0" if count == 0 else ""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def show_seconds(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return ""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
