"""The server's API, with the keys of one browser tab."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

#: Seconds to wait at most. A change is answered when it is durable in the source, an upload checked and loaded
#: before; an answer may wait for its turn and for its adapter.
_LOOK_S, _CHANGE_S, _ANSWER_S = 30.0, 600.0, 300.0

#: How long a list of models is taken for the current one: it is asked for at every keystroke.
_MODELS_AGE_S = 5.0


class ApiError(Exception):
    """The server refused, or does not answer: then the status is 0."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def connect(url: str) -> httpx.AsyncClient:
    """A client of http://HOST:PORT or unix:PATH, not connected yet."""
    unix = url.startswith("unix:")
    return httpx.AsyncClient(
        base_url="http://localhost" if unix else url,
        transport=httpx.AsyncHTTPTransport(uds=url.removeprefix("unix:")) if unix else None,
        timeout=_LOOK_S,
        limits=httpx.Limits(max_connections=200),
        trust_env=False,  # a proxy would see the keys, and is not on the way to one's own server
    )


@dataclass
class Api:
    """Requests with a client's and an admin's key, as far as there are any. All raise ApiError.

    Attributes:
        clients: to the server's routes for clients.
        admins: to those for admins, which may be elsewhere.
        client_key: of a client; "": none.
        admin_key: of an admin; "": none.
    """

    clients: httpx.AsyncClient
    admins: httpx.AsyncClient
    client_key: str = ""
    admin_key: str = ""
    _models: tuple[float, list[str]] | None = field(default=None, init=False)

    @property
    def is_admin(self) -> bool:
        """Whether an admin's key was given; the server says whether it is one."""
        return bool(self.admin_key)

    async def metrics(self) -> str:
        """The text of /metrics."""
        async with _answer(self.clients, "", "GET", "/metrics", timeout=10.0) as response:
            return (await response.aread()).decode()

    async def models(self) -> list[str]:
        """Names that the client's key may ask for: base model, adapters, aliases."""
        if self._models is None or time.monotonic() - self._models[0] > _MODELS_AGE_S:
            async with _answer(self.clients, self.client_key, "GET", "/v1/models") as response:
                cards = json.loads(await response.aread())["data"]
            self._models = time.monotonic(), [card["id"] for card in cards]
        return self._models[1]

    async def admin(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """What an admin's route answers; all methods but GET may take minutes."""
        timeout = _LOOK_S if method == "GET" else _CHANGE_S
        async with _answer(self.admins, self.admin_key, method, path, timeout=timeout, **request) as response:
            return dict(json.loads(await response.aread()))

    async def adapter(self, name: str) -> dict[str, Any]:
        """One adapter with its history."""
        return await self.admin("GET", adapter_path(name))

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[tuple[str, int | None, str | None]]:
        """A chat completion as it comes.

        Args:
            body: of POST /v1/chat/completions.

        Yields:
            What was added; how many tokens were generated, with the last piece alone; the revision that answers.
        """
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        to = (self.clients, self.client_key, "POST", "/v1/chat/completions")
        async with _answer(*to, json=asked, timeout=_ANSWER_S) as response:
            revision = response.headers.get("x-qaa-revision")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:  # the answer had begun
                    raise ApiError(0, str(event["error"].get("message")))
                text = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
                yield text, (event.get("usage") or {}).get("completion_tokens"), revision


def adapter_path(name: str, action: str = "") -> str:
    """The route of an adapter, or of what is done to it."""
    return f"/v1/adapters/{quote(name, safe='')}" + (f"/{action}" if action else "")


@asynccontextmanager
async def _answer(
    client: httpx.AsyncClient, key: str, method: str, path: str, **request: Any
) -> AsyncIterator[httpx.Response]:
    """An answer that is no refusal, its body to be read."""
    auth = {"Authorization": f"Bearer {key}"} if key else {}
    request["headers"] = {**request.get("headers", {}), **auth}
    try:
        async with client.stream(method, path, **request) as response:
            if not response.is_success:
                await response.aread()
                message = " ".join(response.text[:300].split())
                with suppress(ValueError, KeyError, TypeError):
                    message = str(response.json()["error"]["message"])
                raise ApiError(response.status_code, message or response.reason_phrase)
            yield response
    except httpx.HTTPError as error:
        raise ApiError(0, f"the server does not answer: {str(error) or type(error).__name__}") from error
