"""What fuzz.py draws its requests from: the client routes of vLLM 0.32, their fields, and values for each field.

In each list the first half is sensible, and most requests keep to it: else all would be refused for something.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# fmt: off
NAN, INFINITY = float("nan"), float("inf")
LONG = "t7 " * 400
FLAGS = [True, False]

TEXTS = [
    "Hello", "t4 t5 t6", "Say A or B: ", '{"a": 1', "t9 t8 t7 t6 t5 t4 t3", "a", "</s>", "A" * 60, "{{ 7 * 7 }}",
    "", " ", "\n\n", "<s> <unk>", "\x00", "\ud800", "\ufeff\u202e",
    "e\u0301\u200d\U0001f469\u200d\U0001f467", LONG,
]
IDS = [
    [5, 6, 7], [9], [0], [1, 2], [98], [5, 5, 7] * 20, [7] * 120, [5] * 200,
    [159], [160], [-1], [2**31], [2**63], [10**30], [], [5] * 255, [5] * 300, [True], [1.5], ["5"],
]
COUNTS = [0, 1, 2, 3, 5, 8, 20, -1, -2, 160, 161, 2**31, 2**63, 10**30, 1.5]
SHARES = [1, 0.9, 0.5, 0.1, 1e-9, 0, 2, -1, 1e-320, 1e308, NAN, INFINITY]
WEIGHTS = [0, 1, 0.5, 0.01, 2, 1.5, -1, -2, 1e-9, 1e-320, 1e308, -1e308, NAN, INFINITY, -INFINITY]
LENGTHS = [1, 2, 8, 8, 16, 16, 30, 60, 200, None, 0, -1, 255, 256, 257, 10**6, 2**63, 1.5]
#: In the place of any value, now and then.
JUNK = [
    None, True, -1, 10**30, NAN, "", "x", "\ud800", [], {}, [None], [[]], {"": None}, [{"type": "x"}], "x" * 5000,
]

#: Of which some requests have one.
HEADERS = [
    {"X-Request-Id": "same"}, {"X-Session-Id": "same"}, {"X-Request-Id": "x" * 3000}, {"X-Session-Id": ""},
    {"X-data-parallel-rank": "0"}, {"X-data-parallel-rank": "7"}, {"X-data-parallel-rank": "-1"},
    {"X-data-parallel-rank": "x"}, {"X-Vllm-Priority": "1"}, {"X-Vllm-Priority": "9" * 30},
    {"endpoint-load-metrics-format": "JSON"},
    {"endpoint-load-metrics-format": "x"}, {"traceparent": "00-x"}, {"X-Amzn-SageMaker-Session-Id": "x"},
    {"X-Amzn-SageMaker-Adapter-Identifier": "one"}, {"X-Amzn-SageMaker-Adapter-Identifier": "nobody"},
    {"Content-Type": "text/plain"}, {"Content-Type": ""}, {"Accept": "text/event-stream"},
    {"Content-Encoding": "gzip"},
]

SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {}, {"type": "integer"},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, {"enum": ["A", 5, None]}, {"type": "string"},
    {"type": "string", "pattern": "^[ab]+$"}, {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 5}]},
    {"type": "object", "additionalProperties": {"$ref": "#"}}, {"$ref": "#/nowhere"}, {"enum": []}, {"type": "x"},
    {"type": "string", "pattern": "(?=a)b"}, {"type": "string", "minLength": 9, "maxLength": 1}, {"const": None},
    True,
    {"type": "number", "minimum": 5, "maximum": 1}, {"not": {}}, {"allOf": []}, {"minimum": NAN}, "", "{", [],
    {"type": "object", "patternProperties": {"(": {}}}, {"type": "integer", "multipleOf": 0},
]
REGEXES = [
    "t[0-9]+", "(a|b){2,4}", ".*", "\\d{1,3}", "(a+)+$", "[a-c]?", "\\w+ \\w+", "a*b+",
    "[", "", "(?=x)", "\\d{3,1}", "\\p{L}+", "a{100000}", "(", "\x00", "^$", "(?P<a>b)\\1",
]
GRAMMARS = [
    'root ::= "t5" | "t6"', 'root ::= "a" root | ""', "start: /a/", "root ::= root", "", "x", "root ::=",
    "root ::= x",
]
TAGS = [
    {"type": "structural_tag", "structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}], "triggers": ["<"]},
    {"type": "structural_tag", "format": {"type": "const_string", "value": "t5"}}, {"type": "structural_tag"},
    {"type": "structural_tag", "structures": [], "triggers": []},
    {"type": "structural_tag", "format": {"type": "x"}},
]
STRUCTURED = [
    *({"json": schema} for schema in SCHEMAS[:9]), *({"regex": regex} for regex in REGEXES[:5]),
    {"json_object": True},
    *({"grammar": grammar} for grammar in GRAMMARS[:3]),
    *({"structural_tag": json.dumps(tag)} for tag in TAGS[:2]),
    {"choice": ["t5", "t6"]}, {"choice": ["a", "a"]}, {"json": {}, "disable_any_whitespace": True},
    *({"json": schema} for schema in SCHEMAS[9:]), *({"regex": regex} for regex in REGEXES[5:]),
    {"json_object": False},
    *({"grammar": grammar} for grammar in GRAMMARS[3:]),
    *({"structural_tag": json.dumps(tag)} for tag in TAGS[2:]),
    *({"choice": choice} for choice in ([], [""], ["\x00"], ["x" * 3000])), {}, {"json": {}, "regex": "a"},
]
FORMATS = [
    {"type": "text"}, {"type": "json_object"}, *TAGS[:2],
    *({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}} for schema in SCHEMAS),
    *TAGS[2:], {"type": "json_schema"}, {"type": "x"}, {},
]

PARTS = [
    {"type": "text", "text": "t5 t6"}, {"type": "text", "text": "Hello"}, {"type": "text", "text": "\x00"},
    {"type": "text"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, {"type": "x"}, {}, "t5",
    {"type": "image_url", "image_url": {"url": "file:///dev/null"}}, {"type": "image_url", "image_url": None},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, {"type": "refusal", "refusal": "t5"},
    {"type": "video_url", "video_url": {"url": "x"}}, {"type": "tool_result", "tool_use_id": "x", "content": "t5"},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
    {"type": "tool_use", "id": "x", "name": "look", "input": {}}, {"type": "thinking", "thinking": "t5"},
]
CALL = {"id": "x", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TURNS = [
    {"role": "assistant", "content": "t6 t7"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "x", "content": "t5"},
    {"role": "assistant", "content": "", "reasoning": "t5"},
    {"role": "developer", "content": "t5"}, {"role": "tool", "content": "t5"}, {"role": "user", "content": []}, {},
    {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "look", "arguments": "{"}}]},
    {"role": "user"},
    {"role": "x", "content": "t5"}, {"content": "t5"}, *({"role": "user", "content": [part]} for part in PARTS),
]
CONVERSATIONS = [
    *([{"role": "user", "content": text}] for text in TEXTS[:9]),
    *([{"role": "system", "content": "t5"}, {"role": "user", "content": text}] for text in TEXTS[:9]),
    *([{"role": "user", "content": "Hello"}, turn] for turn in TURNS[:4]),
    *([{"role": "user", "content": [part]}] for part in PARTS[:2]),
    *([{"role": "user", "content": text}] for text in TEXTS[9:]), [], *([turn] for turn in TURNS),
]
FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
TOOLS = [
    [{"type": "function", "function": FUNCTION}],
    [{"type": "function", "function": {**FUNCTION, "strict": True}}] * 2,
    [{"type": "function", **FUNCTION}], [{"name": "look", "input_schema": FUNCTION["parameters"]}], [],
    *([{"type": "function", "function": {"name": "look", "parameters": schema}}] for schema in SCHEMAS),
    [{"type": "function"}], [{"type": "x"}], [{"type": "web_search"}], [{"name": "look", "input_schema": {}}],
]
TOOL_CHOICES = [
    "none", "auto", "required", {"type": "function", "function": {"name": "look"}},
    {"type": "function", "name": "look"}, {"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "look"},
    {"type": "function", "function": {"name": "x"}}, "x",
]
XARGS = [{}, {"a": 1}, {"a": ["b", 2.5]}, {"a": None}, {"kv_transfer_params": "x"}, {"ec_transfer_params": 5}]
TRANSFER = [{}, {"do_remote_decode": True, "do_remote_prefill": True, "remote_host": "x"}, {"a": [1]}]

#: A field's name and what is drawn for it. Fields of all routes that sample.
SAMPLING: Mapping[str, Sequence[Any]] = {
    "temperature": WEIGHTS, "top_p": SHARES, "top_k": COUNTS, "min_p": SHARES, "seed": COUNTS,
    "n": [1, 2, 3, 5, 0, -1, 100, 2**40],
    "presence_penalty": WEIGHTS, "frequency_penalty": WEIGHTS, "repetition_penalty": SHARES,
    "length_penalty": WEIGHTS,
    "best_of": COUNTS, "use_beam_search": FLAGS, "stop": ["a", ["b", "c"], ["t5", "\n"], [], *TEXTS[9:]],
    "stop_token_ids": IDS, "include_stop_str_in_output": FLAGS, "ignore_eos": FLAGS, "min_tokens": COUNTS,
    "logit_bias": [
        {"5": 100, "6": -100}, {"98": -5.5}, {}, {"2": 100}, {"159": 1}, {"160": 1}, {"-1": 1}, {"x": 1},
        {"5": NAN},
        {"5": 1e308}, {"5": -INFINITY},
    ],
    "allowed_token_ids": IDS, "bad_words": [["a"], ["t5 t6", "nobody"], [], [""], ["\x00"], [" " * 50], [LONG]],
    "prompt_logprobs": COUNTS, "logprob_token_ids": IDS, "skip_special_tokens": FLAGS, "add_special_tokens": FLAGS,
    "spaces_between_special_tokens": FLAGS, "truncate_prompt_tokens": [-1, 1, 5, 100, 0, 256, 10**6, -2, 2**63],
    "truncation_side": ["left", "right", "x"], "response_format": FORMATS, "structured_outputs": STRUCTURED,
    "priority": [0, 1, -1, 2**63], "request_id": ["same", "", "\x00", LONG],
    "cache_salt": ["salt", "", "\ud800", LONG],
    "return_tokens_as_token_ids": FLAGS, "return_token_ids": FLAGS, "kv_transfer_params": TRANSFER, "user": TEXTS,
    "ec_transfer_params": TRANSFER, "vllm_xargs": XARGS, "stream_interval": [1, 2, 100, 0, 2**63],
    "watermarking": FLAGS,
    "repetition_detection": [{}, {"max_pattern_size": 2, "min_count": 2},
    {"max_pattern_size": -1, "min_count": 0}],
    "thinking_token_budget": COUNTS, "routed_experts_prompt_start": COUNTS, "session_id": TEXTS,
    "stream_options": [{"include_usage": True}, {"continuous_usage_stats": True, "include_usage": True}, {},
    {"x": 1}],
    "mm_payload": ["tensors", "none", "x"], "return_token_offsets": FLAGS,
}
CHATTING: Mapping[str, Sequence[Any]] = {
    "logprobs": FLAGS, "top_logprobs": COUNTS, "max_tokens": LENGTHS, "tools": TOOLS, "tool_choice": TOOL_CHOICES,
    "parallel_tool_calls": FLAGS, "reasoning_effort": ["none", "low", "x"], "include_reasoning": FLAGS,
    "echo": FLAGS,
    "add_generation_prompt": FLAGS, "continue_final_message": FLAGS,
    "documents": [[{"title": "t5", "text": "t6"}], [{}], []],
    "chat_template": ["{% for a in range(3) %}t5 {% endfor %}", *TEXTS, "{{ messages[9].x.y }}", "{% if"],
    "chat_template_kwargs": [
        {}, {"enable_thinking": True}, {"messages": []}, {"add_generation_prompt": 1}, {"tokenize": True},
    ],
    "media_io_kwargs": [{}, {"image": {}}, {"x": {"y": 1}}], "mm_processor_kwargs": [{}, {"x": 1}],
    "return_prompt_text": FLAGS,
}
STREAMED = {"stream": [True, True, False]}
PROMPTS = [
    *TEXTS[:9], *IDS[:8], TEXTS[:3], [[5, 6], [7]], *TEXTS[9:], *IDS[8:], [[]], [[5], []], ["", "t5"], [[160]],
    [[5], [-1]], None,
]
QUESTIONS = [
    {"q": {"type": kind, "instructions": "t5", "criteria": criteria}}
    for kind in ("choice", "boolean", "score", "x")
    for criteria in (["t5", "t6"], {"t5": "t6", "t7": None}, None, [], "t5", {"a": {"b": 1}}, ["a"] * 30)
]


@dataclass(frozen=True)
class Route:
    """A route of clients.

    Attributes:
        path: of the route.
        share: of the requests, in parts.
        needed: fields that are in every body but the worst.
        others: fields of which some are.
        ends: how one of the last lines of its streams begins; nothing if it has none.
    """

    path: str
    share: int
    needed: Mapping[str, Sequence[Any]]
    others: Mapping[str, Sequence[Any]]
    ends: tuple[str, ...] = ()


ROUTES = [
    Route(
        "/v1/completions", 10,
        {"prompt": PROMPTS, "max_tokens": LENGTHS},
        {
            **SAMPLING, **STREAMED, "echo": FLAGS, "logprobs": COUNTS, "suffix": TEXTS,
            "prompt_embeds": ["", "AAAA", [], ["AAAA"]],
        },
        ("data: [DONE]",),
    ),
    Route(
        "/v1/chat/completions", 10,
        {"messages": CONVERSATIONS, "max_completion_tokens": LENGTHS},
        {**SAMPLING, **STREAMED, **CHATTING},
        ("data: [DONE]",),
    ),
    Route(
        "/v1/chat/completions/batch", 3,
        {
            "messages": [[CONVERSATIONS[0]] * 2, CONVERSATIONS[:5], *([talk] for talk in CONVERSATIONS), []],
            "max_tokens": LENGTHS,
        },
        {**SAMPLING, **CHATTING, "stream": [False, True]},
    ),
    Route(
        "/v1/responses", 5,
        {"input": [*TEXTS[:9], *CONVERSATIONS, *TEXTS[9:]], "max_output_tokens": LENGTHS},
        {
            **SAMPLING, **STREAMED, "instructions": TEXTS, "tools": TOOLS, "tool_choice": TOOL_CHOICES,
            "store": FLAGS,
            "background": [False, True], "previous_response_id": ["resp_x", ""], "top_logprobs": COUNTS,
            "max_tool_calls": COUNTS, "include": [["message.output_text.logprobs"], ["x"], []],
            "truncation": ["auto", "disabled", "x"], "text": [{"format": format} for format in FORMATS],
            "reasoning": [{"effort": "low"}, {}, {"effort": "x"}], "prompt": [{"id": "x"}],
            "metadata": [{}, {"a": "b"}], "service_tier": ["auto", "x"],
        },
        ("event: response.completed", "event: response.incomplete", "event: response.failed"),
    ),
    Route(
        "/v1/messages", 5,
        {"messages": CONVERSATIONS, "max_tokens": LENGTHS},
        {
            **SAMPLING, **STREAMED, "system": [*TEXTS, [{"type": "text", "text": "t5"}]], "tools": TOOLS,
            "stop_sequences": [["t5"], ["a", "b"], [""], []], "tool_choice": TOOL_CHOICES,
            "metadata": [{}, {"user_id": "x"}], "thinking": [{"type": "enabled"}],
            "output_config": [{"format": format} for format in FORMATS],
            "chat_template_kwargs": CHATTING["chat_template_kwargs"],
        },
        ("event: message_stop", "event: error"),
    ),
    Route("/v1/messages/count_tokens", 2, {"messages": CONVERSATIONS}, {"system": TEXTS, "tools": TOOLS}),
    Route("/tokenize", 2, {"prompt": TEXTS}, {"add_special_tokens": FLAGS, "return_token_strs": FLAGS}),
    Route("/tokenize", 2, {"messages": CONVERSATIONS}, {**CHATTING, "return_token_strs": FLAGS}),
    Route("/detokenize", 2, {"tokens": IDS}, {"x": JUNK}),
    Route(
        "/generative_scoring", 3,
        {
            "query": [*TEXTS[:9], *IDS, *TEXTS[9:]],
            "items": [["t5", "t6"], [[5], [6, 7]], ["t5"] * 40, [[5, 6]], [], [""], [[]], [[160]]],
            "label_token_ids": IDS,
        },
        {
            "apply_softmax": FLAGS, "item_first": FLAGS, "add_special_tokens": FLAGS, "priority": [0, 1],
            "cache_salt": TEXTS,
        },
    ),
    Route(
        "/v1/systemone", 1,
        {"state": [*TEXTS, {"a": 1}, [1]], "questions": QUESTIONS},
        {
            "instructions": TEXTS, "images": [["x"], ["data:image/png;base64,AAAA"]], "cache_salt": TEXTS,
            "priority": [0, 1],
        },
    ),
    Route(
        "/invocations", 1,
        {"prompt": PROMPTS, "max_tokens": LENGTHS},
        {**SAMPLING, **STREAMED, "echo": FLAGS},
        ("data: [DONE]",),
    ),
    Route("/v1/responses/resp_x/cancel", 1, {}, {}),
]


@dataclass(frozen=True)
class Known:
    """What breaks a rule, is vLLM's own answer, and harms nobody but who asks.

    Attributes:
        what: words of the finding.
        asked: words that are all in the request: its path and its body.
        reason: how it comes about.
    """

    what: str
    asked: tuple[str, ...]
    reason: str


KNOWN = [
    Known("structured decision API", ("/v1/systemone",),
    "vLLM knows no way to answer /v1/systemone with this model"),
    *(
        Known("Internal server error", (field,), "no token that is allowed continues what the structure asks for")
        for field in ("structured_outputs", "response_format", '"format"', '"tools"')
    ),
    Known("has no attribute 'get'", ('"structured_outputs": ',), "structured_outputs that is no object"),
    *(
        Known('"message": ""', (extra,), "vllm_xargs with a name of vLLM's own")
        for extra in ('"kv_transfer_params": "x"', '"ec_transfer_params": 5')
    ),
    Known(
        "2 validation errors for ChatCompletionStreamResponse", ("/v1/messages",),
        "/v1/messages has words of its own for any error in a stream",
    ),
    Known('"message": ""', ('"echo": true',), "an echo of a prompt in which no token has a text"),
    Known("maximum recursion depth", ("[[[[",), "lists in lists, deeper than Python's JSON reads"),
    Known(
        "peer closed connection", ("/v1/responses", '"stream": true'),
        "/v1/responses breaks a stream off, instead of an error in it, where the engine refuses what is asked for",
    ),
]
