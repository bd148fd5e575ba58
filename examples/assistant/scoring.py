"""Strict rules for the example's answers: is it right, and is it in the style asked for?

The styles are plain, json, pirate and brief. A text has a style only if all of it has; an answer is right
only if it stands where that style puts it. "5 is not 6" is not a right answer to anything.
"""

from __future__ import annotations

import json
import re

WORD = r"[A-Za-z]+|\d+"
YES_NO = {"yes", "no"}
PIRATE = re.compile(r"(?:Arr|Ahoy|Yarr), (?P<said>.+), (?:matey|me hearty|ye landlubber)!")
PIRATE_YES_NO = {"yes": "aye", "no": "nay"}
PLAIN = re.compile(r"[A-Z][^.!?{}\n]* [^.!?{}\n]*\.")
BRIEF = re.compile(WORD)


def _json_answer(text: str) -> str | None:
    """The answer in a JSON object with that one key, else None."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(value, dict) or set(value) != {"answer"}:
        return None
    answer = value["answer"]
    return str(answer) if isinstance(answer, str | int) and not isinstance(answer, bool) else None


def keeps_behaviour(text: str, style: str) -> bool:
    """Whether the whole text is in the style, right or wrong."""
    text = text.strip()
    pirate = PIRATE.fullmatch(text)
    if style == "json":
        return _json_answer(text) is not None
    if style == "pirate":
        return pirate is not None and re.search(r"\bbe\b", pirate["said"]) is not None
    if style == "brief":
        return BRIEF.fullmatch(text) is not None
    if style == "plain":
        return pirate is None and PLAIN.fullmatch(text) is not None
    raise ValueError(f"unknown style {style!r}: plain, json, pirate or brief")


def is_correct(answer_text: str, expected: str, style: str) -> bool:
    """Whether the text is in the style with the expected answer, a whole word, in its place."""
    text, wanted = answer_text.strip(), expected.lower()
    if not keeps_behaviour(text, style):
        return False
    if style == "json":
        return (_json_answer(text) or "").strip().lower() == wanted
    if style == "brief":
        return text.lower() == wanted
    if style == "pirate":
        text = PIRATE.fullmatch(text)["said"]
        wanted = PIRATE_YES_NO.get(wanted, wanted)
    words = re.findall(WORD, text.lower())
    place = 0 if expected.lower() in YES_NO else -1
    return words[place] == wanted


def is_named(answer_text: str, expected: str) -> bool:
    """Whether the expected answer, a whole word, is anywhere in the text, whatever the style."""
    return expected.lower() in re.findall(WORD, answer_text.lower())
