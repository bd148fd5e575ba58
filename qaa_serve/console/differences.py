"""Where several answers to one prompt differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape


def mark(answers: Sequence[str]) -> list[str]:
    """Each answer as HTML, with `<mark>` around words that another one has not at that place.

    The first answer is compared with all others, each of the others with the first.
    """
    words = [re.findall(r"\w+|[^\w\s]|\s+", answer) for answer in answers]
    if not words:
        return []
    marked: list[set[int]] = [set() for _ in words]
    for number, other in enumerate(words[1:], 1):
        for what, a, b, c, d in SequenceMatcher(None, words[0], other, autojunk=False).get_opcodes():
            if what != "equal":
                marked[0].update(range(a, b))
                marked[number].update(range(c, d))
    return [_to_html(text, places) for text, places in zip(words, marked, strict=True)]


def _to_html(words: Sequence[str], marked: set[int]) -> str:
    pieces = [
        f"<mark>{escape(word)}</mark>" if at in marked and not word.isspace() else escape(word)
        for at, word in enumerate(words)
    ]
    return "".join(pieces)
