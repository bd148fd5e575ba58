"""One prompt to up to four models side by side."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

from nicegui import ui

from qaa_serve.console.api import ApiError
from qaa_serve.console.differences import mark
from qaa_serve.console.session import Page, Session
from qaa_serve.console.snippets import to_curl, to_python
from qaa_serve.console.widgets import dialog, name_input, row, show_seconds, written_in

_MOST = 4

#: Fields of the request that are numbers: label, value at the start, least, most, step.
_NUMBERS: dict[str, tuple[str, float | None, float, float, float]] = {
    "temperature": ("Temperature", 0.0, 0, 2, 0.1),
    "top_p": ("Top p", 1.0, 0.01, 1, 0.05),
    "max_tokens": ("Most tokens", 128, 1, 1 << 20, 1),
    "seed": ("Seed", None, 0, 1 << 31, 1),
}

#: What the answer is held to.
_STRUCTURES = {
    "": "Any text",
    "json": "A JSON object",
    "json_schema": "JSON of a schema",
    "regex": "A regular expression",
    "choice": "One of these lines",
}


class _Answer:
    """The card of one model."""

    def __init__(self, model: str):
        self.model, self.text, self.failed = model, "", False
        with ui.element("section").classes("qaa-card").props(f'aria-label="{escape(model)}"'):
            ui.label(model).style("font-weight: 600; overflow-wrap: anywhere")
            self.shown = ui.html(sanitize=False).classes("qaa-answer")
            self.facts = ui.label().classes("qaa-facts")

    def add(self, text: str) -> None:
        self.text += text
        self.shown.set_content(escape(self.text))

    def fail(self, reason: str) -> None:
        self.failed = True
        self.facts.classes(replace="qaa-bad")
        self.facts.text = reason


class TryPage(Page):
    """The form, the answers, and what was asked before."""

    path = "/try"

    def __init__(self, session: Session):
        super().__init__(session)
        self._tasks: list[asyncio.Task[None]] = []
        self._answers: list[_Answer] = []
        self._fields: dict[str, Any] = {}  # by the name in the form, as the history keeps it
        with row():
            self._models = [name_input(session, f"Model {number}") for number in range(1, _MOST + 1)]
        prompt = ui.textarea("Prompt").props("outlined autogrow").classes("qaa-column")
        prompt.on("keydown.ctrl.enter", self._ask_all)
        with ui.expansion("System prompt, sampling, structured output").classes("qaa-column"):
            system = ui.textarea("System prompt").props("outlined autogrow dense").classes("qaa-column")
            with row():
                for name, (label, value, low, high, step) in _NUMBERS.items():
                    number = ui.number(label, value=value, min=low, max=high, step=step)
                    self._fields[name] = number.props("outlined dense").classes("qaa-short")
            with row():
                structure = ui.select(_STRUCTURES, value="", label="The answer is").props("outlined dense")
                text = ui.textarea("Schema, expression or lines").props("outlined dense autogrow")
                text.bind_visibility_from(structure, "value", backward=lambda value: value not in ("", "json"))
        self._fields |= {"prompt": prompt, "system": system, "structure": structure, "structure_text": text}
        with row():
            ui.button("Ask", icon="send", on_click=self._ask_all).tooltip("Ctrl+Enter")
            ui.button("Stop", on_click=self._stop).props("flat")
            ui.button("Copy as curl", on_click=lambda: self._copy(to_curl)).props("flat no-caps")
            ui.button("Copy as Python", on_click=lambda: self._copy(to_python)).props("flat no-caps")
            ui.button("History", on_click=self._show_history).props("flat")
            self._marks = ui.switch("Mark differences", value=True, on_change=self._mark)
        self._said = ui.label().classes("qaa-bad").props("role=status")
        self._cards = ui.element("div").classes("qaa-cards")
        ui.context.client.on_delete(self._stop)

    async def show(self, name: str | None) -> None:
        """The first models that may be asked are filled in."""
        names = await self.session.models()
        if not any(model.value for model in self._models):
            for model, first in zip(self._models, names[:2], strict=False):
                model.value = first

    # ---------------------------------------------------------------------------------------------- the request

    def _form(self) -> dict[str, Any]:
        models = [name for model in self._models if (name := written_in(model))]
        return {"models": models, **{name: field.value for name, field in self._fields.items()}}

    def _bodies(self) -> list[dict[str, Any]]:
        """A request for each model; none, with the reason shown, if the form makes no sense."""
        self._said.text = ""
        try:
            return _make_bodies(self._form())
        except ValueError as error:
            self._said.text = str(error)
            return []

    async def _ask_all(self) -> None:
        form = self._form()
        if not (bodies := self._bodies()):
            return
        answers = self._new_answers(form["models"])
        self._tasks = [asyncio.create_task(self._ask(*asked)) for asked in zip(answers, bodies, strict=True)]
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if answers is not self._answers:  # asked anew meanwhile
            return
        self._mark()
        entry = {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "form": form,
            "answers": [[answer.model, answer.text, answer.facts.text] for answer in answers],
        }
        ui.run_javascript(f"qaaConsole.remember({json.dumps(entry)})")

    def _new_answers(self, models: list[str]) -> list[_Answer]:
        self._stop()
        self._cards.clear()
        with self._cards:
            self._answers = [_Answer(model) for model in models]
        return self._answers

    async def _ask(self, answer: _Answer, body: Mapping[str, Any]) -> None:
        start, first, last, tokens, revision = time.perf_counter(), 0.0, 0.0, 0, None
        try:
            async for text, count, revision in self.session.api.stream(body):  # noqa: B007 (told after)
                if text:
                    last = time.perf_counter() - start
                    first = first or last
                    answer.add(text)
                tokens = count or tokens
        except ApiError as error:
            answer.fail(str(error))
        except asyncio.CancelledError:
            answer.fail("stopped")
        else:
            facts = [f"first token after {show_seconds(first)}" if first else "no text"]
            facts += [f"{(tokens - 1) / (last - first):.3g} tokens/s"] if tokens and last > first else []
            facts += [f"{tokens} tokens"] if tokens else []
            answer.facts.text = " · ".join(facts + ([revision] if revision else []))

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _mark(self) -> None:
        told = [answer for answer in self._answers if not answer.failed]
        texts = [answer.text for answer in told]
        for answer, html in zip(told, mark(texts) if self._marks.value else map(escape, texts), strict=True):
            answer.shown.set_content(html)

    # -------------------------------------------------------------------------------------- copies, and history

    def _copy(self, write: Callable[[str, Sequence[Mapping[str, Any]]], str]) -> None:
        if not (bodies := self._bodies()):
            return
        text = write(self.session.url, bodies)
        ui.clipboard.write(text)
        with dialog() as copied:
            ui.label("Copied, if the browser allows that. QAA_KEY is the client key, where one is needed.")
            ui.label(text).classes("qaa-code")
            ui.button("Close", on_click=copied.close).props("flat autofocus")

    async def _show_history(self) -> None:
        entries = await ui.run_javascript("return qaaConsole.history()", timeout=10.0)

        def restore(entry: Mapping[str, Any]) -> None:
            form = entry["form"]
            for model, name in zip(self._models, form["models"] + [""] * _MOST, strict=False):
                model.value = name
            for name, field in self._fields.items():
                field.value = form[name]
            answers = self._new_answers([model for model, _, _ in entry["answers"]])
            for answer, (_, text, facts) in zip(answers, entry["answers"], strict=True):
                answer.add(text)
                answer.facts.text = facts
            self._mark()
            history.close()

        def forget() -> None:
            ui.run_javascript("qaaConsole.forget()")
            history.close()

        with dialog() as history:
            ui.label("Kept by this browser alone." if entries else "Nothing was asked in this browser yet.")
            for entry in entries:
                title = f"{entry['time'][:16].replace('T', ' ')}  {', '.join(entry['form']['models'])}"
                with ui.item(on_click=lambda entry=entry: restore(entry)).props("clickable"), ui.item_section():
                    ui.item_label(entry["form"]["prompt"][:200])
                    ui.item_label(title).props("caption")
            with ui.row():
                ui.button("Clear", on_click=forget).props("flat")
                ui.button("Close", on_click=history.close).props("flat autofocus")


def _make_bodies(form: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What POST /v1/chat/completions takes, for each model.

    Raises:
        ValueError: if there is no model or prompt, the schema is no JSON, or it is missing.
    """
    structure, text = form["structure"], form["structure_text"].strip()
    for needed, ask in ((form["models"], "name a model"), (form["prompt"].strip(), "write a prompt")):
        if not needed:
            raise ValueError(ask)
    if structure not in ("", "json") and not text:
        raise ValueError("write what the answer is held to")
    system = [{"role": "system", "content": form["system"]}] if form["system"].strip() else []
    body: dict[str, Any] = {"messages": [*system, {"role": "user", "content": form["prompt"]}]}
    for name, (*_, step) in _NUMBERS.items():
        if form[name] is not None:
            body[name] = int(form[name]) if step == 1 else float(form[name])
    if structure == "json":
        body["response_format"] = {"type": "json_object"}
    elif structure == "json_schema":
        try:
            schema = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the schema is no JSON: {error}") from error
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    elif structure:
        body["structured_outputs"] = {structure: text if structure == "regex" else text.splitlines()}
    return [{"model": model, **body} for model in form["models"]]
