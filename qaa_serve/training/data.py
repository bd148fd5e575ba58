"""Rows -> token ids and labels, with the loss on the answer only.

Every prompt is tokenised as vLLM does when it serves the same request: a chat through the chat template with
no special tokens added to its text, a plain prompt with the special tokens the tokenizer adds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from qaa_serve.training.chat import MESSAGE_KEYS, conversation, conversation_key, messages_of
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.options import Answers
from qaa_serve.training.sources import RowError, read_source

#: The label of a token that the loss leaves out.
IGNORED = -100

#: Token ids and labels of one row, of equal length.
Encoded: TypeAlias = tuple[list[int], list[int]]

T = TypeVar("T")

_SHOWN_PROBLEMS = 5
_FORMATS = "messages or conversations; prompt and completion; instruction, output and optionally input"

#: What a row may have besides the keys of its form.
_CHAT_KEYS = ("system", "tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Usable(Generic[T]):
    """What was made of a source's rows.

    Attributes:
        name: the source, as it was given.
        rows: of the usable ones.
        digest: SHA-256 of the source, in hex.
        problems: one line a row that was left out, each with its place.
        unused: keys in the rows that nothing was made of.
    """

    name: str
    rows: Sequence[T]
    digest: str
    problems: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class Examples(Usable[dict[str, list[int]]], Dataset[dict[str, list[int]]]):
    """Rows to train on: ``input_ids`` and ``labels`` of each; ``position_ids`` too where rows are packed.

    Attributes:
        shortened: how many rows were cut to ``max_length`` tokens.
        source_rows: number of usable rows of the source: more than ``rows`` if they are packed.
    """

    shortened: int
    source_rows: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def answer_tokens(self) -> int:
        """Number of tokens the loss is on."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"])

    def packed(self, max_length: int) -> Examples:
        """Rows put together, each pack of at most ``max_length`` tokens: long rows first, each into the pack with
        the least room that is enough.

        ``position_ids`` begin anew with each row, by which transformers' attention masks keep them apart.
        """
        packs: list[list[dict[str, list[int]]]] = []
        by_room: dict[int, list[int]] = {}  # room -> the packs that have just so much
        rooms: list[int] = []  # the keys, in order
        for row in sorted(self.rows, key=lambda row: -len(row["input_ids"])):
            size = len(row["input_ids"])
            place = bisect_left(rooms, size)
            room = rooms[place] if place < len(rooms) else max_length
            if place == len(rooms):
                number = len(packs)
                packs.append([])
            else:
                number = by_room[room].pop()
                if not by_room[room]:
                    del by_room[room], rooms[place]
            packs[number].append(row)
            if room - size not in by_room:
                insort(rooms, room - size)
            by_room.setdefault(room - size, []).append(number)
        return replace(self, rows=[_joined(pack) for pack in packs])


def _joined(pack: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    return {
        "input_ids": [token for row in pack for token in row["input_ids"]],
        "labels": [label for row in pack for label in row["labels"]],
        "position_ids": [position for row in pack for position in range(len(row["input_ids"]))],
    }


def read_examples(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    vocabulary: int | None = None,
    answers: Answers = "all",
    skip_bad_rows: bool = False,
) -> Examples:
    """Read and tokenise a source.

    Args:
        source: a file or a data set, see ``read_source``.
        tokenizer: the base model's.
        max_length: tokens; longer rows are cut at their end, and unusable if no answer token is left.
        vocabulary: number of the base's embeddings, which no token may be beyond; None: is not looked at.
        answers: which assistant messages of a conversation the loss is on.
        skip_bad_rows: leave unusable rows out and list them in ``problems``; otherwise they are an error.

    Raises:
        TrainingError: if the source cannot be read, has unusable rows, or no usable one.
    """
    shortened = 0

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        nonlocal shortened
        ids, labels = encode_row(row, tokenizer, answers)
        check_vocabulary(ids, vocabulary, tokenizer)
        labels = [IGNORED, *labels[1:max_length]]  # nothing comes before the first token that could ask for it
        if all(label == IGNORED for label in labels):
            raise RowError(f"its {len(ids)} tokens cut to {max_length} leave nothing of the answer")
        shortened += len(ids) > max_length
        return {"input_ids": ids[:max_length], "labels": labels}

    read = read_usable(str(source), encode, skip_bad_rows=skip_bad_rows, remedy="--skip-bad-rows")
    return Examples(**vars(read), shortened=shortened, source_rows=len(read.rows))


def read_usable(name: str, use: Callable[[dict[str, Any]], T], *, skip_bad_rows: bool, remedy: str) -> Usable[T]:
    """Read a source and make something of each of its rows; of one with references, of each of them.

    Args:
        name: a file or a data set, see ``read_source``.
        use: raises RowError for a row that it can make nothing of.
        skip_bad_rows: leave such rows out; otherwise they are an error.
        remedy: how to ask for that, for the message.

    Raises:
        TrainingError: if the source cannot be read, has unusable rows, or no usable one.
    """
    found = read_source(name)
    rows: list[T] = []
    problems: list[str] = []
    unused: set[str] = set()
    for row in found.rows:
        try:
            if isinstance(row.value, RowError):
                raise row.value
            one = [(use(each), unused_keys(each)) for each in with_references(row.value)]
        except RowError as error:
            problems.append(f"{row.place}: {error}")
            continue
        rows += [made for made, _ in one]
        unused.update(*(keys for _, keys in one))
    if problems and not (skip_bad_rows and rows):
        listed = "".join(f"\n  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        more = f"\n  ... and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        what_to_do = f"Correct them, or leave them out with {remedy}" if rows else "There is no usable row"
        raise TrainingError(
            f"{name}: {len(problems)} of {len(found.rows)} rows cannot be used:{listed}{more}\n{what_to_do}"
        )
    if not rows:
        raise TrainingError(f"data {name} has no rows")
    return Usable(name, rows, found.digest, tuple(problems), tuple(sorted(unused)))


def with_references(row: object) -> list[Any]:
    """A row with several right answers as rows with one each; any other row as it is.

    Raises:
        RowError: if its ``references`` are none.
    """
    if not isinstance(row, dict) or row.get("references") is None:
        return [row]
    rest = {key: value for key, value in row.items() if key != "references"}
    references = row["references"]
    if not isinstance(references, list) or not references or not all(isinstance(one, str) for one in references):
        raise RowError("'references' must be a list of strings, and not empty")
    if (key := conversation_key(row)) is None:
        key = "output" if "instruction" in row else "completion"
        own = [row[key]] if row.get(key) is not None else []
        others = [text for text in dict.fromkeys(references) if text not in own]
        return [{**rest, key: answer} for answer in [*own, *others]]
    messages = messages_of(row)
    own = [messages.pop()] if messages[-1]["role"] == "assistant" else []
    said = [message.get("content") for message in own]
    others = [{"role": "assistant", "content": text} for text in dict.fromkeys(references) if text not in said]
    return [{**rest, key: [*messages, answer]} for answer in [*own, *others]]


def unused_keys(row: Mapping[str, Any]) -> set[str]:
    """Keys of a usable row that nothing is made of; those of its messages after ``messages.``."""
    if key := conversation_key(row):
        inner = {name for message in row[key] for name in message} - MESSAGE_KEYS
        return set(row) - {key, *_CHAT_KEYS} | {f"{key}.{name}" for name in inner}
    return set(row) - set(("prompt", "completion") if "prompt" in row else ("instruction", "input", "output"))


def check_vocabulary(ids: Sequence[int], vocabulary: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens that the base has no embedding for.

    Raises:
        RowError: names the first.
    """
    beyond = [token for token in ids if vocabulary is not None and token >= vocabulary]
    if beyond:
        raise RowError(
            f"its token {tokenizer.convert_ids_to_tokens(beyond[0])!r} has the number {beyond[0]}, but the base "
            f"model has embeddings for {vocabulary} only: its tokenizer belongs to another model"
        )


def encode_row(row: object, tokenizer: PreTrainedTokenizerBase, answers: Answers = "all") -> Encoded:
    """Token ids and labels of one row in any of the formats.

    Raises:
        RowError: if the row cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError(f"a JSON object is needed, found a JSON {type(row).__name__}")
    if conversation_key(row):
        return _encode_chat(row, tokenizer, answers)
    if "prompt" in row and "completion" in row:
        return _encode_plain(_text(row, "prompt"), _answer(row, "completion"), tokenizer)
    if "instruction" in row and "output" in row:
        return _encode_instruction(row, tokenizer)
    raise RowError(f"no known keys; known are {_FORMATS}; found {', '.join(map(str, row)) or 'none'}")


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise RowError(f"{key!r} must be a string, found {type(row[key]).__name__}")
    return str(row[key])


def _answer(row: dict[str, Any], key: str) -> str:
    text = _text(row, key)
    if not text.strip():
        raise RowError(f"the answer ({key!r}) is empty")
    return text


def _encode_plain(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """As /v1/completions sees the prompt; the completion ends with the tokenizer's end token."""
    start, answer = _parted(prompt + completion, [len(prompt)], tokenizer, add_special_tokens=True)
    if tokenizer.eos_token_id is not None and answer[-1:] != [tokenizer.eos_token_id]:
        answer = [*answer, tokenizer.eos_token_id]
    return start + answer, [IGNORED] * len(start) + answer


def _encode_instruction(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Alpaca rows: a chat of two messages, or a plain prompt where the base has no chat template."""
    extra = _text(row, "input") if row.get("input") else ""
    instruction = _text(row, "instruction") + (f"\n\n{extra}" if extra else "")
    output = _answer(row, "output")
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]
        return _encode_chat({"messages": messages}, tokenizer, "all")
    return _encode_plain(f"### Instruction:\n{instruction}\n\n### Response:\n", output, tokenizer)


def _encode_chat(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, answers: Answers) -> Encoded:
    """As /v1/chat/completions sees it: each answer is what follows the prompt that asks for it."""
    if not tokenizer.chat_template:
        raise RowError(
            "the base model's tokenizer has no chat template: use prompt and completion, or add a template"
        )
    chat = conversation(row, tokenizer)
    turns = chat.learnt[-1:] if answers == "last" else chat.learnt
    text = chat.render(tokenizer, turns[-1] + 1, asks=False)  # what follows the last answer teaches nothing
    cuts = []
    for turn in turns:
        prompt, said = chat.render(tokenizer, turn, asks=True), chat.render(tokenizer, turn + 1, asks=False)
        if not (said.startswith(prompt) and text.startswith(said)):
            raise RowError(
                f"the chat template writes the conversation before message {turn + 1} differently when it "
                "asks for that message: training would not see what serving sees"
                + ("; try --answers last" if len(turns) > 1 else "")
            )
        cuts += [len(prompt), len(said)]
    ids: list[int] = []
    labels: list[int] = []
    for number, part in enumerate(_parted(text, cuts, tokenizer, add_special_tokens=False)):
        learnt = len(part) if number % 2 else 0
        if learnt and tokenizer.eos_token_id in part:  # what a template writes behind it is never generated
            learnt -= part[::-1].index(tokenizer.eos_token_id)
        ids += part
        labels += part[:learnt] + [IGNORED] * (len(part) - learnt)
    return ids, labels


def _parted(
    text: str, cuts: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> list[list[int]]:
    """A text's tokens, parted at some of its characters.

    They are the tokens of the whole text, but where one would reach over a cut: there the text before it is
    tokenised as it is where it is a prompt, and what follows by itself.
    """
    whole = _tokens(tokenizer, text, add_special_tokens=add_special_tokens)
    fixed: list[int] = []  # tokens of the text before `start`, where the last such cut is
    start, ends = 0, [0]
    for cut in cuts:
        special = add_special_tokens and not start
        head = fixed + _tokens(tokenizer, text[start:cut], add_special_tokens=special)
        if whole[: len(head)] != head:
            start, fixed = cut, head
            whole = head + _tokens(tokenizer, text[cut:], add_special_tokens=False)
        ends.append(len(head))
    return [whole[begin:end] for begin, end in zip(ends, [*ends[1:], len(whole)], strict=True)]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"its text has half a character ({text[error.start]!a}, one half of a surrogate pair): write the "
            "character whole, or leave it out"
        ) from error
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def collate(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of rows: padded at the end to the longest, int64 (rows, tokens).

    Padding is masked, so that any token does: 0, since a tokenizer's own may be one that the base does not have.
    Packed rows get no attention mask: transformers makes it from their position ids. Their padding counts on from
    0 and so is a row of its own.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, padding: int) -> torch.Tensor:
        return torch.tensor([row[key] + [padding] * (longest - len(row[key])) for row in rows])

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED)}
    if "position_ids" in rows[0]:
        positions = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
        return batch | {"position_ids": torch.tensor(positions)}
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    return batch | {"attention_mask": (torch.arange(longest) < lengths).long()}
