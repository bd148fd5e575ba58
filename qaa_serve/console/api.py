"""The server's API, with the keys of one browser tab."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

#: The two files of an adapter, by the parts of the form that uploads them.
ADAPTER_FILES = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}

#: A change is answered when it is durable in the source; an upload is checked and loaded before.
_CHANGE_TIMEOUT_S = 600.0

#: An answer may wait for its turn and for its adapter to be loaded.
_ANSWER_TIMEOUT_S = 300.0

#: How long a list of models is taken for the current one: it is asked for at every keystroke.
_MODELS_AGE_S = 5.0


class ApiError(Exception):
    """The server refused, or does not answer.

    Attributes:
        status: the answer's HTTP status; 0 if there was none.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Connection:
    """How to reach a server: clients' routes at one address, admins' perhaps at another."""

    def __init__(self, url: str, admin_url: str):
        """Connect to nothing yet.

        Args:
            url: http://HOST:PORT or unix:PATH.
            admin_url: the same, of the admin routes.
        """
        self.url = url
        self.clients, self.admins = _make_client(url), _make_client(admin_url)

    async def metrics(self) -> str:
        """The text of /metrics.

        Raises:
            ApiError: if the server does not answer with it.
        """
        return (await _send(self.clients, "GET", "/metrics", None, timeout=10.0)).text

    async def close(self) -> None:
        """Close all connections."""
        await self.clients.aclose()
        await self.admins.aclose()


@dataclass(frozen=True)
class Piece:
    """What came of a streamed answer.

    Attributes:
        seconds: since the request was sent.
        text: what was added.
        tokens: generated in all; with the last piece alone.
        revision: of the adapter that answers, if it is one.
    """

    seconds: float
    text: str = ""
    tokens: int | None = None
    revision: str | None = None


class Api:
    """Requests with a client's and an admin's key, as far as there are any."""

    def __init__(self, connection: Connection, client_key: str = "", admin_key: str = ""):
        self._connection = connection
        self._client_key, self._admin_key = client_key, admin_key
        self._models: tuple[float, list[str]] | None = None

    @property
    def is_admin(self) -> bool:
        """Whether an admin's key was given; the server says whether it is one."""
        return bool(self._admin_key)

    async def check(self) -> None:
        """Ask the server whether it takes the keys that were given.

        Raises:
            ApiError: if it does not.
        """
        if self._client_key:
            await self.models()
        if self._admin_key:
            await self.adapters(limit=1)

    async def models(self) -> list[str]:
        """Names that the client's key may ask for: base model, adapters, aliases."""
        if self._models is None or time.monotonic() - self._models[0] > _MODELS_AGE_S:
            answer = await self._ask("GET", "/v1/models")
            self._models = time.monotonic(), [card["id"] for card in answer["data"]]
        return self._models[1]

    async def may_see(self, name: str) -> bool:
        """Whether a key was given that may see an adapter of this name."""
        if not self.is_admin:
            return name in await self.models()
        with suppress(ApiError):
            await self.adapter(name)
            return True
        return False

    async def adapters(self, **params: str | int | None) -> dict[str, Any]:
        """A page of the adapters: `q`, `state`, `limit`, `after` as GET /v1/adapters takes them."""
        given = {key: value for key, value in params.items() if value not in (None, "")}
        return await self._ask("GET", "/v1/adapters", params=given)

    async def adapter(self, name: str) -> dict[str, Any]:
        """One adapter with its history."""
        return await self._ask("GET", f"/v1/adapters/{quote(name, safe='')}")

    async def change(
        self, method: str, path: str, *, if_match: str | None = None, **request: Any
    ) -> dict[str, Any]:
        """Make a change.

        Args:
            method: of HTTP.
            path: of the route.
            if_match: only if this revision is served.
            request: `json`, `params` or `files` of the request.
        """
        headers = {} if if_match is None else {"If-Match": f'"{if_match}"'}
        return await self._ask(method, path, headers=headers, timeout=_CHANGE_TIMEOUT_S, **request)

    async def upload(self, name: str, directory: Path, if_match: str | None) -> dict[str, Any]:
        """Put the adapter of a directory under a name, in place of a revision or, None, where there is none."""
        headers = {"If-None-Match": "*"} if if_match is None else {"If-Match": f'"{if_match}"'}
        path = f"/v1/adapters/{quote(name, safe='')}"
        with ExitStack() as stack:
            files = {
                part: stack.enter_context((directory / file).open("rb")) for part, file in ADAPTER_FILES.items()
            }
            return await self._ask("PUT", path, headers=headers, timeout=_CHANGE_TIMEOUT_S, files=files)

    async def aliases(self) -> list[dict[str, Any]]:
        """All aliases."""
        return list((await self._ask("GET", "/v1/aliases"))["data"])

    async def audit(self, name: str) -> dict[str, Any] | None:
        """The newest line of the audit log for an adapter or alias."""
        lines = (await self._ask("GET", "/v1/audit", params={"adapter": name, "limit": 1}))["data"]
        return lines[0] if lines else None

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[Piece]:
        """A chat completion as it comes.

        Args:
            body: of POST /v1/chat/completions.
        """
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        start = time.perf_counter()
        try:
            async with self._connection.clients.stream(
                "POST", "/v1/chat/completions", json=asked, headers=_bearer(self._client_key),
                timeout=_ANSWER_TIMEOUT_S,
            ) as response:  # fmt: skip
                if not response.is_success:
                    await response.aread()
                    raise _error_of(response)
                revision = response.headers.get("x-qaa-revision")
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:  # the answer had begun
                        raise ApiError(0, str(event["error"].get("message")))
                    text = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
                    usage = event.get("usage") or {}
                    yield Piece(time.perf_counter() - start, text, usage.get("completion_tokens"), revision)
        except httpx.HTTPError as error:
            raise ApiError(0, f"the server does not answer: {str(error) or type(error).__name__}") from error

    async def _ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        is_client = path == "/v1/models"
        connection = self._connection.clients if is_client else self._connection.admins
        key = self._client_key if is_client else self._admin_key
        response = await _send(connection, method, path, key, **request)
        return dict(response.json())


def _make_client(url: str) -> httpx.AsyncClient:
    unix = url.startswith("unix:")
    return httpx.AsyncClient(
        base_url="http://localhost" if unix else url,
        transport=httpx.AsyncHTTPTransport(uds=url.removeprefix("unix:")) if unix else None,
        timeout=30.0,
        limits=httpx.Limits(max_connections=200),
        trust_env=False,  # a proxy would see the keys, and is not on the way to one's own server
    )


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


async def _send(
    client: httpx.AsyncClient, method: str, path: str, key: str | None,
    headers: Mapping[str, str] | None = None, **request: Any,
) -> httpx.Response:  # fmt: skip
    try:
        response = await client.request(method, path, headers={**_bearer(key), **(headers or {})}, **request)
    except httpx.HTTPError as error:
        raise ApiError(0, f"the server does not answer: {str(error) or type(error).__name__}") from error
    if not response.is_success:
        raise _error_of(response)
    return response


def _error_of(response: httpx.Response) -> ApiError:
    message = " ".join(response.text[:300].split())
    with suppress(ValueError, KeyError, TypeError):
        message = str(response.json()["error"]["message"])
    return ApiError(response.status_code, message or response.reason_phrase)
