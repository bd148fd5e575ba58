"""HTTP until a signal or the engine's death, and an end in good order."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
from contextlib import suppress
from functools import partial
from typing import Any

import uvicorn
import vllm.envs as envs
from fastapi import FastAPI
from vllm.entrypoints.launchers.launcher import NoSignalServer
from vllm.entrypoints.launchers.utils.constants import (
    H11_MAX_HEADER_COUNT_DEFAULT,
    H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT,
)
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher
from vllm.logger import init_logger

from qaa_serve.server.engine import AdapterEngine
from qaa_serve.server.gate import Gate

logger = init_logger("vllm.qaa_serve.http")  # vLLM's handlers hang on the name "vllm"

#: How often the engine's state is looked at, and how long open connections have once the server ends, in seconds.
_WATCH_S, _CLOSE_S = 0.5, 5


class HTTPServer:
    """uvicorn behind the gate, with a drain before the end."""

    def __init__(
        self, app: FastAPI, gate: Gate, engine: AdapterEngine, args: argparse.Namespace, *, drain_timeout_s: float
    ):
        config = uvicorn.Config(gate, **_uvicorn_options(args))
        config.h11_max_incomplete_event_size = (
            args.h11_max_incomplete_event_size or H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT
        )
        # vLLM gives uvicorn's protocol this one through the config too.
        config.h11_max_header_count = args.h11_max_header_count or H11_MAX_HEADER_COUNT_DEFAULT  # type: ignore[attr-defined]
        config.load()
        self.started = asyncio.Event()
        self._server = app.state.server = NoSignalServer(config)  # vLLM's handlers stop it through the state
        self._refresh_certificates = args.enable_ssl_refresh
        self._gate = gate
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self._stopping = asyncio.Event()
        self._status = 0

    def stop(self, status: int) -> None:
        """End the server without a drain."""
        self._status = status
        self._drain_timeout_s = 0
        self._stopping.set()

    async def run(self, sock: socket.socket) -> int:
        """Serve until a signal, `stop` or the engine's death.

        Returns:
            the exit status.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = loop.create_task(self._server.serve(sockets=[sock]))
        refresher = None
        if self._refresh_certificates:
            config = self._server.config
            refresher = SSLCertRefresher(
                ssl_context=config.ssl, key_path=config.ssl_keyfile, cert_path=config.ssl_certfile,
                ca_path=config.ssl_ca_certs,
            )  # fmt: skip
        try:
            await self._watch(serving)
        finally:
            if refresher is not None:
                refresher.stop()
        if not self._engine.errored and not serving.done():
            await self._drain()
        await self._close(serving)
        return self._status

    async def _watch(self, serving: asyncio.Task[None]) -> None:
        """Return when the server is to end."""
        while not self._stopping.is_set() and not serving.done():
            if self._server.started:
                self.started.set()
            if self._engine.errored:
                logger.error("The engine died; the server ends with status 1")
                self._status = 1
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _WATCH_S if self.started.is_set() else 0.05)

    async def _drain(self) -> None:
        waiting = self._gate.in_flight
        if self._drain_timeout_s > 0 and waiting:
            logger.info("Taking no more requests; waiting up to %g s for %d", self._drain_timeout_s, waiting)
        draining = asyncio.create_task(self._gate.drain(self._drain_timeout_s))
        while not draining.done():
            await asyncio.wait((draining,), timeout=_WATCH_S)
            if self._engine.errored:
                logger.error("The engine died while the server was draining")
                self._status = 1
                break
        if not draining.done():
            draining.cancel()
        elif not draining.result():
            logger.warning(
                "%d requests had not ended after the drain timeout: they are cut off", self._gate.in_flight
            )

    async def _close(self, serving: asyncio.Task[None]) -> None:
        # The engine first: its requests end with an error instead of hanging.
        shut_down = partial(self._engine.shutdown, timeout=0)
        await asyncio.get_running_loop().run_in_executor(None, shut_down)
        self._server.should_exit = True
        done, _ = await asyncio.wait((serving,), timeout=_CLOSE_S)
        if not done:
            self._server.force_exit = True
            await asyncio.wait((serving,), timeout=_CLOSE_S)

    def _on_signal(self, number: int) -> None:
        if self._stopping.is_set():
            logger.warning("%s again: ending at once", signal.Signals(number).name)
            self._engine.shutdown(timeout=0)
            os._exit(128 + number)
        logger.info("%s: ending", signal.Signals(number).name)
        self._stopping.set()


def _uvicorn_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {
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
    log_config = get_uvicorn_log_config(args)
    return options if log_config is None else {**options, "log_config": log_config}
