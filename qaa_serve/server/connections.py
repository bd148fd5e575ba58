"""Connections: so many at once, and each sends its requests' headers in time and within bounds."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: The longest that a request's headers may take and be.
_HEADERS_S, _HEADERS_BYTES = 30.0, 1 << 16


def bounded_protocol(max_connections: int) -> type[HttpToolsProtocol]:
    """uvicorn's protocol for a server that holds no more than so many connections."""

    class BoundedProtocol(HttpToolsProtocol):
        """One connection."""

        _deadline: asyncio.TimerHandle | None = None
        _header_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self._refuse(503, f"the server has {max_connections} connections open, its limit: try again later")
            else:
                self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._have_headers()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._deadline is not None:
                self._header_bytes += len(data)
            super().data_received(data)
            if self._deadline is not None and self._header_bytes > _HEADERS_BYTES:
                self._refuse(431, f"the request's headers have more than {_HEADERS_BYTES:,} bytes")

        def on_message_begin(self) -> None:
            self._await_headers()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._have_headers()
            super().on_headers_complete()

        def _await_headers(self) -> None:
            if self._deadline is None:
                self._header_bytes = 0
                self._deadline = self.loop.call_later(_HEADERS_S, self._close)

        def _have_headers(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _close(self) -> None:
            self._deadline = None
            self.transport.close()

        def _refuse(self, status: int, message: str) -> None:
            """Answer and close; no request has been read, so there is nobody to pass it to."""
            self._have_headers()
            if self.transport.is_closing():
                return
            error = {"message": message, "type": "ServiceUnavailableError", "param": None, "code": status}
            body = json.dumps({"error": error}).encode()
            head = (
                f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            )
            self.transport.write(head.encode() + b"retry-after: 1\r\nconnection: close\r\n\r\n" + body)
            self.transport.close()

    return BoundedProtocol


def open_listener(address: str) -> socket.socket:
    """A socket that listens at HOST:PORT, or at unix:PATH for its owner alone.

    Raises:
        ValueError: if the text is neither.
        OSError: if it cannot be had.
    """
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.stat().st_mode):  # of a server that was killed
                path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(socket.SOMAXCONN)
        return sock
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{address!r} is neither HOST:PORT nor unix:PATH")
    host = host.strip("[]")
    options: dict[str, Any] = {"family": socket.AF_INET6} if ":" in host else {}
    return socket.create_server((host, int(port)), **options)
