"""Conversations of a data set, in the form in which vLLM hands a request's messages to the chat template.

A template's text depends on more than the words: on whether an absent content is "" or None, on arguments being an
object or text, on keys that vLLM fills in or drops. Only the same form gives the same prompt.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from qaa_serve.training.sources import RowError

#: The keys that hold a conversation: as OpenAI has it, and as ShareGPT has it.
CONVERSATION_KEYS = ("messages", "conversations")

#: The keys of a message that count, ShareGPT's two last.
MESSAGE_KEYS = frozenset(
    ("role", "content", "name", "weight", "tool_calls", "tool_call_id", "reasoning", "reasoning_content")
) | {"tools", "from", "value"}

#: What ShareGPT's ``from`` says -> role.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}

_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Conversation:
    """A conversation as a chat template gets it.

    Attributes:
        messages: in order.
        learnt: places in ``messages`` of the assistant's messages that the loss may be on.
        tools: their descriptions; None: none are given.
        variables: of the template, besides.
    """

    messages: list[dict[str, Any]]
    learnt: list[int]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]

    def render(self, tokenizer: PreTrainedTokenizerBase, end: int, *, asks: bool) -> str:
        """The text of the messages before ``end``, with the start of the next answer if that is asked for.

        Raises:
            RowError: if the template refuses them.
        """
        messages = self.messages[:end]
        if not re.search(r"""["']developer["']""", tokenizer.get_chat_template(tools=self.tools)):
            messages = _without_developer(messages)
        try:
            text: str = tokenizer.apply_chat_template(
                messages,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=asks,
                **self.variables,
            )
        except Exception as error:  # templates raise what they like
            raise RowError(f"the chat template refuses it: {error}") from error
        return text


def conversation(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Conversation:
    """The conversation of a row.

    Args:
        row: has one of ``CONVERSATION_KEYS``, and may have ``system``, ``tools`` and ``chat_template_kwargs``.
        tokenizer: has a chat template.

    Raises:
        RowError: if it is none, or none of its answers is to be learnt.
    """
    tools = _tools(row.get("tools"))
    try:
        in_parts = wants_parts(tokenizer.get_chat_template(tools=tools))
    except Exception as error:  # a template that is no Jinja, or several of which none is the default
        raise RowError(f"the chat template cannot be read: {error}") from error
    given = messages_of(row)
    if row.get("system"):
        given = [{"role": "system", "content": row["system"]}, *given]
    messages, learnt = [], []
    for number, message in enumerate(given, start=1):
        texts = _texts(message, number)
        messages.append(_message(message, number, texts, in_parts=in_parts))
        if message["role"] == "assistant" and _weight(message, number):
            learnt.append(number - 1)
            if not message.get("tool_calls") and not any(text.strip() for text in texts):
                raise RowError(f"the answer (message {number}) is empty")
    if not learnt:
        heavy = " with a weight above 0" if any(message["role"] == "assistant" for message in messages) else ""
        raise RowError(f"there is no message of the role 'assistant'{heavy}")
    return Conversation(messages, learnt, tools, _variables(row.get("chat_template_kwargs")))


def conversation_key(row: Mapping[str, Any]) -> str | None:
    """The key that a row's conversation is under; None: it is no conversation."""
    return next((key for key in CONVERSATION_KEYS if key in row), None)


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages as they are given, with the keys ``role`` and ``content``.

    Raises:
        RowError: if there are none, or one has no role.
    """
    key = conversation_key(row)
    given = row.get(key) if key else None
    if not isinstance(given, list) or not given:
        raise RowError(f"{key!r} must be a list of messages, and not empty")
    return [_with_role(message, number) for number, message in enumerate(given, start=1)]


def _with_role(message: object, number: int) -> dict[str, Any]:
    if isinstance(message, dict) and "role" not in message and "from" in message:
        if not isinstance(message["from"], str) or message["from"] not in _ROLES:
            raise RowError(f"message {number} is from {message['from']!r}; known are {', '.join(_ROLES)}")
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": _ROLES[message["from"]], "content": message.get("value"), **rest}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError(f"message {number} is no object with a 'role'")
    return message


def _message(message: Mapping[str, Any], number: int, texts: list[str], *, in_parts: bool) -> dict[str, Any]:
    role = message["role"]
    parts = [{"type": "text", "text": text} for text in texts]
    made: dict[str, Any] = {"role": role, "content": parts if in_parts and role != "tool" else "\n".join(texts)}
    if role == "assistant":
        if message.get("tool_calls"):
            made["tool_calls"] = _tool_calls(message["tool_calls"], number)
        for key in ("reasoning", "reasoning_content"):
            if message.get(key) is not None:
                made["reasoning"] = made["reasoning_content"] = message[key]
                break
    if role == "tool" and message.get("tool_call_id") is not None:
        made["tool_call_id"] = message["tool_call_id"]
    if role == "developer":
        made["tools"] = message.get("tools")
    if isinstance(message.get("name"), str):
        made["name"] = message["name"]
    return made


def _texts(message: Mapping[str, Any], number: int) -> list[str]:
    """The texts of a message's content: one of a string, several of a list of parts, none beside tool calls."""
    content = message.get("content")
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return []
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        if all(isinstance(part, dict) and part.get("type") in _TEXT_PARTS for part in parts):
            texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
            if len(texts) == len(parts):
                return texts
    raise RowError(f"the 'content' of message {number} must be a string or a list of parts of the type 'text'")


def _weight(message: Mapping[str, Any], number: int) -> bool:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise RowError(f"the 'weight' of message {number} must be 0 (not learnt) or 1, found {weight!r}")
    return weight != 0


def _tool_calls(calls: object, number: int) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"the 'tool_calls' of message {number} must be a list of objects")
    made = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"a tool call of message {number} has no 'function' with a 'name'")
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        arguments = _parsed(function.get("arguments") or {})
        if not isinstance(arguments, dict):
            raise RowError(
                f"the 'arguments' of {function['name']!r} in message {number} must be a JSON object, or its text"
            )
        made.append(
            {**identity, "function": {"arguments": arguments, "name": function["name"]}, "type": "function"}
        )
    return made


def _tools(tools: object) -> list[dict[str, Any]] | None:
    """Tools as vLLM's request has them: with a description and parameters in any case, None without."""
    tools = _parsed(tools or None)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RowError("'tools' must be a list, or its JSON text")
    made = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("each of 'tools' must be an object with a 'function' that has a 'name'")
        filled = {key: function.get(key) for key in ("name", "description", "parameters")}
        if function.get("strict") is not None:
            filled["strict"] = function["strict"]
        made.append({"type": "function", "function": filled})
    return made


def _parsed(value: object) -> object:
    """The value of JSON text, or what is no text as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _variables(given: object) -> dict[str, Any]:
    if given is None:
        return {}
    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    if not isinstance(given, dict):
        raise RowError("'chat_template_kwargs' must be an object")
    for name in given:
        if name in taken and name != "documents":
            raise RowError(f"'chat_template_kwargs' may not set {name!r}, which is no variable of the template")
    return given


def _without_developer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For a template that does not know the developer: what developer and system say, as the first message."""
    if all(message["role"] != "developer" for message in messages):
        return messages
    instructions = [message for message in messages if message["role"] in ("developer", "system")]
    if len(instructions) == 1 and messages[0] is instructions[0]:
        content = messages[0]["content"]
    else:
        content = "\n\n".join(filter(None, map(text_of, instructions)))
    rest = [message for message in messages if message not in instructions]
    return [{"role": "system", "content": content}, *rest]


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message's content, of parts one a line; empty where there is none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


@lru_cache
def wants_parts(template: str) -> bool:
    """Whether a chat template loops over a message's content, for which vLLM gives it a list of parts."""
    tree = _compile_jinja_template(template).environment.parse(template)
    macros = list(tree.find_all(nodes.Macro))
    in_macros = {id(loop) for macro in macros for loop in macro.find_all(nodes.For)}
    if any(
        _is_content(loop.iter) or (id(loop) not in in_macros and _named(loop.iter, "content"))
        for loop in tree.find_all(nodes.For)
    ):
        return True
    # A macro that is called with the content loops over its own name for it.
    for macro in macros:
        calls = [call for call in tree.find_all(nodes.Call) if _named(call.node, macro.name)]
        names = {name.name for call in calls for name, arg in zip(macro.args, call.args, strict=False)
                 if _is_content(arg)}  # fmt: skip
        names |= {keyword.key for call in calls for keyword in call.kwargs if _is_content(keyword.value)}
        if any(_named(loop.iter, name) for loop in macro.find_all(nodes.For) for name in names):
            return True
    return False


def _named(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _is_content(node: Any) -> bool:
    """Whether an expression is the ``content`` of something, filtered or sliced or not."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    if isinstance(node, nodes.Getattr):
        return bool(node.attr == "content")
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"
