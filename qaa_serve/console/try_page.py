"""One prompt to up to four models side by side."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import datetime
from html import escape
from typing import Any

from nicegui import ui

from qaa_serve.console.api import ApiError
from qaa_serve.console.differences import mark
from qaa_serve.console.session import Session
from qaa_serve.console.snippets import to_curl, to_python
from qaa_serve.console.widgets import NameInput, models_of, show_seconds

_MOST = 4

#: What the answer is held to: the label, and what is to be written for it.
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
        self.model = model
        self.text = ""
        self.failed = False
        with ui.element("section").classes("qaa-card").props(f'aria-label="{escape(model)}"'):
            ui.label(model).style("font-weight: 600; overflow-wrap: anywhere")
            self._text = ui.html("", sanitize=False).classes("qaa-answer")
            self.facts = ui.label().classes("qaa-facts")

    def add(self, text: str) -> None:
        self.text += text
        self._text.set_content(escape(self.text))

    def mark(self, html: str) -> None:
        """Show the same text with differences marked."""
        self._text.set_content(html)

    def fail(self, reason: str) -> None:
        self.failed = True
        self.facts.classes(replace="qaa-bad")
        self.facts.text = reason


class TryPage:
    """The form, the answers, and what was asked before."""

    def __init__(self, session: Session):
        self._session = session
        self._tasks: list[asyncio.Task[None]] = []
        self._answers: list[_Answer] = []
        self._models: list[NameInput] = []
        self._model_row = ui.element("div").classes("qaa-row")
        with self._model_row:
            for number in range(_MOST):
                self._models.append(NameInput(session, f"Model {number + 1}"))
        self._prompt = ui.textarea("Prompt").props("outlined autogrow").style("width: 100%")
        self._prompt.on("keydown.ctrl.enter", self._run)
        with ui.expansion("System prompt, sampling, structured output").style("width: 100%"):
            self._system = ui.textarea("System prompt").props("outlined autogrow dense").style("width: 100%")
            with ui.element("div").classes("qaa-row"):
                self._numbers = {
                    "temperature": _number("Temperature", 0.0, 0, 2, 0.1),
                    "top_p": _number("Top p", 1.0, 0.01, 1, 0.05),
                    "max_tokens": _number("Most tokens", 128, 1, 1 << 20, 1),
                    "seed": _number("Seed", None, 0, 1 << 31, 1),
                }
            with ui.element("div").classes("qaa-row"):
                self._structure = ui.select(_STRUCTURES, value="", label="The answer is").props("outlined dense")
                self._structure_text = ui.textarea("Schema, expression or lines").props("outlined dense autogrow")
                self._structure_text.bind_visibility_from(
                    self._structure, "value", backward=lambda value: value not in ("", "json")
                )
        with ui.element("div").classes("qaa-row"):
            ui.button("Ask", icon="send", on_click=self._run).tooltip("Ctrl+Enter")
            ui.button("Stop", on_click=self._stop).props("flat")
            ui.button("Copy as curl", on_click=lambda: self._copy("curl")).props("flat no-caps")
            ui.button("Copy as Python", on_click=lambda: self._copy("python")).props("flat no-caps")
            ui.button("History", on_click=self._show_history).props("flat")
            self._marks = ui.switch("Mark differences", value=True, on_change=self._mark)
        self._said = ui.label().classes("qaa-bad").props("role=status")
        self._cards = ui.element("div").classes("qaa-cards")
        ui.context.client.on_delete(self._stop)
        session.on_keys(self._fill)

    async def _fill(self) -> None:
        """Suggest models; the first ones are filled in."""
        names = await models_of(self._session)
        if not any(model.value for model in self._models):
            for model, name in zip(self._models, names[:2], strict=False):
                model.field.value = name
        for model in self._models:
            await model.suggest()

    # ---------------------------------------------------------------------------------------------- the request

    def _form(self) -> dict[str, Any]:
        return {
            "models": [model.value for model in self._models if model.value],
            "prompt": self._prompt.value or "",
            "system": self._system.value or "",
            "structure": self._structure.value,
            "structure_text": self._structure_text.value or "",
            **{name: number.value for name, number in self._numbers.items()},
        }

    def _restore(self, form: Mapping[str, Any]) -> None:
        for number, model in enumerate(self._models):
            model.field.value = form["models"][number] if number < len(form["models"]) else ""
        self._prompt.value, self._system.value = form["prompt"], form["system"]
        self._structure.value, self._structure_text.value = form["structure"], form["structure_text"]
        for name, field in self._numbers.items():
            field.value = form[name]

    def _bodies(self) -> list[dict[str, Any]]:
        """A request for each model; none, with the reason shown, if the form makes no sense."""
        self._said.text = ""
        try:
            form = self._form()
            if not form["models"]:
                raise ValueError("name a model")
            if not form["prompt"].strip():
                raise ValueError("write a prompt")
            return [_body(form, model) for model in form["models"]]
        except ValueError as error:
            self._said.text = str(error)
            return []

    async def _run(self) -> None:
        bodies = self._bodies()
        if not bodies:
            return
        self._stop()
        self._cards.clear()
        with self._cards:
            self._answers = [_Answer(body["model"]) for body in bodies]
        answers, form = self._answers, self._form()
        self._tasks = [
            asyncio.create_task(self._ask(answer, body)) for answer, body in zip(answers, bodies, strict=True)
        ]
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

    async def _ask(self, answer: _Answer, body: Mapping[str, Any]) -> None:
        first: float | None = None
        last, tokens, revision = 0.0, 0, None
        try:
            async for piece in self._session.api.stream(body):
                if piece.text:
                    first, last = piece.seconds if first is None else first, piece.seconds
                    answer.add(piece.text)
                tokens, revision = piece.tokens or tokens, piece.revision
        except ApiError as error:
            answer.fail(str(error))
        except asyncio.CancelledError:
            answer.fail("stopped")
        else:
            facts = [f"first token after {show_seconds(first)}"] if first is not None else ["no text"]
            if tokens and first is not None and last > first:
                facts.append(f"{(tokens - 1) / (last - first):.3g} tokens/s")
            facts += [f"{tokens} tokens"] if tokens else []
            answer.facts.text = " · ".join(facts + ([revision] if revision else []))

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _mark(self) -> None:
        told = [answer for answer in self._answers if not answer.failed]
        marked = mark([answer.text for answer in told]) if self._marks.value else []
        for number, answer in enumerate(told):
            answer.mark(marked[number] if marked else escape(answer.text))

    # ------------------------------------------------------------------------------------------ copies, history

    def _copy(self, how: str) -> None:
        bodies = self._bodies()
        if not bodies:
            return
        text = (to_curl if how == "curl" else to_python)(self._session.settings.url, bodies)
        ui.clipboard.write(text)
        with ui.dialog() as dialog, ui.card().style("max-width: 90vw; width: 60rem"):
            ui.label("Copied, if the browser allows that. QAA_KEY is the client key, where one is needed.")
            ui.label(text).classes("qaa-code")
            ui.button("Close", on_click=dialog.close).props("flat autofocus")
        dialog.open()

    async def _show_history(self) -> None:
        entries = await ui.run_javascript("return qaaConsole.history()", timeout=10.0)

        def take(entry: Mapping[str, Any]) -> None:
            self._stop()
            self._restore(entry["form"])
            self._cards.clear()
            with self._cards:
                self._answers = [_Answer(model) for model, _, _ in entry["answers"]]
            for answer, (_, text, facts) in zip(self._answers, entry["answers"], strict=True):
                answer.add(text)
                answer.facts.text = facts
            self._mark()
            dialog.close()

        def forget() -> None:
            ui.run_javascript("qaaConsole.forget()")
            dialog.close()

        with ui.dialog() as dialog, ui.card().style("max-width: 90vw; width: 50rem"):
            ui.label("Kept by this browser alone." if entries else "Nothing was asked in this browser yet.")
            for entry in entries:
                title = f"{entry['time'][:16].replace('T', ' ')}  {', '.join(entry['form']['models'])}"
                with ui.item(on_click=lambda entry=entry: take(entry)).props("clickable"), ui.item_section():
                    ui.item_label(entry["form"]["prompt"][:200])
                    ui.item_label(title).props("caption")
            with ui.row():
                ui.button("Clear", on_click=forget).props("flat")
                ui.button("Close", on_click=dialog.close).props("flat autofocus")
        dialog.open()


def _number(label: str, value: float | None, low: float, high: float, step: float) -> ui.number:
    number = ui.number(label, value=value, min=low, max=high, step=step)
    return number.props("outlined dense").classes("qaa-short")


def _body(form: Mapping[str, Any], model: str) -> dict[str, Any]:
    """What POST /v1/chat/completions takes.

    Raises:
        ValueError: if the schema is no JSON, or what the answer is held to is missing.
    """
    messages = [{"role": "system", "content": form["system"]}] if form["system"].strip() else []
    messages.append({"role": "user", "content": form["prompt"]})
    body: dict[str, Any] = {"model": model, "messages": messages}
    for name, kind in (("temperature", float), ("top_p", float), ("max_tokens", int), ("seed", int)):
        if form[name] is not None:
            body[name] = kind(form[name])
    structure, text = form["structure"], form["structure_text"].strip()
    if structure == "json":
        body["response_format"] = {"type": "json_object"}
    elif structure and not text:
        raise ValueError("write what the answer is held to")
    elif structure == "json_schema":
        try:
            schema = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the schema is no JSON: {error}") from error
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    elif structure:
        body["structured_outputs"] = {structure: text if structure == "regex" else text.splitlines()}
    return body
