"""What is trained is what is served: the tokens of a conversation are those of vLLM's ``/tokenize``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

from training_support import CHATML, PARTS, TOOLS, chatml_tokenizer, make_chat_base
from vllm.config import ModelConfig, VllmConfig
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
from vllm.renderers.hf import _detect_content_format
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.renderers.registry import renderer_from_config

from qaa_serve.training.chat import wants_parts
from qaa_serve.training.data import IGNORED, encode_row, read_examples

ASKS = {"role": "user", "content": "Where is my parcel?"}
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    one = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [one], **more}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[int]]:
    """(template, request) -> the tokens that ``/tokenize`` answers with, by the function that it calls."""
    renderers: dict[str, OnlineRenderer] = {}

    def tokenize(template: str, **request: Any) -> list[int]:
        if template not in renderers:
            base = make_chat_base(tmp_path_factory.mktemp("models") / "base", chatml_tokenizer(template))
            config = ModelConfig(str(base), dtype="float32")
            config.max_model_len = 4096
            renderers[template] = OnlineRenderer(
                config,
                renderer_from_config(VllmConfig(model_config=config)),
                request_logger=None,
                chat_template=None,
                chat_template_content_format="auto",
            )
        parsed = TokenizeChatRequest.model_validate_json(json.dumps(request))
        tools = None if parsed.tools is None else [tool.model_dump() for tool in parsed.tools]
        _, (made,) = asyncio.run(
            renderers[template].preprocess_chat(parsed, parsed.messages, None, "auto", None, tool_dicts=tools)
        )
        return list(made["prompt_token_ids"])

    return tokenize


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "arguments as text": (TOOLS, {"messages": [ASKS, call('{"city": "Paris", "at": null}', content="Wait.")]}),
    "no content": (TOOLS, {"messages": [ASKS, call("{}", content=None)]}),
    "no content at all": (TOOLS, {"messages": [ASKS, call("{}")]}),
    "no arguments": (TOOLS, {"messages": [ASKS, call("", content="")]}),
    "result of a tool": (
        TOOLS,
        {
            "messages": [
                ASKS,
                call("{}"),
                {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Sun."}]},
                {"role": "assistant", "content": "Sun."},
            ]
        },
    ),
    "empty tool calls": (TOOLS, {"messages": [ASKS, {"role": "assistant", "content": "x", "tool_calls": []}]}),
    "tool without a description": (
        TOOLS,
        {
            "messages": [ASKS, {"role": "assistant", "content": "Sun."}],
            "tools": [{"type": "function", "function": WEATHER}],
        },
    ),
    "tool with more than vLLM knows": (
        TOOLS,
        {
            "messages": [ASKS, {"role": "assistant", "content": "Sun."}],
            "tools": [{"type": "function", "function": {"strict": True, "name": "f", "author": "me"}, "cost": 1}],
        },
    ),
    "names and reasoning": (
        TOOLS,
        {"messages": [{**ASKS, "name": "Ann"}, {"role": "assistant", "content": "x", "reasoning": "Hm."}]},
    ),
    "variables of the template": (
        TOOLS,
        {
            "messages": [ASKS, {"role": "assistant", "content": "SUN"}],
            "chat_template_kwargs": {"shout": "OI", "unheard": 1},
        },
    ),
    "parts": (
        CHATML,
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Where is"}, {"type": "text", "text": "it?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "There."}]},
            ]
        },
    ),
    "a string for a template that takes parts": (
        PARTS,
        {"messages": [{"role": "user", "content": " Where? "}, {"role": "assistant", "content": "There."}]},
    ),
    "developer": (
        CHATML,
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "developer", "content": "Be kind."},
                ASKS,
                {"role": "assistant", "content": "There."},
            ]
        },
    ),
    "answer that begins with a blank line": (
        CHATML,
        {"messages": [ASKS, {"role": "assistant", "content": "\n\nThere."}]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_that_are_served(served: Callable[..., list[int]], case: str) -> None:
    template, row = CASES[case]
    tokenizer = chatml_tokenizer(template)
    ids, labels = encode_row(row, tokenizer, "last")
    start = next(place for place, label in enumerate(labels) if label != IGNORED)
    asked = {**row, "messages": row["messages"][:-1]}
    assert ids[:start] == served(template, **asked)
    whole = served(template, **row, add_generation_prompt=False)
    assert tokenizer.decode(ids) == tokenizer.decode(whole)
    if "blank line" not in case:  # where the prompt merges with the answer
        assert ids == whole


def test_what_parquet_fills_in_is_left_out_again(served: Callable[..., list[int]], tmp_path: Path) -> None:
    """Parquet gives every row of a column the same keys: what one row alone has is null in the others."""
    import pandas

    other = {
        "name": "time",
        "description": "Tells it.",
        "parameters": {"properties": {"zone": {"type": "string"}}},
    }
    rows = [
        {"messages": [ASKS, call({"city": "Paris"})], "tools": [{"type": "function", "function": WEATHER}]},
        {
            "messages": [{**ASKS, "name": "Ann"}, {"role": "assistant", "content": "Noon.", "weight": 1}],
            "tools": [{"type": "function", "function": other}],
        },
        {"messages": [ASKS, call({"zone": "CET"}, content="Wait.")], "tools": None},
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    read = read_examples(tmp_path / "rows.parquet", chatml_tokenizer(TOOLS), max_length=4096)
    for row, made in zip(rows, read.rows, strict=True):
        as_text = json.loads(json.dumps(row))
        for message in as_text["messages"]:
            for one in message.get("tool_calls", ()):
                one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
        assert made["input_ids"] == served(TOOLS, **as_text, add_generation_prompt=False)


@pytest.mark.parametrize(
    "loop",
    [
        "{% for p in m.content %}{{ p.text }}{% endfor %}",
        "{% for p in m['content'] | list %}{{ p.text }}{% endfor %}",
        "{% for p in m.content[1:] %}{{ p.text }}{% endfor %}",
        "{% set content = m.content %}{% for p in content %}{{ p.text }}{% endfor %}",
        "{{ show(m.content) }}",
        "{{ show(it=m.content) }}",
        "{{ show(m.role) }}",
        "{{ m.content }}",
        "{% for c in m.tool_calls %}{{ c.id }}{% endfor %}{{ m.content | trim }}",
    ],
)
def test_templates_that_take_parts_are_told_as_vllm_tells_them(loop: str) -> None:
    macro = "{% macro show(it) %}{% for p in it %}{{ p }}{% endfor %}{% endmacro %}"
    template = f"{macro}{{% for m in messages %}}{loop}{{% endfor %}}"
    assert wants_parts(template) == (_detect_content_format(template, default="string") == "openai")
