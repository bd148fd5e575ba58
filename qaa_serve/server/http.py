"""HTTP until a signal or the end of the engine, and an end in good order."""

from __future__ import annotations

import argparse
import asyncio
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeAlias

import uvicorn
import vllm.envs as envs
from fastapi import FastAPI
from vllm.entrypoints.launchers.launcher import NoSignalServer
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher
from vllm.logger import init_logger

from qaa_serve.server.asgi import App
from qaa_serve.server.connections import Connection, bounded_protocol, refuse_connections
from qaa_serve.server.drain import Drain
from qaa_serve.server.engine import AdapterEngine
from qaa_serve.server.monitor import EngineMonitor
from qaa_serve.server.options import ServingOptions
from qaa_serve.server.processes import kill_children

logger = init_logger("vllm.qaa_serve.http")  # vLLM's handlers hang on the name "vllm"

Listener: TypeAlias = tuple[socket.socket, App]

#: How often the engine's state is looked at, and how long open connections have once the server ends, in seconds.
_WATCH_S, _CLOSE_S = 0.5, 5

#: At the end, how long connections that are being opened may take, and how long open ones have to be used once
#: more, for an answer that says that they end; in seconds.
_ARRIVE_S, _LEAVE_S = 0.1, 1.0


class HTTPServer:
    """uvicorn behind the gate, with a drain before the end."""

    def __init__(
        self,
        app: FastAPI,
        listeners: Sequence[Listener],
        engine: AdapterEngine,
        monitor: EngineMonitor,
        drain: Drain,
        args: argparse.Namespace,
        options: ServingOptions,
    ):
        """Prepare to serve.

        Args:
            app: vLLM's, whose handlers would stop a server.
            listeners: sockets, and what answers there.
            engine: whose death ends the server.
            monitor: which sees it hang.
            drain: the requests under way.
            args: vLLM's.
            options: ours.
        """
        protocol = bounded_protocol(options.max_connections, drain)
        self.started = asyncio.Event()
        self._servers = [(NoSignalServer(_configured(front, protocol, args)), sock) for sock, front in listeners]
        # vLLM's handlers would stop uvicorn through the state once the engine is gone, and cut its clients off.
        app.state.server = SimpleNamespace(should_exit=False)
        self._refresh_certificates = args.enable_ssl_refresh
        self._engine = engine
        self._monitor = monitor
        self._drain = drain
        self._drain_timeout_s = options.drain_timeout_s
        self._stopping = asyncio.Event()
        self._status = 0

    def stop(self, status: int) -> None:
        """End the server without a drain."""
        self._status = status
        self._drain_timeout_s = 0
        self._stopping.set()

    async def run(self) -> int:
        """Serve until a signal, `stop`, or the engine's death or standstill.

        Returns:
            the exit status.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.gather(*(server.serve(sockets=[sock]) for server, sock in self._servers))
        refresher = None
        if self._refresh_certificates:
            config = self._servers[0][0].config
            refresher = SSLCertRefresher(
                ssl_context=config.ssl, key_path=config.ssl_keyfile, cert_path=config.ssl_certfile,
                ca_path=config.ssl_ca_certs,
            )  # fmt: skip
        try:
            await self._watch(serving)
        finally:
            if refresher is not None:
                refresher.stop()
        self._refuse_requests()
        if self._works() and not serving.done():
            await self._finish_requests()
        await self._close(serving)
        return self._status

    def _works(self) -> bool:
        return not (self._engine.errored or self._monitor.stalled.is_set())

    async def _watch(self, serving: asyncio.Future[Any]) -> None:
        """Return when the server is to end."""
        while not self._stopping.is_set() and not serving.done():
            if all(server.started for server, _ in self._servers):
                self.started.set()
            if not self._works():
                logger.error("The engine %s; the server ends with status 1", self._failure())
                self._status = 1
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _WATCH_S if self.started.is_set() else 0.05)

    def _failure(self) -> str:
        return "died" if self._engine.errored else "hangs"

    def _refuse_requests(self) -> None:
        self._drain.closed = True
        for connection in self._connections():
            if isinstance(connection, Connection):  # and no WebSocket's
                connection.end_after_answer()

    def _connections(self) -> list[Any]:
        return [connection for server, _ in self._servers for connection in server.server_state.connections]

    async def _finish_requests(self) -> None:
        waiting = self._drain.in_flight
        if self._drain_timeout_s > 0 and waiting:
            logger.info("Taking no more requests; waiting up to %g s for %d", self._drain_timeout_s, waiting)
        closing = asyncio.create_task(self._drain.close(self._drain_timeout_s))
        while not closing.done():
            await asyncio.wait((closing,), timeout=_WATCH_S)
            if not self._works():
                logger.error("The engine %s while the server was draining", self._failure())
                self._status = 1
                break
        if not closing.done():
            closing.cancel()
        elif not closing.result():
            logger.warning(
                "%d requests had not ended after the drain timeout: they are cut off", self._drain.in_flight
            )

    async def _close(self, serving: asyncio.Future[Any]) -> None:
        if self._monitor.stalled.is_set():
            kill_children()  # vLLM would ask them to end, and wait for an answer
        # The engine first: its requests end with an error instead of hanging.
        shut_down = partial(self._engine.shutdown, timeout=0)
        shutting_down = asyncio.get_running_loop().run_in_executor(None, shut_down)
        if self.started.is_set() and not serving.done():
            await self._stop_listening()
            if not self._status:
                await self._wait_for_clients()
        await shutting_down
        for server, _ in self._servers:
            server.should_exit = True
        done, _ = await asyncio.wait((serving,), timeout=_CLOSE_S)
        if not done:
            for server, _ in self._servers:
                server.force_exit = True
            await asyncio.wait((serving,), timeout=_CLOSE_S)

    async def _stop_listening(self) -> None:
        """Refuse connections, after those that were being opened: what they bring is answered 503."""
        arriving = select.poll()
        for _, sock in self._servers:
            refuse_connections(sock)
            arriving.register(sock, select.POLLIN)
        deadline = time.monotonic() + _LEAVE_S
        await asyncio.sleep(_ARRIVE_S)
        while arriving.poll(0) and time.monotonic() < deadline:
            await asyncio.sleep(0)  # uvicorn takes one
        for server, _ in self._servers:
            for listener in server.servers:
                listener.close()

    async def _wait_for_clients(self) -> None:
        """Wait until the connections are gone, each with an answer that says so, or have been silent."""
        deadline = time.monotonic() + _LEAVE_S
        while self._connections() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def _on_signal(self, number: int) -> None:
        if self._stopping.is_set():
            logger.warning("%s again: ending at once", signal.Signals(number).name)
            self._engine.shutdown(timeout=0)
            os._exit(128 + number)
        logger.info("%s: ending", signal.Signals(number).name)
        self._stopping.set()


def _configured(front: App, protocol: type[asyncio.Protocol], args: argparse.Namespace) -> uvicorn.Config:
    options: dict[str, Any] = {
        "http": protocol,
        "host": args.host,
        "port": args.port,
        "log_level": args.uvicorn_log_level,
        "access_log": not args.disable_uvicorn_access_log,
        "timeout_keep_alive": envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        "ssl_keyfile": args.ssl_keyfile,
        "ssl_certfile": args.ssl_certfile,
        "ssl_ca_certs": args.ssl_ca_certs,
        "ssl_cert_reqs": args.ssl_cert_reqs,
        "ssl_ciphers": args.ssl_ciphers,
        "timeout_graceful_shutdown": _CLOSE_S,
    }
    if (log_config := get_uvicorn_log_config(args)) is not None:
        options["log_config"] = log_config
    config = uvicorn.Config(front, **options)
    config.load()
    return config
