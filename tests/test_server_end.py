"""A server that ends while requests come in: every client gets an answer, or is refused a connection."""

from __future__ import annotations

import argparse
import asyncio
import errno
import http.client
import os
import select
import signal
import socket
import threading
from collections import Counter
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import uvloop
from gate_support import CHAT, DEADLINE_S, JSON, World
from server_process import free_port
from test_connections import Connection, has_ipv6
from test_deploy import tool
from try_stack import Stack

from qaa_serve.server import connections
from qaa_serve.server import http as module
from qaa_serve.server.connections import open_listener, refuse_connections
from qaa_serve.server.http import HTTPServer


@pytest.fixture(autouse=True)
def time_to_leave(monkeypatch):
    """Clients have it on a slow machine too; nobody waits so long, as they leave."""
    monkeypatch.setattr(module, "_LEAVE_S", 10 * DEADLINE_S)


class Engine:
    """Lives until it is shut down."""

    errored = False

    def shutdown(self, timeout):
        self.errored = True


class Ending:
    """A server of a World on listeners of its own; the newest gets the signal."""

    def __init__(self, *addresses):
        self.world, self.engine = World(), Engine()
        self.listeners = [open_listener(address) for address in addresses]
        self.address = self.listeners[0].getsockname()
        args = argparse.Namespace(
            host=None, port=0, uvicorn_log_level="critical", disable_uvicorn_access_log=True, ssl_keyfile=None,
            ssl_certfile=None, ssl_ca_certs=None, ssl_cert_reqs=0, ssl_ciphers="TLSv1", enable_ssl_refresh=False,
            disable_access_log_for_endpoints=None, log_config_file=None,
        )  # fmt: skip
        self.server = HTTPServer(
            SimpleNamespace(state=SimpleNamespace()),
            [(sock, self.world.gate) for sock in self.listeners],
            self.engine,
            SimpleNamespace(stalled=asyncio.Event()),
            self.world.drain,
            args,
            SimpleNamespace(max_connections=1000, drain_timeout_s=DEADLINE_S),
        )

    @asynccontextmanager
    async def running(self, status=0):
        """Until the block has ended and the server has, with a status."""
        async with asyncio.timeout(2 * DEADLINE_S):
            running = asyncio.create_task(self.server.run())
            await self.server.started.wait()
            yield
            assert await running == status

    def listens(self):
        return any(sock.fileno() >= 0 for sock in self.listeners)


def post(path, body=b'{"model": "one"}', length=None):
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {JSON}\r\ncontent-length: {length or len(body)}"
    return head.encode() + b"\r\n\r\n" + body


async def until(condition):
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


def end():
    os.kill(os.getpid(), signal.SIGTERM)


@asynccontextmanager
async def load(address, clients=4):
    """Clients that ask, each time by a new connection, until one is refused; how often they saw what."""
    seen, stop = Counter(), threading.Event()

    def ask():
        while not stop.is_set():
            connection = http.client.HTTPConnection(*address, timeout=DEADLINE_S)
            try:
                connection.request("POST", CHAT, b'{"model": "one"}', {"content-type": JSON})
                seen[connection.getresponse().status] += 1
            except ConnectionRefusedError:
                return
            except (OSError, http.client.HTTPException) as error:
                seen[repr(error)] += 1
            finally:
                connection.close()

    asking = [asyncio.create_task(asyncio.to_thread(ask)) for _ in range(clients)]
    try:
        yield seen
    finally:
        stop.set()
        await asyncio.wait(asking)


@pytest.mark.slow
def test_under_load_every_request_is_answered_or_refused_a_connection():
    async def main():
        for _ in range(5):
            ending = Ending("127.0.0.1:0")
            async with load(ending.address) as seen, ending.running():
                await until(lambda seen=seen: seen[200] > 20)
                end()
            assert set(seen) <= {200, 503}

    uvloop.run(main())


@pytest.mark.slow
def test_behind_nginx_with_a_second_server_every_request_is_answered(tmp_path):
    tool("nginx", "apt-get install nginx-light")

    async def main():
        port, front, other = free_port(), free_port(), Ending("127.0.0.1:0")
        with Stack(tmp_path) as stack:
            async with other.running():
                await asyncio.to_thread(stack.start_nginx, front, (port, other.address[1]))
                for _ in range(5):
                    ending = Ending(f"127.0.0.1:{port}")
                    async with load(("127.0.0.1", front)) as seen:
                        async with ending.running():
                            await until(lambda seen=seen: seen[200] > 20)
                            end()
                        before = seen[200]
                        await until(lambda seen=seen, before=before: seen[200] > before + 20)
                    assert set(seen) == {200}
                other.server.stop(0)

    uvloop.run(main())


async def connect(address):
    if isinstance(address, str):
        return Connection(*await asyncio.open_unix_connection(address))
    return Connection(*await asyncio.open_connection(*address))


def is_last(answer, status):
    return answer[0] == status and answer[1]["connection"] == "close"


def test_connections_that_are_open_are_answered_once_more_though_nobody_can_connect(tmp_path):
    """By both listeners: one that has sent nothing, one in the midst of a request, one that has been used."""

    async def main():
        path = tmp_path / "admin.sock"
        ending = Ending("127.0.0.1:0", f"unix:{path}")
        async with ending.running():
            opened = []
            for address in (ending.address, str(path)):
                silent, midst, used = [await connect(address) for _ in range(3)]
                midst.send(post(CHAT)[:30])
                used.send(post(CHAT))
                assert (await used.answer())[0] == 200
                opened += [(silent, post(CHAT)), (midst, post(CHAT)[30:]), (used, post(CHAT))]
            with socket.create_connection(ending.address) as waits:  # in the backlog: this loop has not seen it
                end()
                await until(lambda: not ending.listens())
                waits.sendall(post(CHAT))
                assert b" 503 " in await asyncio.to_thread(waits.recv, 100)
            await asyncio.sleep(0.3)  # the engine is gone long since
            assert not path.exists()
            for connection, rest in opened:
                connection.send(rest)
                answer = await connection.answer()
                assert is_last(answer, 503)
                assert "retry-after" in answer[1]
                assert await connection.is_closed()

    uvloop.run(main())


def test_requests_under_way_are_answered_and_their_connections_end():
    async def main():
        ending = Ending("127.0.0.1:0")
        async with ending.running():
            waits, streams, sends = [await connect(ending.address) for _ in range(3)]
            waits.send(post("/v1/wait"))
            streams.send(post("/v1/stream"))
            await streams.reader.readuntil(b"begun\r\n")
            sends.send(post(CHAT)[:-1])
            await until(lambda: ending.world.behind.entered and ending.world.bodies.held_bytes)
            end()
            await until(lambda: ending.world.drain.closed)
            sends.send(post(CHAT)[-1:])
            assert is_last(await sends.answer(), 503)
            ending.world.behind.go_on.set()
            assert is_last(await waits.answer(), 200)
            await streams.reader.readuntil(b"ended\r\n0\r\n\r\n")
            streams.send(post(CHAT))
            assert is_last(await streams.answer(), 503), "its answer had begun before, and could not say so"

    uvloop.run(main())


def test_a_body_that_is_refused_while_it_is_sent_does_not_reset_its_connection():
    async def main():
        ending = Ending("127.0.0.1:0")
        async with ending.running():
            waits, sends = await connect(ending.address), await connect(ending.address)
            waits.send(post("/v1/wait"))
            await until(lambda: ending.world.behind.entered)
            end()
            await until(lambda: ending.world.drain.closed)
            sends.send(post(CHAT, b"x" * 100, length=5_000_000))
            assert (await sends.answer())[0] == 503
            sends.send(b"x" * 4_999_900 + post(CHAT))
            assert is_last(await sends.answer(), 503)
            ending.world.behind.go_on.set()
            assert is_last(await waits.answer(), 200)

    uvloop.run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_a_silent_connection_does_not_hold_up_the_end(monkeypatch, fails):
    """If the engine has failed not even for a moment."""
    if not fails:
        monkeypatch.setattr(module, "_LEAVE_S", 0.01)
    monkeypatch.setattr(connections, "_HEADERS_S", 10 * DEADLINE_S)

    async def main():
        ending = Ending("127.0.0.1:0")
        async with ending.running(status=int(fails)):
            connection = await connect(ending.address)
            if fails:
                ending.engine.errored = True
            else:
                end()
            assert await connection.is_closed()

    uvloop.run(main())


@pytest.mark.parametrize("where", ["127.0.0.1:0", "[::1]:0", "unix:{}/socket"])
def test_who_is_connected_arrives_and_nobody_else(tmp_path, where):
    if "[" in where and not has_ipv6():
        pytest.skip("there is no IPv6 here")
    with open_listener(where.format(tmp_path)) as sock:
        address = sock.getsockname()
        with socket.socket(sock.family) as before, socket.socket(sock.family) as after:
            before.connect(address)
            refuse_connections(sock)
            after.setblocking(False)
            error = after.connect_ex(address)
            sock.accept()[0].close()
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.accept()
            sock.close()
            if error == errno.EINPROGRESS:
                select.select([], [after], [], DEADLINE_S)
                error = after.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            assert error in (errno.ECONNREFUSED, errno.ENOENT)
