"""What is trained and tested on: prompts with their references, and a split of the training rows by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qaa_serve.training.chat import conversation, conversation_key, text_of
from qaa_serve.training.data import IGNORED, Usable, check_vocabulary, encode_row, read_usable
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.options import Answers
from qaa_serve.training.sources import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Row:
    """A usable row.

    Attributes:
        value: the row as JSON has it.
        prompt: tokens before the last answer, as serving would see them.
        ids: tokens of the whole row.
        labels: as long as ``ids``; the loss is on those that are not ``IGNORED``.
        reference: text of the last answer, without space around it.
        shown: the prompt's text for people: of a conversation, the last message before the answer.
    """

    value: dict[str, Any]
    prompt: tuple[int, ...]
    ids: list[int]
    labels: list[int]
    reference: str
    shown: str


def by_prompt(rows: Sequence[Row]) -> dict[tuple[int, ...], list[Row]]:
    """The rows of each prompt, in the source's order."""
    grouped: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.prompt, []).append(row)
    return grouped


def read_rows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary: int | None = None,
    answers: Answers = "all",
    skip_bad_rows: bool = False,
    remedy: str = "--skip-bad-rows",
) -> Usable[Row]:
    """Read rows in the forms that training takes.

    Args:
        source: a file or a data set, as ``sources.read_source`` takes them.
        tokenizer: the base model's.
        vocabulary: number of the base's embeddings, which no token may be beyond; None: is not looked at.
        answers: which assistant messages of a conversation the loss is on.
        skip_bad_rows: leave unusable rows out; otherwise they are an error.
        remedy: how to ask for that, for the message.

    Raises:
        TrainingError: if the source cannot be read, has unusable rows, or no usable one.
    """

    def use(row: dict[str, Any]) -> Row:
        made = _row(row, tokenizer, answers)
        check_vocabulary(made.ids, vocabulary, tokenizer)
        return made

    return read_usable(source, use, skip_bad_rows=skip_bad_rows, remedy=remedy)


def notes_on(read: Usable[Row]) -> list[str]:
    """What the reader of the report should know about the rows of a source."""
    notes = [f"{read.name}: {len(read.problems)} unusable rows were left out"] if read.problems else []
    return notes + ([f"{read.name}: not used: {', '.join(read.unused)}"] if read.unused else [])


def _row(row: Any, tokenizer: PreTrainedTokenizerBase, answers: Answers) -> Row:
    ids, labels = encode_row(row, tokenizer, answers)
    # The last answer alone: what comes before it is what a server would be asked.
    whole, last = (ids, labels) if answers == "last" else encode_row(row, tokenizer, "last")
    start = next((place for place, label in enumerate(last) if label != IGNORED), None)
    if start is None:
        raise RowError("the tokenizer leaves nothing of the answer")
    shown, reference = _texts(row, tokenizer)
    if not reference:  # tools are called without a word
        reference = tokenizer.decode([label for label in last if label != IGNORED], skip_special_tokens=True)
    return Row(row, tuple(whole[:start]), ids, labels, reference.strip(), shown)


def _texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What is shown of the prompt, and the answer."""
    if conversation_key(row):
        chat = conversation(row, tokenizer)
        place = chat.learnt[-1]
        return text_of(chat.messages[place - 1]) if place else "", text_of(chat.messages[place])
    if "prompt" in row and "completion" in row:
        return row["prompt"], row["completion"]
    extra = row.get("input")
    return row["instruction"] + (f"\n\n{extra}" if extra else ""), row["output"]


def split(rows: Sequence[Row], part: float) -> tuple[list[Row], list[Row]]:
    """Part the rows by prompt, so that no prompt is on both sides.

    The prompts with the smallest SHA-256 of their tokens go to the second side: the same ones whatever the
    rows' order.

    Args:
        rows: the training rows.
        part: of the prompts, above 0 and below 1; rounded, but at least one prompt and never all.

    Returns:
        The rows to train on and those to validate on, each in the source's order.

    Raises:
        TrainingError: if there are fewer than two prompts.
    """
    prompts = sorted(by_prompt(rows), key=lambda ids: hashlib.sha256(repr(ids).encode()).digest())
    if len(prompts) < 2:
        raise TrainingError("the training data has one prompt only: nothing can be split off to validate on")
    held = set(prompts[: min(max(1, round(part * len(prompts))), len(prompts) - 1)])
    return [row for row in rows if row.prompt not in held], [row for row in rows if row.prompt in held]


def as_test_set(rows: Sequence[Row]) -> dict[str, Any]:
    """What the evaluating process reads.

    Returns:
        ``prompts``: one object a prompt: ``ids``, ``references``, ``shown``; ``rows``: ``prompt``, its place among
        those, ``input_ids`` and ``labels``.
    """
    grouped = by_prompt(rows)
    places = {prompt: place for place, prompt in enumerate(grouped)}
    return {
        "prompts": [
            {
                "ids": list(prompt),
                "references": list(dict.fromkeys(row.reference for row in group)),
                "shown": group[0].shown,
            }
            for prompt, group in grouped.items()
        ],
        "rows": [{"prompt": places[row.prompt], "input_ids": row.ids, "labels": row.labels} for row in rows],
    }


def check_positions(
    prompts: Sequence[Mapping[str, Any]], limit: int | None, new_tokens: int, source: str, flag: str
) -> None:
    """See that the base has positions enough for prompts and their answers.

    Args:
        prompts: ``ids`` of each.
        limit: what the base takes, prompt and answer together; None: any number.
        new_tokens: of an answer at most.
        source: where the prompts are from, for the message.
        flag: the option that says ``new_tokens``.

    Raises:
        TrainingError: if it has not.
    """
    longest = max(len(prompt["ids"]) for prompt in prompts)
    if limit is not None and longest + new_tokens > limit:
        raise TrainingError(
            f"{source}: the longest prompt has {longest} tokens, which with {flag} {new_tokens} is more than the "
            f"{limit} that the base model takes: leave out such rows or lower {flag}"
        )
