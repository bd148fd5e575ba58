"""What stands before vLLM's app: one ASGI middleware that sees every request first.

A request is let through when its key may make it. It then holds its seats and the revision that its model names
until its response has been sent. What cannot be served is refused here, in the form that OpenAI's clients read.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from typing import Any, TypeAlias

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders

from qaa_serve.adapters import DIGEST_PATTERN
from qaa_serve.registry import AmbiguousRevisionError, Catalogue, UnavailableError, UnknownAdapterError
from qaa_serve.server.asgi import App, ClientGoneError, Message, Receive, Scope, Send
from qaa_serve.server.bodies import MULTIPART, Asked, Bodies, asked_by, media_type
from qaa_serve.server.context import RequestContext, current_request
from qaa_serve.server.drain import Drain
from qaa_serve.server.errors import RefusedError, unknown_route
from qaa_serve.server.metrics import Outcome, ServerMetrics
from qaa_serve.server.request_log import RequestLog
from qaa_serve.server.rights import Rights, Role, address_of, role_of
from qaa_serve.server.turns import Turns

#: Says whom a request is made for, so that an alias with shares always leads that one to the same revision.
STICKY_HEADER = "x-qaa-user"

#: Finds the adapter of a name that the catalogue has not, if anything can; says whether it has one now.
Resolve: TypeAlias = Callable[[str], Awaitable[bool]]


async def _resolve_nothing(name: str) -> bool:
    return False


class Gate:
    """The middleware; see the module's docstring."""

    def __init__(
        self,
        app: App,
        *,
        rights: Rights,
        bodies: Bodies,
        turns: Turns,
        catalogue: Catalogue,
        metrics: ServerMetrics,
        drain: Drain,
        base_names: Sequence[str],
        max_upload_bytes: int,
        has_route: Callable[[Scope], bool],
        roles: Iterable[Role] = tuple(Role),
        request_log: RequestLog | None = None,
        resolve: Resolve = _resolve_nothing,
    ):
        """Stand before an app.

        Args:
            app: what requests are let through to.
            rights: who may do what.
            bodies: reads bodies.
            turns: who may run now.
            catalogue: the adapters.
            metrics: where requests are counted and timed.
            drain: the requests under way.
            base_names: the base model's names; its requests are counted under the first.
            max_upload_bytes: of an upload.
            has_route: whether the app has a route for a request.
            roles: whose routes there are here; other routes are not found.
            request_log: told of every request of a client when it has ended.
            resolve: asked for names that the catalogue has not.
        """
        self._app = app
        self._root_path = getattr(app, "root_path", "")  # FastAPI takes it off a path before it looks for a route
        self._rights = rights
        self._bodies = bodies
        self._turns = turns
        self._catalogue = catalogue
        self._metrics = metrics
        self._drain = drain
        self._base_names = base_names
        self._max_upload_bytes = max_upload_bytes
        self._has_route = has_route
        self._roles = frozenset(roles)
        self._request_log = request_log
        self._resolve = resolve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let it through."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        request_id = _give_id(scope)
        exchange = _Exchange(receive, send, request_id)
        root_path = self._root_path or scope.get("root_path", "")
        path = get_route_path({"path": scope["path"], "root_path": root_path})
        path = path.removesuffix("\n")  # the app's routes match with a line's end after them, too
        role = role_of(path)
        preflight = scope.get("method") == "OPTIONS"  # browsers ask without a key; nothing is done
        if role is Role.ANYONE or preflight:
            await self._app(scope, receive, exchange.send)
            return
        request = RequestContext(None, address_of(scope), hold=self._catalogue.cache.hold)
        outcome: Outcome = "server_error"
        try:
            await self._answer(request, role, path, scope, exchange)
            outcome = exchange.outcome(request)
        except RefusedError as refusal:
            outcome = "rejected" if refusal.status in (429, 503) else "client_error"
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.message[:120]})
            elif exchange.status is None:
                await refusal.response()(scope, receive, exchange.send)
        except ClientGoneError:
            outcome = "aborted"
        except asyncio.CancelledError:
            outcome = "aborted"
            raise
        finally:
            if role is Role.CLIENT and scope.get("method") == "POST":
                # What was refused before its model was known counts under none.
                key = None if request.key is None else request.key.name
                seen = request.observation or self._metrics.begin(None, path, key)
                seen.end(outcome)
                if request.alias and request.revision is not None:
                    self._metrics.alias_ended(str(request.asked), request.revision, seen.seconds, outcome)
                if self._request_log is not None:
                    self._request_log.write(request, seen, request_id, exchange.status, outcome)

    async def _answer(
        self, request: RequestContext, role: Role, path: str, scope: Scope, exchange: _Exchange
    ) -> None:
        """The way of a request: rights, body, turn, adapter, app.

        Raises:
            RefusedError: if it is not let through.
            ClientGoneError: if the client leaves before it is.
        """
        if role not in self._roles or (role is Role.ADMIN and not self._has_route(scope)):
            raise RefusedError(404, unknown_route(scope.get("method", "GET"), path))
        request.key = await self._rights.check(role, scope)
        self._check_open()
        async with AsyncExitStack() as stack:
            if scope["type"] == "websocket":
                if role is Role.CLIENT:  # they name their model later, and can only have the base model
                    self._check_model(request)
                stack.enter_context(self._drain.request())
            elif role is Role.ADMIN and media_type(scope) == MULTIPART:
                stack.enter_context(self._drain.request())
                exchange.receives = self._bodies.limit_upload(scope, exchange.receives, self._max_upload_bytes)
            else:
                body = await self._bodies.read(scope, exchange.receives)
                stack.callback(body.let_go)
                self._check_open()  # the server may have begun to end while the body came
                stack.enter_context(self._drain.request())
                if role is Role.CLIENT and scope["method"] == "POST" and not _is_cancel(path):
                    asked = await asked_by(body, path, scope)
                    await self._seat(stack, request, asked, path, scope, exchange)
                exchange.receives = body.replayed(exchange.receives)
            token = current_request.set(request)
            try:
                await self._app(scope, exchange.receive, exchange.send)
            finally:
                current_request.reset(token)

    async def _seat(
        self,
        stack: AsyncExitStack,
        request: RequestContext,
        asked: Asked,
        path: str,
        scope: Scope,
        exchange: _Exchange,
    ) -> None:
        """Wait for the request's first seats and take hold of its adapter, both until the stack is closed."""
        request.asked = asked.model
        name = self._check_model(request)
        is_base = asked.model is None or asked.model in self._base_names
        target = ""
        if not is_base:
            # A header is there for clients that have no such field; the same one always has the same revision.
            who = Headers(scope=scope).get(STICKY_HEADER) or asked.user
            target = self._catalogue.route(str(asked.model), who)
            request.alias = target != asked.model
            if not self._catalogue.knows(target) and not await self._resolve(target):
                raise _unknown(asked.model)
            name, certain, _ = target.partition("@")
            if certain:
                with _refusing(asked.model):
                    await self._catalogue.find(target)
        request.observation = self._metrics.begin(name, path, None if request.key is None else request.key.name)
        client = request.key.name if request.key is not None and self._rights.keys.has_several_clients else None
        request.ticket = stack.enter_context(self._turns.admit(name, client, asked.prompts * asked.n))
        await _unless_gone(exchange.receives, request.ticket.first(asked.n))
        request.observation.has_turn()
        if is_base:
            return
        with _refusing(asked.model):
            request.revision = await stack.enter_async_context(self._catalogue.use(target))
        exchange.revision = request.revision.revision

    def _check_model(self, request: RequestContext) -> str:
        """The name that a request asks for; refuses it if its key may not use that."""
        is_base = request.asked is None or request.asked in self._base_names
        name = self._base_names[0] if is_base else str(request.asked).partition("@")[0]
        if not request.may_use(name):
            raise RefusedError(403, f"this key may not use the model {request.asked or name!r}", param="model")
        return name

    def _check_open(self) -> None:
        if self._drain.closed:
            raise RefusedError(503, "the server is shutting down", Retry_After="10")
        if not self._catalogue.ready:
            raise RefusedError(503, "the server is still loading its adapters", Retry_After="5")


class _Exchange:
    """A request's messages and its response's, and how it ended.

    Attributes:
        receives: what the app receives from.
        status: of the response; None until it begins.
        revision: of the adapter that answers, as name@digest; None for the base model.
    """

    def __init__(self, receive: Receive, send: Send, request_id: str):
        self.receives = receive
        self.status: int | None = None
        self.revision: str | None = None
        self._send = send
        self._request_id = request_id
        self._complete = False
        self._gone = False

    async def receive(self) -> Message:
        """What the app receives."""
        message = await self.receives()
        if message["type"] == "http.disconnect" and not self._complete:
            self._gone = True
        return message

    async def send(self, message: Message) -> None:
        """What the app sends."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message.setdefault("headers", [])
            headers = MutableHeaders(scope=message)
            headers.setdefault("x-request-id", self._request_id)
            if self.revision is not None:
                headers["x-qaa-revision"] = self.revision
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = not self._gone
        await self._send(message)

    def outcome(self, request: RequestContext) -> Outcome:
        """How a request that the app has answered has ended."""
        if self.status is None or not self._complete:
            return "aborted"
        if self.status >= 500 or (request.observation is not None and request.observation.failed):
            return "server_error"
        return "client_error" if self.status >= 400 else "success"


def _give_id(scope: Scope) -> str:
    """The request's id, which vLLM takes from its headers too; one is made if it has none."""
    if (given := Headers(scope=scope).get("x-request-id")) is not None:
        return given
    made = uuid.uuid4().hex
    scope["headers"] = [*scope["headers"], (b"x-request-id", made.encode())]
    return made


@contextmanager
def _refusing(model: str | None) -> Iterator[None]:
    """Turn what the catalogue says of a model into a refusal."""
    try:
        yield
    except UnknownAdapterError as error:  # invalid, no such revision, or removed while the request waited
        raise _unknown(model, error) from error
    except UnavailableError as error:
        raise RefusedError(503, str(error), Retry_After=str(max(1, math.ceil(error.retry_after_s)))) from error


def _unknown(model: str | None, error: UnknownAdapterError | None = None) -> RefusedError:
    message = f"The model `{model}` does not exist. GET /v1/models lists those that you can use."
    _, at, digest = (model or "").rpartition("@")
    if at and not DIGEST_PATTERN.fullmatch(digest):
        message += " A revision is 12 to 64 hex digits behind the @, as the header x-qaa-revision has them."
    return RefusedError(404, str(error) if isinstance(error, AmbiguousRevisionError) else message, param="model")


def _is_cancel(path: str) -> bool:
    """Whether a request ends another one: it runs nothing, and may not wait behind what it is to end."""
    return path.startswith("/v1/responses/") and path.endswith("/cancel")


async def _unless_gone(receive: Receive, turn: Awaitable[None]) -> None:
    """Wait for a turn, unless the client goes away meanwhile."""
    tasks: list[asyncio.Future[Any]] = [waiting := asyncio.ensure_future(turn)]
    try:
        await asyncio.sleep(0)
        if not waiting.done():
            tasks.append(asyncio.ensure_future(receive()))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientGoneError
        waiting.result()
    finally:
        pending = [task for task in tasks if not task.done()]
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)  # a cancellation that comes meanwhile is not swallowed
