"""A request as a command and as a program, without keys."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

#: What openai's client takes as arguments; all else goes into `extra_body`.
_OF_OPENAI = {"model", "messages", "temperature", "top_p", "max_tokens", "seed", "response_format"}


def to_curl(url: str, bodies: Sequence[Mapping[str, Any]]) -> str:
    """A curl command for each body of POST /v1/chat/completions."""
    return "\n\n".join(
        f"curl -sN {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'  -H "Authorization: Bearer $QAA_KEY" \\\n  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}'
        for body in bodies
    )


def to_python(url: str, bodies: Sequence[Mapping[str, Any]]) -> str:
    """A program with openai's client that asks all models the same."""
    models = [body["model"] for body in bodies]
    shared = {key: value for key, value in bodies[0].items() if key != "model"}
    extra = {key: value for key, value in shared.items() if key not in _OF_OPENAI}
    arguments = [f"{key}={value!r}" for key, value in shared.items() if key in _OF_OPENAI]
    if extra:
        arguments.append(f"extra_body={extra!r}")
    listed = "".join(f"        {argument},\n" for argument in arguments)
    return (
        "import os\n\nfrom openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{url}/v1", api_key=os.environ.get("QAA_KEY", "none"))\n'
        f"for model in {models!r}:\n"
        "    answer = client.chat.completions.create(\n"
        f"        model=model,\n{listed}"
        "    )\n    print(model, answer.choices[0].message.content)\n"
    )
