"""Connections over real sockets: bounded in number, in time and in the size of their requests' headers."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from contextlib import asynccontextmanager, nullcontext

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed")
pytest.importorskip("httptools", reason="the server's packages are not installed")

import uvicorn

from qaa_serve.server import connections as module
from qaa_serve.server.connections import bounded_protocol, open_listener
from qaa_serve.server.drain import Drain

DEADLINE_S = 60


class Server(uvicorn.Server):
    """Leaves signals alone."""

    def capture_signals(self):
        return nullcontext()


async def app(scope, receive, send):
    """Says what it got; /refuse answers at once, without the body, /slow when `release` is set."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "hello"})
        await send({"type": "websocket.close"})
        return
    body, more = b"", True
    if scope["path"] == "/slow":
        await scope["state"]["release"].wait()
    while more and scope["path"] != "/refuse":
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    answer = json.dumps({"path": scope["path"], "bytes": len(body)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


class Connection:
    """A client's connection, of which every byte is chosen."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, data):
        self.writer.write(data)

    async def answer(self):
        """(status, headers, body) of one response."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        return int(head[0].split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))

    async def is_closed(self):
        """Waits until the server has closed it; False if it sends something first."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True

    def close(self):
        self.writer.close()


class Site:
    """A server and its clients."""

    def __init__(self, server, address, release):
        self.server, self.address, self.release = server, address, release
        self.clients = []

    async def connect(self):
        if isinstance(self.address, str):
            connection = Connection(*await asyncio.open_unix_connection(self.address))
        else:
            connection = Connection(*await asyncio.open_connection(*self.address[:2]))
        self.clients.append(connection)
        return connection

    async def until_open(self, number):
        """Wait until so many connections are open here."""
        while len(self.server.server_state.connections) != number:
            await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(max_connections=10, listen="127.0.0.1:0"):
    sock = open_listener(listen)
    config = uvicorn.Config(
        app,
        http=bounded_protocol(max_connections, Drain()),
        lifespan="off",
        log_level="critical",
        timeout_keep_alive=DEADLINE_S,
    )
    server, release = Server(config), asyncio.Event()
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.001)
    server.lifespan.state["release"] = release
    site = Site(server, sock.getsockname(), release)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield site
    finally:
        for connection in site.clients:
            connection.close()
        release.set()
        server.should_exit = server.force_exit = True
        await task
        sock.close()


def run(test, **options):
    async def main():
        async with serving(**options) as site:
            await test(site)

    asyncio.run(main())


GET = b"GET /%s HTTP/1.1\r\nhost: x\r\n\r\n"


def post(path, body, length=None):
    return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path, length or len(body), body)


# --------------------------------------------------------------------------------------------- what still works


def test_one_connection_carries_request_after_request():
    async def test(site):
        connection = await site.connect()
        for number in range(5):
            connection.send(GET % str(number).encode())
            status, _, body = await connection.answer()
            assert (status, json.loads(body)["path"]) == (200, f"/{number}")

    run(test)


def test_requests_that_come_all_at_once_are_answered_in_their_order():
    async def test(site):
        connection = await site.connect()
        connection.send(GET % b"slow" + post(b"/b", b"x" * 5) + GET % b"c")
        site.release.set()
        answers = [json.loads((await connection.answer())[2]) for _ in range(3)]
        assert answers == [{"path": "/slow", "bytes": 0}, {"path": "/b", "bytes": 5}, {"path": "/c", "bytes": 0}]

    run(test)


def test_headers_and_a_body_may_come_byte_by_byte():
    async def test(site):
        connection = await site.connect()
        for byte in post(b"/a", b"x" * 20):
            connection.send(bytes([byte]))
            await asyncio.sleep(0)
        assert json.loads((await connection.answer())[2]) == {"path": "/a", "bytes": 20}

    run(test)


def test_a_large_body_is_no_large_header(monkeypatch):
    monkeypatch.setattr(module, "_HEADERS_BYTES", 100)

    async def test(site):
        connection = await site.connect()
        for size in (10_000, 1_000_000, 90):
            connection.send(post(b"/a", b"x" * size))
            status, _, body = await connection.answer()
            assert (status, json.loads(body)["bytes"]) == (200, size)

    run(test)


def test_a_websocket_is_opened_and_counts_as_a_connection():
    websockets = pytest.importorskip("websockets")

    async def test(site):
        from websockets.asyncio.client import connect

        host, port = site.address
        async with connect(f"ws://{host}:{port}/v1/realtime") as socket:
            assert await socket.recv() == "hello"
            with pytest.raises(websockets.ConnectionClosedOK):
                await socket.recv()

    run(test)


def test_an_offer_of_http_2_is_passed_over_and_costs_no_request_its_body():
    """As Java's client and `curl --http2` make it."""
    offer = b"connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAA\r\n"

    async def test(site):
        connection = await site.connect()
        for body in (b'{"a": 1}', b"x" * 200_000, b"\r\nupgrade: h2c\r\n\r\n"):
            connection.send(post(b"/a", body).replace(b"host", offer + b"host"))
            status, _, answer = await connection.answer()
            assert (status, json.loads(answer)["bytes"]) == (200, len(body))
        connection.send((GET % b"b").replace(b"host", offer + b"host") + post(b"/c", b"upgrade: h2c\r\n"))
        for path in ("/b", "/c"):
            assert json.loads((await connection.answer())[2])["path"] == path

    run(test)


@pytest.mark.parametrize("at", [5, 30, 47, 49, 60])
def test_what_is_like_an_offer_in_a_body_stays(at):
    whole = post(b"/a", b"\r\nupgrade: h2c\r\nx: y\r\n\r\n")

    async def test(site):
        connection = await site.connect()
        connection.send(whole[:at])
        await asyncio.sleep(0.05)
        connection.send(whole[at:])
        assert json.loads((await connection.answer())[2])["bytes"] == 24

    run(test)


def test_what_is_no_http_is_400():
    async def test(site):
        connection = await site.connect()
        connection.send(b"\x16\x03\x01 hello\r\n\r\n")
        assert (await connection.answer())[0] == 400
        assert await connection.is_closed()

    run(test)


# -------------------------------------------------------------------------------------------------- how many


def test_one_connection_too_many_is_answered_503_and_the_others_go_on():
    async def test(site):
        first, second = await site.connect(), await site.connect()
        await site.until_open(2)
        third = await site.connect()
        status, headers, body = await third.answer()
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert headers["content-type"] == "application/json"
        error = json.loads(body)["error"]
        assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
        assert "2 connections open" in error["message"]
        assert await third.is_closed()
        for connection in (first, second):
            connection.send(GET % b"a")
            assert (await connection.answer())[0] == 200
        first.close()
        await site.until_open(1)
        fourth = await site.connect()
        fourth.send(GET % b"a")
        assert (await fourth.answer())[0] == 200

    run(test, max_connections=2)


def test_connections_that_were_refused_leave_nothing_behind():
    async def test(site):
        first = await site.connect()
        await site.until_open(1)
        for _ in range(20):
            refused = await site.connect()
            refused.send(GET % b"a")
            assert (await refused.answer())[0] == 503
        await site.until_open(1)
        first.send(GET % b"a")
        assert (await first.answer())[0] == 200

    run(test, max_connections=1)


# ------------------------------------------------------------------------------------------------ how long


@pytest.mark.parametrize("begun", [b"", b"GET", b"GET / HTTP/1.1\r\nhost: x\r\n", b"POST / HTTP/1.1\r\nx: "])
def test_headers_that_do_not_come_in_time_end_the_connection(monkeypatch, begun):
    monkeypatch.setattr(module, "_HEADERS_S", 0.02)

    async def test(site):
        connection = await site.connect()
        connection.send(begun)
        assert await connection.is_closed()
        await site.until_open(0)

    run(test)


def test_headers_that_trickle_end_the_connection_too(monkeypatch):
    monkeypatch.setattr(module, "_HEADERS_S", 0.1)

    async def test(site):
        connection = await site.connect()
        closed = asyncio.ensure_future(connection.is_closed())
        connection.send(b"GET / HTTP/1.1\r\n")
        while not closed.done():
            connection.send(b"x: y\r\n")
            await asyncio.sleep(0.005)
        assert closed.result()

    run(test)


def test_the_second_requests_headers_have_their_time_and_a_silent_connection_has_none(monkeypatch):
    monkeypatch.setattr(module, "_HEADERS_S", 0.05)

    async def test(site):
        connection = await site.connect()
        connection.send(GET % b"a")
        await connection.answer()
        await asyncio.sleep(0.15)  # what a connection may be silent between requests is uvicorn's affair
        connection.send(GET % b"b")
        assert (await connection.answer())[0] == 200
        connection.send(b"GET /c HTTP/1.1\r\n")
        assert await connection.is_closed()

    run(test)


def test_a_request_may_take_longer_than_headers_may(monkeypatch):
    monkeypatch.setattr(module, "_HEADERS_S", 0.02)
    monkeypatch.setattr(module, "_REST_S", 0.02)

    async def test(site):
        slow, body = await site.connect(), await site.connect()
        slow.send(GET % b"slow")
        body.send(post(b"/a", b"x", length=2))
        await asyncio.sleep(0.1)
        site.release.set()
        body.send(b"y")
        for connection in (slow, body):
            assert (await connection.answer())[0] == 200

    run(test)


def test_a_request_is_answered_though_others_are_sent_behind_it(monkeypatch):
    monkeypatch.setattr(module, "_HEADERS_S", 0.02)

    async def test(site):
        connection = await site.connect()
        # While the first is answered nothing more is read, so the third's headers cannot be complete.
        connection.send(GET % b"slow" + GET % b"b" + (GET % b"c")[:-2])
        await asyncio.sleep(0.1)
        site.release.set()
        connection.send(b"\r\n")
        assert [(await connection.answer())[0] for _ in range(3)] == [200] * 3

    run(test)


def test_the_rest_of_a_body_that_nobody_reads_does_not_hold_its_connection(monkeypatch):
    monkeypatch.setattr(module, "_REST_S", 0.05)

    async def test(site):
        connection = await site.connect()
        connection.send(post(b"/refuse", b"x", length=1 << 40))
        assert (await connection.answer())[0] == 200
        closed = asyncio.ensure_future(connection.is_closed())
        while not closed.done():
            connection.send(b"x")
            await asyncio.sleep(0.005)
        await site.until_open(0)

    run(test)


def test_a_connection_whose_refused_body_came_after_all_is_used_again(monkeypatch):
    monkeypatch.setattr(module, "_REST_S", 0.05)

    async def test(site):
        connection = await site.connect()
        connection.send(post(b"/refuse", b"x", length=3))
        await connection.answer()
        connection.send(b"yz")
        await asyncio.sleep(0.15)
        connection.send(GET % b"a")
        assert json.loads((await connection.answer())[2])["path"] == "/a"

    run(test)


# -------------------------------------------------------------------------------------------------- how large


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("what", [b"GET /%s HTTP/1.1\r\nhost: x\r\n", b"GET / HTTP/1.1\r\nx: %s\r\n"])
def test_headers_that_are_too_large_are_431_whether_they_come_at_once_or_not(what, whole):
    async def test(site):
        connection = await site.connect()
        head = what % (b"x" * (module._HEADERS_BYTES + 5000)) + (b"\r\n" if whole else b"")
        connection.send(head)
        status, headers, body = await connection.answer()
        assert (status, headers["connection"]) == (431, "close")
        assert "retry-after" not in headers, "it would be as large again"
        error = json.loads(body)["error"]
        assert (error["type"], error["code"]) == ("BadRequestError", 431)
        assert "65,536 bytes" in error["message"]

    run(test)


def test_headers_of_the_second_request_are_bounded_as_well(monkeypatch):
    monkeypatch.setattr(module, "_HEADERS_BYTES", 1000)

    async def test(site):
        connection = await site.connect()
        for _ in range(5):
            connection.send(b"GET / HTTP/1.1\r\nx: " + b"x" * 900 + b"\r\n\r\n")
            assert (await connection.answer())[0] == 200
        for part in (b"GET / HTTP/1.1\r\nx: ", b"x" * 900, b"x" * 900):
            connection.send(part)
            await asyncio.sleep(0.01)
        assert (await connection.answer())[0] == 431

    run(test)


# -------------------------------------------------------------------------------------------------- listeners


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0"])
def test_a_listener_at_a_host_and_port(address):
    if "[" in address and not has_ipv6():
        pytest.skip("there is no IPv6 here")

    async def test(site):
        connection = await site.connect()
        connection.send(GET % b"a")
        assert (await connection.answer())[0] == 200

    run(test, listen=address)


def test_a_listener_at_a_unix_socket_is_its_owners_alone(tmp_path):
    path = tmp_path / "admin.sock"

    async def test(site):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        connection = await site.connect()
        connection.send(GET % b"a")
        assert (await connection.answer())[0] == 200

    before = os.umask(0)
    try:
        run(test, listen=f"unix:{path}")
    finally:
        os.umask(before)


def test_a_socket_that_a_killed_server_left_is_taken_over(tmp_path):
    path = tmp_path / "admin.sock"
    with open_listener(f"unix:{path}"):
        pass
    assert path.is_socket()
    with open_listener(f"unix:{path}"), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_socket_where_a_server_listens_is_not_taken_from_it(tmp_path):
    path = tmp_path / "admin.sock"
    with open_listener(f"unix:{path}"):
        with pytest.raises(OSError, match="in use"):
            open_listener(f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_what_is_no_socket_is_left_where_it_is(tmp_path):
    path = tmp_path / "file"
    path.write_text("somebody's")
    with pytest.raises(OSError, match="in use"):
        open_listener(f"unix:{path}")
    assert path.read_text() == "somebody's"


def test_a_port_in_use_is_an_error():
    with open_listener("127.0.0.1:0") as sock, pytest.raises(OSError, match="in use"):
        open_listener(f"127.0.0.1:{sock.getsockname()[1]}")


@pytest.mark.parametrize("address", ["", ":", "8000", ":8000", "localhost", "localhost:", "localhost:http",
                                     "localhost:-1", "localhost:65536", "localhost:8000/", "::1"[:2]])  # fmt: skip
def test_what_is_no_address_is_said(address):
    with pytest.raises(ValueError, match="neither HOST:PORT nor unix:PATH"):
        open_listener(address)
