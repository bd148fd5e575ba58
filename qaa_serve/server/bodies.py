"""Request bodies: read in time and within bounds, and the two things the gate wants to know of them.

The app behind the gate reads the same bytes with another JSON reader. What the two could take for different things
(a byte-order mark, UTF-16, half a surrogate pair, NaN) is no JSON by RFC 8259, and is refused.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from qaa_serve.server.asgi import ClientGoneError, Message, Receive, Scope
from qaa_serve.server.errors import RefusedError

#: Where vLLM takes the model of its route /invocations from, whatever the body says.
_INVOCATIONS_MODEL = "x-amzn-sagemaker-adapter-identifier"

MULTIPART = "multipart/form-data"

_FORMS = (MULTIPART, "application/x-www-form-urlencoded")


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        model: the model it names; None if it names none.
        prompts: how many it has.
        n: answers to each.
        user: whom it is made for, in the words of OpenAI's field; None if it does not say.
    """

    model: str | None
    prompts: int = 1
    n: int = 1
    user: str | None = None


class _Fields(msgspec.Struct):
    """The fields of a body that matter here. Those of type Raw are looked at later, and not copied."""

    model: str | None = None
    user: msgspec.Raw = msgspec.Raw(b"null")
    n: msgspec.Raw = msgspec.Raw(b"1")
    prompt: msgspec.Raw = msgspec.Raw(b"null")
    prompt_embeds: msgspec.Raw = msgspec.Raw(b"null")
    messages: msgspec.Raw = msgspec.Raw(b"null")
    input: msgspec.Raw = msgspec.Raw(b"null")
    items: msgspec.Raw = msgspec.Raw(b"null")
    sampling_params: msgspec.Raw = msgspec.Raw(b"{}")


class _Sampling(msgspec.Struct):
    """Where one route has its `n`."""

    n: msgspec.Raw = msgspec.Raw(b"1")


_decode_fields = msgspec.json.Decoder(_Fields).decode
_decode_sampling = msgspec.json.Decoder(_Sampling).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Body:
    """A body that has arrived; it counts against the limit of all until the app takes it or it is let go."""

    def __init__(self, data: bytes, bodies: Bodies):
        self.data = data
        self._bodies: Bodies | None = bodies

    def let_go(self) -> None:
        """The gate holds it no longer."""
        if self._bodies is not None:
            self._bodies.held_bytes -= len(self.data)
        self._bodies, self.data = None, b""

    def replayed(self, receive: Receive) -> Receive:
        """What an app receives: the body, and then what comes."""
        taken = False

        async def replay() -> Message:
            nonlocal taken
            if taken:
                return await receive()
            taken = True
            message = {"type": "http.request", "body": self.data}
            self.let_go()
            return message

        return replay


class Bodies:
    """Reads bodies, each bounded in bytes and time, and all that are held bounded in bytes."""

    def __init__(self, *, max_bytes: int, max_held_bytes: int, timeout_s: float):
        """Start with none.

        Args:
            max_bytes: of one body.
            max_held_bytes: of all that arrive or wait for their turn.
            timeout_s: for a body to arrive.
        """
        self.held_bytes = 0
        self._max_bytes = max_bytes
        self._max_held_bytes = max(max_held_bytes, max_bytes)
        self._timeout_s = timeout_s

    async def read(self, scope: Scope, receive: Receive) -> Body:
        """A request's whole body.

        Raises:
            RefusedError: with 413 if it is too large, 408 if it takes too long, 503 if too much is held already.
            ClientGoneError: if the client leaves meanwhile.
        """
        limited = limited_receive(receive, Headers(scope=scope), self._max_bytes)
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                more = True
                while more:
                    message = await limited()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    chunks.append(message.get("body", b""))
                    self.held_bytes += len(chunks[-1])
                    if self.held_bytes > self._max_held_bytes:
                        raise RefusedError(
                            503,
                            f"the bodies of requests that wait take {self._max_held_bytes:,} bytes, their limit "
                            "(--max-held-bytes): try again later",
                            Retry_After="1",
                        )
                    more = message.get("more_body", False)
        except BaseException as error:
            self.held_bytes -= sum(map(len, chunks))
            if isinstance(error, TimeoutError):
                raise self._too_slow("the request's body did not arrive within") from None
            raise
        return Body(b"".join(chunks), self)

    def limit_upload(self, scope: Scope, receive: Receive, max_bytes: int) -> Receive:
        """Receive an upload, which goes to disk as it comes: so many bytes, and never long without any."""
        limited = limited_receive(receive, Headers(scope=scope), max_bytes)

        async def receive_in_time() -> Message:
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await limited()
            except TimeoutError:
                raise self._too_slow("nothing of the upload arrived for") from None

        return receive_in_time

    def _too_slow(self, what: str) -> RefusedError:
        return RefusedError(408, f"{what} {self._timeout_s:g} s (--body-timeout)", Connection="close")


def limited_receive(receive: Receive, headers: Headers, limit: int) -> Receive:
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


def media_type(scope: Scope) -> str:
    """What a request's body is said to be, without parameters."""
    return Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()


async def asked_by(body: Body, path: str, scope: Scope) -> Asked:
    """What a client's request asks for.

    Raises:
        RefusedError: with 400 if that cannot be told for sure.
    """
    if media_type(scope) in _FORMS:
        return Asked(await _model_in_form(body, scope))
    if not body.data:
        return Asked(None)
    try:
        if not body.data.isascii():
            body.data.decode()  # msgspec does not look into the texts that it passes over
        fields = _decode_fields(body.data)
        prompts = max(1, *map(_prompts_in, (fields.messages, fields.input, fields.items)), _completions_in(fields))
        n = max(_number(fields.n), _number(_decode_nested(fields.sampling_params).n))
    except msgspec.ValidationError as error:
        raise RefusedError(400, f"the body is not what the route takes: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON in UTF-8: {error}") from error
    model = Headers(scope=scope).get(_INVOCATIONS_MODEL) if path == "/invocations" else fields.model
    user = msgspec.json.decode(fields.user, type=str) if _first(fields.user) == b'"' else None
    return Asked(model or None, prompts, n, user)


async def _model_in_form(body: Body, scope: Scope) -> str | None:
    async def whole() -> Message:
        return {"type": "http.request", "body": body.data}

    try:
        async with Request(scope, whole).form() as form:
            model = form.get("model")
    except (MultiPartException, ValueError, LookupError) as error:
        raise RefusedError(400, f"the body is not the form that it is said to be: {error}") from error
    return model if isinstance(model, str) and model else None


def _completions_in(fields: _Fields) -> int:
    """Prompts of the one route that takes them in two fields and runs both."""
    return sum(_prompts_in(raw) for raw in (fields.prompt, fields.prompt_embeds) if _first(raw) != b"n")


def _prompts_in(raw: msgspec.Raw) -> int:
    """How many prompts a field has: a list of texts, of lists of tokens or of conversations has several.

    A text, a list of tokens and a list of messages are one.
    """
    if _first(raw) != b"[":
        return 1
    parts = _decode_list(raw)
    return 1 if parts and _first(parts[0]) not in (b'"', b"[") else len(parts)


def _first(raw: msgspec.Raw) -> bytes:
    return bytes(memoryview(raw)[:1])


def _decode_nested(raw: msgspec.Raw) -> _Sampling:
    with suppress(msgspec.ValidationError):  # the app will refuse it, or not look at it
        return _decode_sampling(raw)
    return _Sampling()


def _number(raw: msgspec.Raw) -> int:
    """`n` as the app takes it; 1 for what it will refuse."""
    with suppress(msgspec.ValidationError, TypeError, ValueError, OverflowError):
        value: Any = msgspec.json.decode(raw)
        return max(int(float(value)), 1)
    return 1
