"""Rows -> token ids and labels, with the loss on the answer only.

Every prompt is tokenised as vLLM does when it serves the same request: a chat through the chat template with
no special tokens added to its text, a plain prompt with the special tokens the tokenizer adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from qaa_serve.training.errors import TrainingError
from qaa_serve.training.options import Answers
from qaa_serve.training.sources import RowError, read_source

#: The label of a token that the loss leaves out.
IGNORED = -100

#: Token ids and labels of one row, of equal length.
Encoded: TypeAlias = tuple[list[int], list[int]]


_SHOWN_PROBLEMS = 5
_FORMATS = "messages; prompt and completion; instruction, output and optionally input"


@dataclass(frozen=True)
class Examples(Dataset[dict[str, list[int]]]):
    """The usable rows of a source.

    Attributes:
        name: the source, as it was given.
        rows: one dictionary a row: ``input_ids`` and ``labels``; ``position_ids`` too where rows are packed.
        digest: SHA-256 of the source, in hex.
        problems: one line a row that was left out, each with its place.
        shortened: how many rows were cut to ``max_length`` tokens.
        source_rows: number of usable rows of the source: more than ``rows`` if they are packed.
    """

    name: str
    rows: Sequence[dict[str, list[int]]]
    digest: str
    problems: tuple[str, ...]
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
        """Rows put together, each pack of at most ``max_length`` tokens: long rows first, each into the first
        pack that has room.

        ``position_ids`` begin anew with each row, by which transformers' attention masks keep them apart.
        """
        packs: list[list[dict[str, list[int]]]] = []
        room: list[int] = []
        for row in sorted(self.rows, key=lambda row: -len(row["input_ids"])):
            size = len(row["input_ids"])
            number = next((i for i, free in enumerate(room) if free >= size), len(packs))
            if number == len(packs):
                packs.append([])
                room.append(max_length)
            packs[number].append(row)
            room[number] -= size
        return replace(self, rows=[_joined(pack) for pack in packs])


def _joined(pack: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    return {
        "input_ids": [token for row in pack for token in row["input_ids"]],
        # The row before must not be asked for the first token of the next.
        "labels": [label for row in pack for label in [IGNORED, *row["labels"][1:]]],
        "position_ids": [position for row in pack for position in range(len(row["input_ids"]))],
    }


def read_examples(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    answers: Answers = "all",
    skip_bad_rows: bool = False,
) -> Examples:
    """Read and tokenise a source.

    Args:
        source: a file or a data set, see ``read_source``.
        tokenizer: the base model's.
        max_length: tokens; longer rows are cut at their end, and unusable if no answer token is left.
        answers: which assistant messages of a conversation the loss is on.
        skip_bad_rows: leave unusable rows out and list them in ``problems``; otherwise they are an error.

    Raises:
        TrainingError: if the source cannot be read, has unusable rows, or no usable one.
    """
    name = str(source)
    found = read_source(name)
    rows: list[dict[str, list[int]]] = []
    problems: list[str] = []
    shortened = 0
    for row in found.rows:
        try:
            if isinstance(row.value, RowError):
                raise row.value
            ids, labels = encode_row(row.value, tokenizer, answers)
            if all(label == IGNORED for label in labels[:max_length]):
                raise RowError(f"its {len(ids)} tokens cut to {max_length} leave nothing of the answer")
        except RowError as error:
            problems.append(f"{row.place}: {error}")
            continue
        shortened += len(ids) > max_length
        rows.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    if problems and not (skip_bad_rows and rows):
        total = len(rows) + len(problems)
        listed = "".join(f"\n  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        more = f"\n  ... and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        remedy = "Correct them, or leave them out with --skip-bad-rows" if rows else "There is no usable row"
        raise TrainingError(f"{name}: {len(problems)} of {total} rows cannot be used:{listed}{more}\n{remedy}")
    if not rows:
        raise TrainingError(f"data file {name} has no rows")
    return Examples(name, rows, found.digest, tuple(problems), shortened, len(rows))


def encode_row(row: object, tokenizer: PreTrainedTokenizerBase, answers: Answers = "all") -> Encoded:
    """Token ids and labels of one row in any of the formats.

    Raises:
        RowError: if the row cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError(f"a JSON object is needed, found a JSON {type(row).__name__}")
    if "messages" in row:
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
    start = _tokens(tokenizer, prompt, add_special_tokens=True)
    # The completion's tokens as they follow this prompt, where the prompt ends at a token's end.
    whole = _tokens(tokenizer, prompt + completion, add_special_tokens=True)
    if whole[: len(start)] == start:
        answer = whole[len(start) :]
    else:
        answer = _tokens(tokenizer, completion, add_special_tokens=False)
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
    messages = _checked_messages(row["messages"])
    if not tokenizer.chat_template:
        raise RowError(
            "the base model's tokenizer has no chat template: use prompt and completion, or add a template"
        )
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if answers == "last":
        turns = turns[-1:]
    messages = messages[: turns[-1] + 1]  # what follows the last answer teaches nothing
    ids = _render(messages, row, tokenizer, add_generation_prompt=False)
    labels = [IGNORED] * len(ids)
    for turn in turns:
        prompt = _render(messages[:turn], row, tokenizer, add_generation_prompt=True)
        said = _render(messages[: turn + 1], row, tokenizer, add_generation_prompt=False)
        if said[: len(prompt)] != prompt or ids[: len(said)] != said:
            raise RowError(
                f"the chat template writes the conversation before message {turn + 1} differently when it "
                "asks for that message: training would not see what serving sees"
                + ("; try --answers last" if len(turns) > 1 else "")
            )
        end = len(said)
        if tokenizer.eos_token_id in said[len(prompt) :]:  # what a template writes behind it is never generated
            end -= said[::-1].index(tokenizer.eos_token_id)
        labels[len(prompt) : end] = ids[len(prompt) : end]
    return ids, labels


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RowError("'messages' must be a list of messages, and not empty")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError(f"message {number} is no object with a 'role'")
        calls_tools = message["role"] == "assistant" and bool(message.get("tool_calls"))
        content = message.get("content")
        if calls_tools and content is None:
            continue
        if not isinstance(content, str):
            raise RowError(f"the 'content' of message {number} must be a string")
        if message["role"] == "assistant" and not calls_tools and not content.strip():
            raise RowError(f"the answer (message {number}) is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("there is no message of the role 'assistant'")
    return messages


def _render(
    messages: list[dict[str, Any]],
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=row.get("tools"),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # templates raise what they like
        raise RowError(f"the chat template refuses it: {error}") from error
    return _tokens(tokenizer, text, add_special_tokens=False)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def collator(pad_token_id: int) -> Callable[[list[dict[str, list[int]]]], dict[str, torch.Tensor]]:
    """A function that makes a batch of rows: padded at the end to the longest, int64 (rows, tokens).

    Packed rows get no attention mask: transformers makes it from their position ids. Their padding counts on from
    0 and so is a row of its own.
    """

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, padding: int) -> torch.Tensor:
            return torch.tensor([row[key] + [padding] * (longest - len(row[key])) for row in rows])

        batch = {"input_ids": padded("input_ids", pad_token_id), "labels": padded("labels", IGNORED)}
        if "position_ids" in rows[0]:
            positions = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
            return batch | {"position_ids": torch.tensor(positions)}
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        return batch | {"attention_mask": (torch.arange(longest) < lengths).long()}

    return collate
