"""Rows to tokens: which tokens the loss is on, what serving would see, and what is said about unusable rows."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qaa_serve.training import TrainingError
from qaa_serve.training.data import IGNORED, Examples, RowError, collate, encode_row, read_examples
from qaa_serve.training.rows import read_rows

TEMPLATE = """\
{%- if tools %}<t>{{ tools | length }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}<u>{{ message.content }}
{%- elif message.role == 'assistant' -%}<a>{{ message.content }}<e><n>
{%- else -%}{{ raise_exception('no role ' + message.role) }}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}<a>{%- endif -%}"""

#: Ends the answers in a conversation differently from the last one, as templates that drop reasoning do.
FORGETFUL = TEMPLATE.replace("<a>{{ message.content }}", "<a>{% if loop.last %}!{% endif %}{{ message.content }}")


def tokenizer(template: str | None = TEMPLATE, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a character, and <u> <a> <t> <n> as whole tokens; <b> is put before a plain prompt."""
    special = ["<p>", "<b>", "<e>", "<u>", "<a>", "<t>", "<n>"]
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocabulary = {token: number for number, token in enumerate([*special, *characters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.add_special_tokens(special)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<p>", bos_token="<b>", eos_token="<e>", chat_template=template
    )


def spell(row: object, **options: object) -> list[tuple[str, bool]]:
    """The row's tokens as text, each with whether the loss is on it."""
    tok = options.pop("tok", None) or tokenizer()
    ids, labels = encode_row(row, tok, **options)
    assert len(ids) == len(labels)
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    tokens = tok.convert_ids_to_tokens(ids)
    return [(token, label != IGNORED) for token, label in zip(tokens, labels, strict=True)]


def marked(quiet: str, loud: str) -> list[tuple[str, bool]]:
    """Tokens of two texts, whose special tokens are written <x>."""
    import re

    return [
        (token, on) for text, on in ((quiet, False), (loud, True)) for token in re.findall(r"<\w>|.", text, re.S)
    ]


def chat(*contents: str) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


class TestChat:
    def test_loss_is_on_the_answer_and_its_end(self) -> None:
        assert spell(chat("hi", "ok")) == [*marked("<u>hi<a>", "ok<e>"), *marked("<n>", "")]

    def test_nothing_is_put_before_the_template(self) -> None:
        # vLLM tokenises the rendered template without special tokens: <b> would come twice in many models.
        assert spell(chat("hi", "ok"))[0] == ("<u>", False)

    def test_every_answer_counts(self) -> None:
        assert spell(chat("a", "bc", "d", "e")) == [
            *marked("<u>a<a>", "bc<e>"),
            *marked("<n><u>d<a>", "e<e>"),
            *marked("<n>", ""),
        ]

    def test_or_only_the_last(self) -> None:
        row = chat("a", "bc", "d", "e")
        assert spell(row, answers="last") == [*marked("<u>a<a>bc<e><n><u>d<a>", "e<e>"), *marked("<n>", "")]

    def test_what_follows_the_last_answer_is_left_out(self) -> None:
        assert spell(chat("a", "b", "c")) == spell(chat("a", "b"))

    def test_prompt_is_what_serving_sees(self) -> None:
        tok = tokenizer()
        row = chat("a", "b", "c", "d")
        ids, labels = encode_row(row, tok, "last")
        served = tok.apply_chat_template(row["messages"][:3], add_generation_prompt=True, return_dict=False)
        start = next(i for i, label in enumerate(labels) if label != IGNORED)
        assert ids[:start] == served

    def test_tools_reach_the_template(self) -> None:
        tools = [{"type": "function", "function": {"name": name}} for name in "fg"]
        for given in (tools, json.dumps(tools), [tool["function"] for tool in tools]):
            assert spell({**chat("a", "b"), "tools": given})[:2] == marked("<t>2", "")

    def test_template_that_rewrites_earlier_answers(self) -> None:
        tok = tokenizer(FORGETFUL)
        with pytest.raises(RowError, match=r"before message 2 differently.*try --answers last"):
            encode_row(chat("a", "b", "c", "d"), tok)
        assert spell(chat("a", "b", "c", "d"), tok=tok, answers="last")[-4:-1] == marked("", "!d<e>")

    @pytest.mark.parametrize(
        ("messages", "problem"),
        [
            ([], "must be a list of messages, and not empty"),
            ("hi", "must be a list"),
            ([{"content": "x"}], "message 1 is no object with a 'role'"),
            ([{"role": "user", "content": "x"}], "no message of the role 'assistant'"),
            ([{"role": "user", "content": 3}], "'content' of message 1 must be a string"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "or a list of parts of the type 'text'"),
            ([{"from": "someone", "value": "x"}], "message 1 is from 'someone'; known are human"),
            ([{"from": ["human"], "value": "x"}], r"message 1 is from \['human'\]; known are human"),
            ([{"role": "assistant", "content": "x", "weight": 0}], "'assistant' with a weight above 0"),
            ([{"role": "assistant", "content": "x", "weight": 2}], "'weight' of message 1 must be 0 .* found 2"),
            ([{"role": "assistant", "tool_calls": [{"type": "function"}]}], "message 1 has no 'function' with a"),
            (
                [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
                "'arguments' of 'f' in message 1 must be a JSON object, or its text",
            ),
            ([{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}], "message 2. is empty"),
            (
                [{"role": "z", "content": "x"}, {"role": "assistant", "content": "y"}],
                "template refuses.*no role z",
            ),
        ],
    )
    def test_unusable(self, messages: object, problem: str) -> None:
        with pytest.raises(RowError, match=problem):
            encode_row({"messages": messages}, tokenizer())

    @pytest.mark.parametrize(
        ("more", "problem"),
        [
            ({"tools": "no list"}, "'tools' must be a list, or its JSON text"),
            ({"tools": [{}]}, "each of 'tools' must be an object with a 'function'"),
            ({"chat_template_kwargs": 3}, "'chat_template_kwargs' must be an object"),
            ({"chat_template_kwargs": {"tokenize": True}}, "may not set 'tokenize', which is no variable"),
            ({"chat_template_kwargs": {"add_generation_prompt": True}}, "may not set 'add_generation_prompt'"),
        ],
    )
    def test_unusable_beside_the_messages(self, more: dict[str, object], problem: str) -> None:
        with pytest.raises(RowError, match=problem):
            encode_row({**chat("a", "b"), **more}, tokenizer())

    def test_share_gpt(self) -> None:
        row = {
            "system": "s",
            "conversations": [{"from": who, "value": text} for who, text in (("human", "a"), ("gpt", "b"))],
        }
        tok = tokenizer(TEMPLATE.replace("message.role == 'user'", "message.role in ('system', 'user')"))
        messages = [{"role": "system", "content": "s"}, *chat("a", "b")["messages"]]
        assert spell(row, tok=tok) == spell({"messages": messages}, tok=tok)

    def test_answer_without_weight_is_not_learnt(self) -> None:
        row = chat("a", "bc", "d", "e")
        row["messages"][1]["weight"] = 0
        assert spell(row) == spell(row, answers="last") == spell(chat("a", "bc", "d", "e"), answers="last")
        row = chat("a", "bc", "d", "")  # what is not learnt may be empty
        row["messages"][3]["weight"] = 0
        assert spell(row) == spell(row, answers="last") == spell(chat("a", "bc"))

    def test_answer_that_merges_with_the_prompt_is_cut_at_the_text(self) -> None:
        """Under ChatML the line before an answer and a blank line that it begins with are one token."""
        from training_support import chatml_tokenizer

        tok = chatml_tokenizer()
        assert "ĊĊ" in tok.tokenize("assistant\n\n\nThere")
        ids, labels = encode_row(chat("Where?", "\n\nThere.", "And?", "On its way."), tok)
        for turn, said in ((1, "\n\nThere.<|im_end|>"), (3, "On its way.<|im_end|>")):
            answer = tok(said)["input_ids"]
            prompt = "".join(
                f"<|im_start|>{who}\n{text}<|im_end|>\n"
                for who, text in (("user", "Where?"), ("assistant", "\n\nThere."), ("user", "And?"))[:turn]
            )
            start = len(tok(prompt + "<|im_start|>assistant\n")["input_ids"]) + (
                turn > 1
            )  # one token more: the cut
            assert labels[start : start + len(answer)] == ids[start : start + len(answer)] == answer
            assert labels[start - 1] == labels[start + len(answer)] == IGNORED
        prompt = tok("<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        assert ids[: len(prompt)] == prompt

    @pytest.mark.parametrize("template", ["{% for", {"tool_use": TEMPLATE}])
    def test_template_that_cannot_be_read(self, template: Any) -> None:
        with pytest.raises(RowError, match="the chat template cannot be read: "):
            encode_row(chat("a", "b"), tokenizer(template))

    def test_needs_a_template(self) -> None:
        with pytest.raises(RowError, match="no chat template"):
            encode_row(chat("a", "b"), tokenizer(None))


class TestPromptAndCompletion:
    def test_special_tokens_are_those_of_a_served_prompt(self) -> None:
        tok = tokenizer()
        row = {"prompt": "ab", "completion": "cd"}
        assert spell(row) == marked("<b>ab", "cd<e>")
        assert encode_row(row, tok)[0][:3] == tok("ab")["input_ids"]
        assert spell(row, tok=tokenizer(bos=False)) == marked("ab", "cd<e>")

    def test_prompt_is_tokenised_by_itself(self) -> None:
        # "b" and "c" would become one token if prompt and completion were tokenised together.
        tok = tokenizer()
        state = json.loads(tok.backend_tokenizer.to_str())
        state["pre_tokenizer"] = None
        state["model"]["vocab"]["bc"] = len(state["model"]["vocab"])
        state["model"]["merges"] = [["b", "c"]]
        tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<e>")
        assert "bc" in tok.tokenize("abcd")
        assert spell({"prompt": "ab", "completion": "cd"}, tok=tok) == marked("<b>ab", "cd<e>")

    def test_end_is_not_doubled(self) -> None:
        assert spell({"prompt": "a", "completion": "b<e>"}) == marked("<b>a", "b<e>")

    @pytest.mark.parametrize("row", [{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": " \n"}])
    def test_empty_answer(self, row: dict[str, str]) -> None:
        with pytest.raises(RowError, match=r"completion.*is empty"):
            encode_row(row, tokenizer())

    def test_no_text(self) -> None:
        with pytest.raises(RowError, match="'prompt' must be a string, found list"):
            encode_row({"prompt": [1], "completion": "x"}, tokenizer())


class TestInstruction:
    def test_is_a_chat_where_there_is_a_template(self) -> None:
        row = {"instruction": "do", "input": "it", "output": "ok"}
        assert spell(row) == spell(chat("do\n\nit", "ok"))
        assert (
            spell({**row, "input": ""}) == spell({"instruction": "do", "output": "ok"}) == spell(chat("do", "ok"))
        )

    def test_is_plain_text_where_there_is_none(self) -> None:
        row = {"instruction": "do", "input": "it", "output": "ok"}
        prompt = "### Instruction:\ndo\n\nit\n\n### Response:\n"
        assert spell(row, tok=tokenizer(None)) == marked(f"<b>{prompt}", "ok<e>")


class TestFile:
    GOOD = '{"prompt": "a", "completion": "b"}'

    def write(self, path: Path, *lines: str | bytes) -> Path:
        path /= "rows.jsonl"
        path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
        return path

    def test_good_rows_and_digest(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, self.GOOD, "", json.dumps(chat("a", "b")), "")
        examples = read_examples(path, tokenizer(), max_length=20)
        assert len(examples) == 2
        assert examples[0] == {"input_ids": [1, 72, 73, 2], "labels": [IGNORED, IGNORED, 73, 2]}
        assert examples.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert examples.problems == ()

    def test_bad_rows_are_an_error_that_names_their_lines(self, tmp_path: Path) -> None:
        bad = ["{", "[1]", '{"text": "x"}', '{"prompt": "a", "completion": ""}', b'{"prompt": "\xff"}', "7", "8"]
        path = self.write(tmp_path, self.GOOD, "", *bad)
        with pytest.raises(TrainingError) as caught:
            read_examples(path, tokenizer(), max_length=20)
        message = str(caught.value).splitlines()
        assert message[0] == f"{path}: 7 of 8 rows cannot be used:"
        assert message[1].startswith("  line 3: no JSON")
        assert message[2] == "  line 4: a JSON object is needed, found a JSON list"
        assert message[3].startswith("  line 5: no known keys; known are messages or conversations;")
        assert message[3].endswith("found text")
        assert message[4].startswith("  line 6: the answer ('completion') is empty")
        assert message[5].startswith("  line 7: no JSON")
        assert message[6] == "  ... and 2 more"
        assert "--skip-bad-rows" in message[7]

    def test_bad_rows_are_reported_when_skipped(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "{", self.GOOD, "[]")
        examples = read_examples(path, tokenizer(), max_length=20, skip_bad_rows=True)
        assert len(examples) == 1
        assert [problem[:7] for problem in examples.problems] == ["line 1:", "line 3:"]

    def test_no_usable_row_is_an_error_in_any_case(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="no usable row"):
            read_examples(self.write(tmp_path, "{"), tokenizer(), max_length=20, skip_bad_rows=True)
        with pytest.raises(TrainingError, match="has no rows"):
            read_examples(self.write(tmp_path, ""), tokenizer(), max_length=20)

    def test_long_rows(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, '{"prompt": "abc", "completion": "defg"}', self.GOOD)
        examples = read_examples(path, tokenizer(), max_length=5)
        assert examples.shortened == 1
        assert examples[0]["labels"] == [IGNORED] * 4 + [75]
        with pytest.raises(TrainingError, match="line 1: its 9 tokens cut to 4 leave nothing of the answer"):
            read_examples(path, tokenizer(), max_length=4)

    def test_half_a_character_is_said(self, tmp_path: Path) -> None:
        path = self.write(
            tmp_path, self.GOOD, '{"prompt": "a", "completion": "b\\ud83d"}', json.dumps(chat("\ude00", "b"))
        )
        with pytest.raises(TrainingError) as caught:
            read_examples(path, tokenizer(), max_length=20)
        assert "line 2: its text has half a character ('\\ud83d'" in str(caught.value)
        assert "line 3: its text has half a character ('\\ude00'" in str(caught.value)

    def test_token_without_an_embedding_is_said(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, self.GOOD, '{"prompt": "a", "completion": "z"}')
        number = tokenizer().convert_tokens_to_ids("z")
        assert len(read_examples(path, tokenizer(), max_length=20, vocabulary=number + 1)) == 2
        with pytest.raises(
            TrainingError, match=f"line 2: its token 'z' has the number {number}, but .* for {number}"
        ):
            read_examples(path, tokenizer(), max_length=20, vocabulary=number)

    def test_keys_that_are_not_used_are_named(self, tmp_path: Path) -> None:
        talk = chat("a", "b")
        talk["messages"][0]["wieght"] = 0
        path = self.write(
            tmp_path, json.dumps({**talk, "prompt": "x"}), '{"prompt": "a", "completion": "b", "id": 1}'
        )
        assert read_examples(path, tokenizer(), max_length=20).unused == ("id", "messages.wieght", "prompt")

    def test_references_are_rows_of_their_own(self, tmp_path: Path) -> None:
        given = [
            {"prompt": "a", "references": ["b", "c", "b"]},
            {"prompt": "a", "completion": "d", "references": ["b", "d"]},
            {"instruction": "a", "references": ["b"], "output": None},
            {**chat("a"), "references": ["b", "c"]},
            {
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "d"}],
                "references": ["b"],
            },
        ]
        plain = [{"prompt": "a", "completion": answer} for answer in "bcdb"]
        plain += [chat("a", answer) for answer in "bbcdb"]
        examples = read_examples(self.write(tmp_path, *map(json.dumps, given)), tokenizer(), max_length=20)
        assert [row["input_ids"] for row in examples.rows] == [encode_row(row, tokenizer())[0] for row in plain]
        assert examples.unused == ()
        for wrong in ("b", [], [3]):
            path = self.write(tmp_path, json.dumps({"prompt": "a", "references": wrong}))
            with pytest.raises(TrainingError, match="'references' must be a list of strings, and not empty"):
                read_examples(path, tokenizer(), max_length=20)

    def test_unreadable(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"none\.jsonl cannot be read: No such file"):
            read_examples(tmp_path / "none.jsonl", tokenizer(), max_length=4)


CALLS = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"},
            {"role": "assistant", "content": "b", "tool_calls": [CALLS], "reasoning": "r", "weight": 1},
            {"role": "tool", "tool_call_id": "c", "content": "d"},
            {"role": "developer", "content": "e"},
            {"role": "assistant", "content": "f"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "g", "parameters": {}}}],
        "chat_template_kwargs": {"shout": "h"},
        "references": ["i"],
    },
    {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "a", "completion": "b", "references": ["c"]},
    {"instruction": "a", "input": "b", "output": "c", "references": ["d"]},
]


def distorted(value: Any) -> Iterator[Any]:
    """The value with each of its parts, and itself, replaced by something that does not belong there."""
    yield from (None, 0, 1.5, "", "\ud800", [], {}, [None], [[]], [{}], {"a": None}, True)
    if isinstance(value, dict):
        for key in value:
            yield {name: item for name, item in value.items() if name != key}
            yield from ({**value, key: item} for item in distorted(value[key]))
    elif isinstance(value, list):
        for place in range(len(value)):
            yield from ([*value[:place], item, *value[place + 1 :]] for item in distorted(value[place]))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(row)))
@pytest.mark.parametrize("template", ["TOOLS", "PARTS"])
def test_no_row_ends_in_a_traceback(row: Any, template: str, tmp_path: Path) -> None:
    import training_support

    tok = training_support.chatml_tokenizer(getattr(training_support, template))
    path = tmp_path / "rows.jsonl"
    rows = [row, *distorted(row)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    examples = read_examples(path, tok, max_length=4096, skip_bad_rows=True)
    assert len(rows) / 10 < len(examples.problems) < len(rows)
    assert len(read_rows(str(path), tok, skip_bad_rows=True).rows) == len(examples)


def test_batch_is_padded_to_its_longest_row() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
        {"input_ids": [8], "labels": [8]},
    ]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


class TestSources:
    PAIRS = ({"prompt": "a", "completion": "b"}, {"prompt": "5", "completion": "10"})

    def write(self, path: Path) -> Path:
        if path.suffix == ".csv":
            path.write_text('prompt,completion,note\n"a",b,\n5,10,x\n')
        elif path.suffix == ".parquet":
            import pandas

            pandas.DataFrame(self.PAIRS).to_parquet(path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(self.PAIRS, indent=1))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.PAIRS))
        return path

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
    def test_all_kinds_of_files_give_the_same_rows(self, tmp_path: Path, suffix: str) -> None:
        path = self.write(tmp_path / f"rows{suffix}")
        examples = read_examples(path, tokenizer(), max_length=20)
        expected = [encode_row(row, tokenizer()) for row in self.PAIRS]
        assert [(row["input_ids"], row["labels"]) for row in examples.rows] == expected
        assert examples.digest == hashlib.sha256(path.read_bytes()).hexdigest()

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_texts_in_other_dress(self, tmp_path: Path, suffix: str, encoding: str, packed: bool) -> None:
        text = self.write(tmp_path / f"plain{suffix}").read_text()
        content = ("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding)
        path = tmp_path / (f"rows{suffix}.gz" if packed else f"rows{suffix}")
        path.write_bytes(gzip.compress(content) if packed else content)
        rows = read_examples(path, tokenizer(), max_length=20).rows
        assert rows == read_examples(tmp_path / f"plain{suffix}", tokenizer(), max_length=20).rows

    def test_rows_within_an_object(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        path.write_text(json.dumps({"version": 1, "data": self.PAIRS}, indent=1))
        assert len(read_examples(path, tokenizer(), max_length=20)) == 2
        path.write_text(json.dumps(self.PAIRS[0], indent=1))
        assert len(read_examples(path, tokenizer(), max_length=20)) == 1

    def test_long_field_of_a_csv(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        path.write_text(f"prompt,completion\n{'a' * 200_000},b\n")
        assert len(read_examples(path, tokenizer(), max_length=300_000).rows[0]["input_ids"]) == 200_003

    def test_directory_is_a_data_set_and_a_split_may_follow(self, tmp_path: Path) -> None:
        """As a name on the hub would be read: through ``datasets``."""
        directory = tmp_path / "set"
        directory.mkdir()
        self.write(directory / "train.parquet")
        (directory / "test.parquet").write_bytes((directory / "train.parquet").read_bytes())
        assert len(read_examples(directory, tokenizer(), max_length=20)) == 2
        half = read_examples(f"{directory}:test[:1]", tokenizer(), max_length=20)
        assert half.rows[0]["input_ids"] == encode_row(self.PAIRS[0], tokenizer())[0]
        assert len(half) == 1
        assert half.digest != read_examples(directory, tokenizer(), max_length=20).digest

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("rows.csv", "prompt,completion\na,b\nc\n", "line 3: the first line names 2 columns, this row"),
            ("rows.csv", 'prompt,completion\n"a\nb",c\n,d\n', "line 4: no known keys"),
            ("rows.csv", b"prompt,completion\na,\xff\n", "it is not UTF-8: see line 2"),
            ("rows.json", '[{"prompt": "a", "completion": "b"}, 3]', "row 2: a JSON object is needed"),
            ("rows.parquet", "no parquet", "rows.parquet' cannot be read: "),
            ("rows.jsonl.gz", "no gzip", "rows.jsonl.gz cannot be read: Not a gzipped file"),
            # Without the time of day, which would give each of pytest's workers another name for the test.
            ("rows.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:20], "rows.jsonl.gz cannot be read: Compressed"),
            ("rows.jsonl", b"\xff\xfe\x00", "rows.jsonl cannot be read: 'utf-16-le' codec"),
        ],
    )  # fmt: skip
    def test_bad_rows_are_named_by_their_place(
        self, tmp_path: Path, name: str, content: str | bytes, said: str
    ) -> None:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(TrainingError) as caught:
            read_examples(path, tokenizer(), max_length=20)
        assert said in str(caught.value)

    @pytest.mark.parametrize("name", ["/nowhere/rows", "./rows", "a/b/c", "rows.txt"])
    def test_what_is_no_file_and_no_name_on_the_hub(self, name: str) -> None:
        with pytest.raises(TrainingError, match="there is no such file"):
            read_examples(name, tokenizer(), max_length=20)

    def test_data_set_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"data 'owner/name:train' cannot be read: "):
            read_examples("owner/name:train", tokenizer(), max_length=20)
        (tmp_path / "set").mkdir()
        self.write(tmp_path / "set" / "train.parquet")
        with pytest.raises(TrainingError, match=r"cannot be read: .*nope"):
            read_examples(f"{tmp_path / 'set'}:nope", tokenizer(), max_length=20)


class TestPacking:
    def test_rows_fill_packs_in_order_of_length_and_keep_their_positions(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        rows = [{"prompt": "x" * n, "completion": "y" * n} for n in (1, 2, 3, 1)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        plain = read_examples(path, tokenizer(), max_length=12)
        packed = plain.packed(12)
        sizes = sorted(len(row["input_ids"]) for row in plain.rows)
        assert sizes == [4, 4, 6, 8]
        assert [len(row["input_ids"]) for row in packed.rows] == [12, 10]
        assert packed.rows[0]["position_ids"] == [*range(8), *range(4)]
        assert packed.source_rows == 4
        assert packed.tokens == plain.tokens
        assert packed.answer_tokens == plain.answer_tokens

    @pytest.mark.timeout(60)
    def test_many_rows(self) -> None:
        """In time about linear; a search through all packs would take hours."""
        rows = [{"input_ids": [7] * n, "labels": [7] * n} for n in range(1, 101) for _ in range(2000)]
        packed = Examples("x", rows, "", (), (), 0, len(rows)).packed(128)
        sizes = [len(row["input_ids"]) for row in packed.rows]
        assert sum(sizes) == sum(range(1, 101)) * 2000
        assert max(sizes) <= 128
        assert len(sizes) < 1.02 * sum(sizes) / 128

    def test_no_row_is_asked_for_the_next_ones_first_token(self, tmp_path: Path) -> None:
        """Without a start token the first token of an answer can be the first of its row."""
        path = tmp_path / "rows.jsonl"
        path.write_text('{"prompt": "", "completion": "ab"}\n' * 2)
        packed = read_examples(path, tokenizer(bos=False), max_length=12).packed(12)
        assert packed.rows[0]["labels"][3] == IGNORED

    def test_padding_is_a_row_of_its_own(self) -> None:
        rows = [
            {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "position_ids": [0, 1, 0]},
            {"input_ids": [8], "labels": [8], "position_ids": [0]},
        ]
        batch = collate(rows)
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
        assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
        assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORED, IGNORED]]
        assert "attention_mask" not in batch
