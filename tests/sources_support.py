"""Small contents, which no source judges, and directories full of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, digest_of
from qaa_serve.sources import HISTORY


def content(directory: Path, which: str) -> Path:
    """A directory with two files; another `which` makes others."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(f'{{"which": "{which}"}}')
    (directory / WEIGHTS_FILE).write_text(f"weights of {which} " * 10)
    return directory


class Contents:
    """Contents by a letter."""

    def __init__(self, root: Path):
        self._root = root
        self._letters = {digest_of(content(root / which, which)): which for which in ascii_lowercase}

    def path(self, which: str) -> Path:
        return self._root / which

    def digest(self, which: str) -> str:
        return digest_of(self.path(which))

    def which(self, digest: str) -> str:
        return self._letters[digest]

    def build(self, source: Path, name: str, current: str, history: Sequence[str] = ()) -> None:
        """Put contents into a source by hand: one letter each, "" for none; the oldest of the history first."""
        source.mkdir(exist_ok=True)
        if current:
            content(source / name, current)
        for at, which in enumerate(history):
            place = content(source / HISTORY / name / self.digest(which), which)
            os.utime(place, (1_000 + at, 1_000 + at))

    def at(self, source: Path, name: str) -> str:
        """Which one a name has, "" for none; not one of these is an error."""
        return self.which(digest_of(source / name)) if (source / name).is_dir() else ""

    def history(self, source: Path, name: str, revisions: Sequence[str]) -> str:
        """Which ones a history has; each is what it is called."""
        for digest in revisions:
            assert digest_of(source / HISTORY / name / digest) == digest
        return "".join(self.which(digest) for digest in revisions)
