"""Connections: so many at once, with requests' headers in time and within bounds; and how they come to an end."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import re
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qaa_serve.server.drain import Drain
from qaa_serve.server.errors import error_response

#: The longest that a request's headers may take and be.
_HEADERS_S, _HEADERS_BYTES = 30.0, 1 << 16

#: How long the rest of a body that nobody reads may take, since its request was refused.
_REST_S = 30.0

#: The end of a request's headers, and an offer among them to go on in HTTP/2, as Java's client makes it.
_END = re.compile(rb"\r?\n\r?\n")
_OFFER = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n[^ \t])", re.IGNORECASE)

#: SO_ATTACH_FILTER of Linux, which Python has no name for, and a filter that drops what opens a TCP connection.
#: In classic BPF (code, jump if true, jump if false, operand): load the flags; is SYN among them? drop; keep.
_ATTACH_FILTER = 26
_DROP_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, and a way to end a connection that costs its client no answer."""

    def end_after_answer(self) -> None:
        """Have the answer under way say that it is the connection's last.

        Not if it has begun, and cannot say so, nor before the request is whole: what a client sends to a closed
        connection resets it, and the answer may be lost. Then the next one is the last.
        """
        if self.cycle is not None and not (self.cycle.more_body or self.cycle.response_started):
            self.cycle.keep_alive = False


def bounded_protocol(max_connections: int, drain: Drain) -> type[Connection]:
    """The protocol of a server that holds no more than so many connections, and lets them go once it drains."""

    class BoundedProtocol(Connection):
        """One connection."""

        _deadline: asyncio.TimerHandle | None = None
        _header_bytes: int | None = None  # None while no headers are awaited
        _between = True  # whether the next byte is a request's first

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                message = f"the server has {max_connections} connections open, its limit: try again later"
                self._refuse(503, message, {"retry-after": "1"})
            else:
                self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._between:
                data = _without_offer(data)
            while self._header_bytes is not None and data and not self.transport.is_closing():
                room = _HEADERS_BYTES - self._header_bytes
                if room <= 0:
                    self._refuse(431, f"the request's headers have more than {_HEADERS_BYTES:,} bytes")
                    return
                part, data = data[:room], data[room:]
                self._header_bytes += len(part)
                super().data_received(part)
            if data and not self.transport.is_closing():
                super().data_received(data)

        def on_message_begin(self) -> None:
            self._between = False
            self._await_headers()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._disarm()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._between = True
            self._disarm()
            super().on_message_complete()
            if drain.closed:
                self.end_after_answer()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete and self.cycle.more_body:  # what comes of it passes unread
                self._arm(_REST_S)

        def _await_headers(self) -> None:
            if self._header_bytes is None:
                self._header_bytes = 0
                self._arm(_HEADERS_S)

        def _arm(self, seconds: float) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = self.loop.call_later(seconds, self._close, seconds)

        def _disarm(self) -> None:
            self._header_bytes = None
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _close(self, seconds: float) -> None:
            self._deadline = None
            if self.flow.read_paused:  # by the server, which still answers the request before
                self._arm(seconds)
            else:
                self.transport.close()

        def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
            """Answer and close; no request has been read, so there is nobody to pass it to."""
            self._disarm()
            if self.transport.is_closing():
                return
            response = error_response(status, message, headers={**(headers or {}), "connection": "close"})
            lines = [b"HTTP/1.1 %d Refused" % status, *(b"%s: %s" % header for header in response.raw_headers)]
            self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
            self.transport.close()

    return BoundedProtocol


def _without_offer(data: bytes) -> bytes:
    """A request without its offer of HTTP/2, which may be passed over (RFC 9110, 7.8).

    httptools takes what follows the headers of such a request for the other protocol's, and the body for none.
    """
    end = _END.search(data)
    return data if end is None else _OFFER.sub(b"", data[: end.end()]) + data[end.end() :]


def open_listener(address: str) -> socket.socket:
    """A socket that listens at HOST:PORT, or at unix:PATH for its owner alone.

    Raises:
        ValueError: if the text is neither.
        OSError: if it cannot be had.
    """
    if address.startswith("unix:"):
        return _open_unix(Path(address.removeprefix("unix:")))
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is neither HOST:PORT nor unix:PATH")
    host = host.strip("[]")
    options: dict[str, Any] = {"family": socket.AF_INET6} if ":" in host else {}
    return socket.create_server((host, int(port)), **options)


def refuse_connections(sock: socket.socket) -> None:
    """Have a listener get no further connections; those that have begun arrive still, and can be answered.

    To close it at once would reset them. A client that comes now is refused when its system asks again, a second
    later, and at once where the listener has a path. Where the system has no such filters nothing happens.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _DROP_SYN))
    attached = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
    with suppress(OSError):
        if sock.family == socket.AF_UNIX:
            Path(sock.getsockname()).unlink()
        else:
            sock.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, attached)


def _open_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                if other.connect_ex(str(path)) == 0:
                    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), str(path))
            path.unlink()  # of a server that was killed
        sock.bind(str(path))
        path.chmod(0o600)  # before it listens: until then nobody can connect
        sock.listen(socket.SOMAXCONN)
    except BaseException:
        sock.close()
        raise
    return sock
