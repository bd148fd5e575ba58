"""How a comparison goes on, for people: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import re
import sys
from types import TracebackType
from typing import TextIO

import rich.progress
from rich.console import Console
from rich.markup import escape

_COURSE = re.compile(r"step \d|\d of \d+ prompts")


class Display:
    """What is trained and evaluated, on a console; use it as a context, so that the bar is closed in any case.

    Args:
        total: number of trainings and evaluations to come, as far as is known.
        stream: None: stderr.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("comparing"),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)
        self._title = ""

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, title: str) -> None:
        """A training or evaluation begins."""
        self._title = title
        self._bar.update(self._task, description=escape(title))

    def line(self, text: str) -> None:
        """Shows where it is, if its last line says so."""
        if _COURSE.search(text):
            self._bar.update(self._task, description=escape(f"{self._title}: {text}"))

    def end(self, title: str, outcome: str) -> None:
        """It ended."""
        self._bar.advance(self._task)
        self._bar.console.print(escape(f"{title}: {outcome}"), soft_wrap=True)
