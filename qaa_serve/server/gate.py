"""What stands before vLLM's app: rights, limits, and the hold on a request's adapter.

One ASGI middleware sees every request first. It lets a request through when its key may make it, holds the
revision that its model names until the response has been sent, and says 429 or 503 when it cannot be served now.
"""

from __future__ import annotations

import asyncio
import ipaddress
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import msgspec
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from qaa_serve.registry import Catalogue, Revision, UnavailableError, UnknownAdapterError
from qaa_serve.server.keys import ClientKey, KeyRing
from qaa_serve.server.metrics import TOKEN_KINDS, Observation, Outcome, ServerMetrics

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class Role(Enum):
    """Who may call a route."""

    ANYONE = "anyone"
    CLIENT = "client"
    ADMIN = "admin"


#: Routes that say how the server is, and its documentation. They name adapters at most.
_OPEN = {"/health", "/ready", "/ping", "/version", "/metrics", "/docs", "/redoc", "/openapi.json", "/load"}

#: Beginnings of paths that clients call. Everything else is for admins: vLLM has routes that stop its engine.
_FOR_CLIENTS = (
    "/v1/", "/v2/", "/inference/", "/cohere/", "/tokenize", "/detokenize", "/pooling", "/classify", "/score",
    "/rerank", "/invocations", "/generative_scoring", "/derender",
)  # fmt: skip

#: Beginnings of paths that would be clients' but change what is served.
_FOR_ADMINS = (
    "/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/inference/v1/abort_requests",
)  # fmt: skip

#: Where vLLM takes the model of its route /invocations from, whatever the body says.
_INVOCATIONS_MODEL = "x-amzn-sagemaker-adapter-identifier"


def role_of(path: str) -> Role:
    """Who may call the route of a path."""
    if path in _OPEN or path.startswith(("/metrics/", "/docs/", "/static/")):
        return Role.ANYONE
    if path.startswith(_FOR_CLIENTS) and not path.startswith(_FOR_ADMINS):
        return Role.CLIENT
    return Role.ADMIN


@dataclass
class Use:
    """What a request asked for, as the routes behind the gate see it.

    Attributes:
        asked: the model the request names, as name or name@revision; None if it names none.
        key: the client's key; None if there are none.
        revision: the adapter's revision that is held for it; None for the base model.
        observation: what times it; None if it names no model that is served.
    """

    asked: str | None
    key: ClientKey | None
    revision: Revision | None = None
    observation: Observation | None = None

    @property
    def key_name(self) -> str | None:
        """What the client's key is called in metrics; None if there are none."""
        return None if self.key is None else self.key.name

    def may_use(self, model: str) -> bool:
        """Whether the client may use a model."""
        return self.key is None or self.key.allows(model)


#: The request that this task answers; None outside of requests.
current_use: ContextVar[Use | None] = ContextVar("current_use", default=None)


class RefusedError(Exception):
    """A request that is not let through.

    Attributes:
        status: the HTTP status.
        message: why, and what to do.
        headers: of the response.
    """

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> JSONResponse:
        """In the form that OpenAI's clients read."""
        return error_response(self.status, self.message, self.headers)


_TYPES = {
    400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError",
    409: "ConflictError", 413: "RequestTooLargeError", 415: "BadRequestError", 422: "UnprocessableEntityError",
    429: "RateLimitError",
}  # fmt: skip


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in the form of OpenAI's API."""
    kind = _TYPES.get(status, "ServiceUnavailableError")
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(body, status, headers)


class Turns:
    """Who may run now, by model: so many requests at once, so many more that wait in the order they came.

    A model with more requests than the engine has seats would otherwise fill the engine's one queue, and every
    other model's requests would stand behind them.
    """

    def __init__(self, max_running: int, max_waiting: int):
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.running: dict[str, int] = defaultdict(int)
        self._waiting: dict[str, deque[asyncio.Future[None]]] = defaultdict(deque)

    def waiting(self, name: str) -> int:
        """Requests for a model that wait."""
        return len(self._waiting.get(name, ()))

    def names(self) -> list[str]:
        """Models with requests that run or wait; none waits for one that none runs for."""
        return list(self.running)

    def counts(self, name: str) -> tuple[int, int]:
        """A model's requests: running, waiting. Asking changes nothing, from another thread either."""
        return self.running.get(name, 0), self.waiting(name)

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait until a request for a model may run; it runs until the context ends.

        Raises:
            RefusedError: with 429 if too many wait already.
        """
        if self.running[name] >= self.max_running:
            queue = self._waiting[name]
            if len(queue) >= self.max_waiting:
                raise RefusedError(
                    429,
                    f"{name!r} has {self.running[name]} requests running and {len(queue)} waiting, which is its "
                    "limit: try again later",
                    Retry_After="1",
                )
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            queue.append(mine)
            try:
                await mine  # whoever ends hands its turn over, so `running` stays as it is
            except asyncio.CancelledError:
                if mine.done() and not mine.cancelled():
                    self._end(name)
                elif mine in queue:  # not if a turn that ended has passed it over already
                    queue.remove(mine)
                raise
        else:
            self.running[name] += 1
        try:
            yield
        finally:
            self._end(name)

    def _end(self, name: str) -> None:
        queue = self._waiting.get(name)
        while queue:
            following = queue.popleft()
            if not following.done():
                following.set_result(None)
                return
        self.running[name] -= 1
        if not self.running[name]:
            del self.running[name]
            self._waiting.pop(name, None)


class _ModelField(msgspec.Struct):
    """The one field of a request's body that matters here; the others are skipped unread."""

    model: str | None = None


_decode_model = msgspec.json.Decoder(_ModelField).decode


class Gate:
    """The middleware; see the module's docstring."""

    def __init__(
        self,
        app: App,
        *,
        catalogue: Catalogue,
        keys: KeyRing,
        turns: Turns,
        metrics: ServerMetrics,
        base_names: Sequence[str],
        max_body_bytes: int,
        max_upload_bytes: int,
        request_log: Callable[[dict[str, Any]], None] | None = None,
    ):
        """Stand before an app.

        Args:
            app: what requests are let through to.
            catalogue: the adapters.
            keys: who may do what.
            turns: who may run now.
            metrics: where requests are counted and timed.
            base_names: the base model's names; its requests are counted under the first.
            max_body_bytes: of a request.
            max_upload_bytes: of an upload.
            request_log: told of every request of a client when it has ended.
        """
        self.draining = False
        self.in_flight = 0
        self.turns = turns
        self._app = app
        self._root_path = getattr(app, "root_path", "")  # FastAPI takes it off a path before it looks for a route
        self._catalogue = catalogue
        self._metrics = metrics
        self._keys = keys
        self._base_names = base_names
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_upload_bytes
        self._request_log = request_log
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Let no new request through and wait until those that are have ended; False if time ran out."""
        self.draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self._idle.is_set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let it through."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        root_path = self._root_path or scope.get("root_path", "")
        path = get_route_path({"path": scope["path"], "root_path": root_path})
        role = role_of(path)
        preflight = scope.get("method") == "OPTIONS"  # browsers ask without a key; nothing is done
        if role is Role.ANYONE or preflight:
            await self._app(scope, receive, send)
            return
        self.in_flight += 1
        self._idle.clear()
        try:
            await self._guarded(role, path, scope, receive, send)
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    async def _guarded(self, role: Role, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        if "x-request-id" not in Headers(scope=scope):  # vLLM's id of the request, and in the log
            scope["headers"] = [*scope["headers"], (b"x-request-id", uuid.uuid4().hex.encode())]
        exchange = _Exchange(receive, send)
        use = Use(None, None)
        outcome: Outcome = "server_error"
        try:
            use.key = self._check_rights(role, scope)
            self._check_open()
            async with AsyncExitStack() as stack:
                exchange.admitted = await self._admit(stack, use, role, path, scope, receive)
                token = current_use.set(use)
                try:
                    await self._app(scope, exchange.receive, exchange.send)
                finally:
                    current_use.reset(token)
            outcome = exchange.outcome(use)
        except RefusedError as refusal:
            outcome = "rejected" if refusal.status in (429, 503) else "client_error"
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.message[:120]})
            elif exchange.status is None:
                await refusal.response()(scope, receive, send)
        except _ClientGoneError:
            outcome = "aborted"
        except asyncio.CancelledError:
            outcome = "aborted"
            raise
        finally:
            if role is Role.CLIENT and scope.get("method") == "POST":
                # What was refused before its model was known counts under none.
                seen = use.observation or self._metrics.begin(None, path, use.key_name)
                seen.end(outcome)
                if self._request_log is not None:
                    self._request_log(_log_fields(use, seen, scope, exchange.status, outcome))

    async def _admit(
        self, stack: AsyncExitStack, use: Use, role: Role, path: str, scope: Scope, receive: Receive
    ) -> Receive:
        """Read a request's body; take a client's turn and adapter. Returns what the app receives from."""
        if scope["type"] == "websocket":
            if role is Role.CLIENT:  # they name their model later, and can only have the base model
                self._check_model(use)
            return receive
        headers = Headers(scope=scope)
        if role is Role.ADMIN and headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return _limited(receive, headers, self._max_upload_bytes)
        body = await _read_body(_limited(receive, headers, self._max_body_bytes))
        if role is Role.CLIENT and scope["method"] == "POST":
            in_header = path.startswith("/invocations")
            use.asked = (headers.get(_INVOCATIONS_MODEL) if in_header else _model_of(body)) or None
            await self._enter(stack, use, path, receive)
        return _replaying(body, receive)

    async def _enter(self, stack: AsyncExitStack, use: Use, path: str, receive: Receive) -> None:
        """Wait for the request's turn and take hold of its adapter, both until the stack is closed."""
        model = use.asked
        asks_base = model is None or model in self._base_names
        name = self._check_model(use)
        if not asks_base and self._catalogue.resolve(str(model)) is None:
            return  # vLLM answers that there is no such model
        use.observation = self._metrics.begin(name, path, use.key_name)
        await _unless_gone(receive, stack.enter_async_context(self.turns.turn(name)))
        use.observation.has_turn()
        if asks_base:
            return
        try:
            use.revision = await stack.enter_async_context(self._catalogue.use(str(model)))
        except UnknownAdapterError:
            return  # removed while the request waited
        except UnavailableError as error:
            raise RefusedError(503, str(error), Retry_After="5") from error

    def _check_model(self, use: Use) -> str:
        """The name that a request is counted under; refuses it if its key may not use that."""
        asks_base = use.asked is None or use.asked in self._base_names
        name = self._base_names[0] if asks_base else str(use.asked).partition("@")[0]
        if not use.may_use(name):
            raise RefusedError(403, f"this key may not use the model {use.asked or name!r}")
        return name

    def _check_open(self) -> None:
        if self.draining:
            raise RefusedError(503, "the server is shutting down", Retry_After="10", Connection="close")
        if not self._catalogue.ready:
            raise RefusedError(503, "the server is still loading its adapters", Retry_After="5")

    def _check_rights(self, role: Role, scope: Scope) -> ClientKey | None:
        headers = Headers(scope=scope)
        token = _bearer(headers)
        if role is Role.CLIENT:
            if not self._keys.guards_clients:
                return None
            if (key := self._keys.client(token)) is None:
                self._metrics.wrong_key("client")
                raise RefusedError(401, _KEY_NEEDED.format("an API key"), WWW_Authenticate="Bearer")
            return key
        if self._keys.guards_admins:
            if not self._keys.is_admin(token):
                self._metrics.wrong_key("admin")
                known = self._keys.client(token) is not None
                raise RefusedError(
                    403 if known else 401,
                    "this key is a client's; the route needs the admin key" if known
                    else _KEY_NEEDED.format("the admin key"),
                    **({} if known else {"WWW_Authenticate": "Bearer"}),
                )  # fmt: skip
        elif not _from_this_machine(scope, headers):
            raise RefusedError(
                403,
                "the server has no admin key, so it takes admin requests only from its own machine, without a "
                "proxy or a web page between: start it with --admin-key-file or QAA_SERVE_ADMIN_KEY",
            )
        return None


_KEY_NEEDED = "{} is needed: send the header 'Authorization: Bearer <key>'"


def _log_fields(use: Use, seen: Observation, scope: Scope, status: int | None, outcome: Outcome) -> dict[str, Any]:
    """One line of the request log; times in seconds."""
    return {
        "request_id": Headers(scope=scope).get("x-request-id"),
        "endpoint": seen.labels[1],
        "model": use.asked,
        "adapter": None if use.revision is None else use.revision.name,
        "revision": None if use.revision is None else use.revision.revision,
        "outcome": outcome,
        "status": status,
        **{f"{kind}_tokens": seen.tokens[kind] for kind in TOKEN_KINDS},
        "seconds": round(seen.seconds, 6),
        "waited_seconds": round(seen.turn_s, 6),
        "first_token_seconds": None if seen.first_token_s is None else round(seen.first_token_s, 6),
    }


class _Exchange:
    """A request's messages and its response's, and how it ended."""

    def __init__(self, receive: Receive, send: Send):
        self.admitted = receive
        self.status: int | None = None
        self._send = send
        self._complete = False
        self._gone = False

    async def receive(self) -> Message:
        """What the app receives."""
        message = await self.admitted()
        if message["type"] == "http.disconnect" and not self._complete:
            self._gone = True
        return message

    async def send(self, message: Message) -> None:
        """What the app sends."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = not self._gone
        await self._send(message)

    def outcome(self, use: Use) -> Outcome:
        """How a request that the app has answered has ended."""
        if self.status is None or not self._complete:
            return "aborted"
        if self.status >= 500 or (use.observation is not None and use.observation.failed):
            return "server_error"
        return "client_error" if self.status >= 400 else "success"


class _ClientGoneError(Exception):
    """The client has closed the connection."""


def _bearer(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    # Anthropic's clients send their key in a header of its own.
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


#: Headers that a proxy adds.
_OF_PROXIES = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")


def _from_this_machine(scope: Scope, headers: Headers) -> bool:
    """Whether a request comes straight from a program on this machine.

    Not so if a proxy passed it on, or a web page in a browser here sent it: to another host's name that leads
    here, or from another origin.
    """
    client, server = scope.get("client"), scope.get("server")
    # A TCP connection that its client has reset already has no client either; a unix socket alone has no port.
    by_file = client is None and server is not None and server[1] is None
    if not by_file and (client is None or not is_loopback(client[0])):
        return False
    if any(name in headers for name in _OF_PROXIES):
        return False
    host = headers.get("host", "")
    if not by_file and not is_loopback(_without_port(host)):
        return False
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == host


def _without_port(host: str) -> str:
    """The name or address of a Host header."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).strip("[]")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address stands for this machine."""
    try:
        address = ipaddress.ip_address(host)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback
    except ValueError:
        return host == "localhost"


def _limited(receive: Receive, headers: Headers, limit: int) -> Receive:
    """Receive no more than so many bytes of a body."""
    refusal = RefusedError(413, f"the request's body has more than the {limit:,} bytes that are taken")
    with suppress(ValueError):
        if int(headers.get("content-length", "0")) > limit:
            raise refusal
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise refusal
        return message

    return receive_limited


async def _read_body(receive: Receive) -> bytes:
    """A request's whole body."""
    chunks = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGoneError
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(chunks)


def _model_of(body: bytes) -> str | None:
    """The model that a body names; None if it names none or is no JSON, about which its route complains."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_model(body).model
    return None


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Receive the body that was read already, and then what comes."""
    left: deque[Message] = deque([{"type": "http.request", "body": body}])

    async def replay() -> Message:
        return left.popleft() if left else await receive()

    return replay


async def _unless_gone(receive: Receive, turn: Awaitable[None]) -> None:
    """Wait for a turn, unless the client goes away meanwhile."""
    tasks: list[asyncio.Future[Any]] = [waiting := asyncio.ensure_future(turn)]
    try:
        await asyncio.sleep(0)
        if not waiting.done():
            tasks.append(asyncio.ensure_future(receive()))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise _ClientGoneError
        waiting.result()
    finally:
        for task in tasks:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
