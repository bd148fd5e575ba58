"""Who may call which route, and what happens to who guesses keys."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from logging import Logger

from starlette.datastructures import Headers

from qaa_serve.server.asgi import Scope
from qaa_serve.server.errors import RefusedError
from qaa_serve.server.keys import Key, KeyRing


class Role(Enum):
    """Who may call a route."""

    ANYONE = "anyone"
    CLIENT = "client"
    ADMIN = "admin"


#: Routes that say how the server is, and its documentation; each with all below it.
_OPEN = (
    "/health",
    "/ready",
    "/ping",
    "/version",
    "/metrics",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/load",
    "/static",
)

#: Routes that clients call, each with all below it. Everything else is for admins: vLLM has routes that stop its
#: engine.
_FOR_CLIENTS = (
    "/v1", "/v2", "/inference", "/cohere", "/tokenize", "/detokenize", "/pooling", "/classify",
    "/score", "/rerank", "/invocations", "/generative_scoring",
)  # fmt: skip

#: Routes that would be clients' but change what is served.
_FOR_ADMINS = (
    "/v1/adapters", "/v1/aliases", "/v1/audit", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
    "/inference/v1/abort_requests",
)  # fmt: skip


def role_of(path: str) -> Role:
    """Who may call the route of a path."""
    if _is_below(path, _OPEN):
        return Role.ANYONE
    if _is_below(path, _FOR_CLIENTS) and not _is_below(path, _FOR_ADMINS):
        return Role.CLIENT
    return Role.ADMIN


def _is_below(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in roots)


#: The wait before a wrong key is answered: it doubles with each, up to the longest; the log has one line a minute
#: and address. Addresses that are remembered, and answers that wait at once, are bounded.
_FIRST_WAIT_S, _LONGEST_WAIT_S, _FORGET_S = 0.05, 2.0, 60.0
_MAX_ADDRESSES, _MAX_WAITING = 10_000, 1_000


@dataclass
class _Guesses:
    """Wrong keys from one address."""

    count: int = 0
    last_s: float = 0.0
    logged_s: float = float("-inf")


class WrongKeys:
    """Counts wrong keys, says so in the log, and slows down who sends them. Right keys never wait."""

    def __init__(
        self, counted: Callable[[str], None], logger: Logger, *, now: Callable[[], float] = time.monotonic
    ):
        """Start without any.

        Args:
            counted: told of each, with the role it was for.
            logger: told once a minute of each address.
            now: a clock, in seconds.
        """
        self._counted = counted
        self._log = logger
        self._now = now
        self._by_address: OrderedDict[str, _Guesses] = OrderedDict()
        self._waiting = 0

    async def seen(self, role: Role, address: str) -> None:
        """A wrong key came; returns when it is to be answered."""
        self._counted(role.value)
        now = self._now()
        guesses = self._by_address.pop(address, None)
        if guesses is None or now - guesses.last_s > _FORGET_S:
            guesses = _Guesses(logged_s=float("-inf") if guesses is None else guesses.logged_s)
        self._by_address[address] = guesses
        if len(self._by_address) > _MAX_ADDRESSES:
            self._by_address.popitem(last=False)
        guesses.count += 1
        guesses.last_s = now
        if now - guesses.logged_s >= _FORGET_S:
            guesses.logged_s = now
            self._log.warning("A wrong key for %s routes from %s (%d so far)", role.value, address, guesses.count)
        if self._waiting < _MAX_WAITING:
            self._waiting += 1
            try:
                await asyncio.sleep(min(_FIRST_WAIT_S * 2.0 ** min(guesses.count - 1, 30), _LONGEST_WAIT_S))
            finally:
                self._waiting -= 1


class Rights:
    """Which key a request has, and whether that is enough for its route."""

    def __init__(self, keys: KeyRing, wrong_keys: WrongKeys):
        self.keys = keys
        self._wrong = wrong_keys

    async def check(self, role: Role, scope: Scope) -> Key | None:
        """The key of a request; None if its route needs none.

        Raises:
            RefusedError: with 401 if it has no right key, 403 if it has a client's where an admin's is needed.
        """
        if role is Role.ANYONE or (role is Role.CLIENT and not self.keys.guards_clients):
            return None
        token = _token(Headers(scope=scope))
        key = self.keys.client(token) if role is Role.CLIENT else self.keys.admin(token)
        if key is not None:
            return key
        if role is Role.ADMIN and self.keys.client(token) is not None:
            raise RefusedError(403, "this key is a client's; the route needs an admin key")
        wanted = "an API key" if role is Role.CLIENT else "an admin key"
        found = ""
        if token is not None:
            await self._wrong.seen(role, address_of(scope))
            found = ", and this is none" if self.keys.admin(token) is None else ", and this is an admin's"
        raise RefusedError(
            401,
            f"{wanted} is needed{found}: send the header 'Authorization: Bearer <key>'",
            WWW_Authenticate="Bearer",
        )


def address_of(scope: Scope) -> str:
    """Where a request came from: the peer's IP address, or "local" for a unix socket."""
    if (client := scope.get("client")) is not None:
        return str(client[0])
    # A TCP connection that its client has reset already has no peer either.
    return "local" if (scope.get("server") or ("", 0))[1] is None else "unknown"


def _token(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    # Anthropic's clients send their key in a header of its own.
    return (token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")) or None
