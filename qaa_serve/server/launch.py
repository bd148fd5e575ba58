"""The server's life: engine, app, adapters, HTTP, shutdown. vLLM's own pieces in vLLM's own order."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import vllm.envs as envs
from rich.console import Console
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import NoSignalServer, serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

from qaa_serve.adapters import AdapterError, LinearWidths, linear_widths
from qaa_serve.registry import Rejection, Revision
from qaa_serve.server.models import ServedModels, logger
from qaa_serve.server.routes import router


async def serve(args: argparse.Namespace, revisions: list[Revision], rejections: list[Rejection]) -> int:
    """Serve until a signal or the engine's death.

    Returns:
        the exit status: 0 after a signal, 1 if the engine died.
    """
    address, sock = setup_server(args, reuse_port=False)
    try:
        async with build_async_engine_client(args) as engine:
            tasks = await engine.get_supported_tasks()
            app = build_app(args, tasks, engine.model_config)
            app.include_router(router)
            with _our_models():
                await app_state.init_app_state(engine, app.state, args, tasks)
            models: ServedModels = app.state.openai_serving_models
            await models.publish_all(revisions, rejections, _widths(args))
            announcement = asyncio.create_task(_announce(app.state, args, address, models))
            shutdown = await serve_http(app, sock=sock, **_uvicorn_options(args))
            announcement.cancel()
            # After a signal serve_http hands back the HTTP server's shutdown; if the server stopped by itself, a
            # coroutine that does nothing. By itself it stops when vLLM's watchdog sees a dead engine.
            died = shutdown.cr_code is not NoSignalServer.shutdown.__code__
        await shutdown
    finally:
        sock.close()
    if died:
        logger.error("The engine died; the server ends with status 1")
    return int(died)


@contextmanager
def _our_models() -> Iterator[None]:
    """Let vLLM's set-up of the app make our list of served models instead of its own."""
    original = app_state.OpenAIServingModels
    app_state.OpenAIServingModels = ServedModels
    try:
        yield
    finally:
        app_state.OpenAIServingModels = original


def _widths(args: argparse.Namespace) -> LinearWidths | None:
    try:
        return linear_widths(args.model, trust_remote_code=args.trust_remote_code)
    except AdapterError as error:
        logger.warning("Adapters are checked by the engine only: %s", error)
        return None


def _uvicorn_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {
        "enable_ssl_refresh": args.enable_ssl_refresh,
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
        "h11_max_incomplete_event_size": args.h11_max_incomplete_event_size,
        "h11_max_header_count": args.h11_max_header_count,
    }
    log_config = get_uvicorn_log_config(args)
    return options if log_config is None else {**options, "log_config": log_config}


async def _announce(state: Any, args: argparse.Namespace, address: str, models: ServedModels) -> None:
    """Once HTTP is up, say so, and how to try it."""
    while not getattr(getattr(state, "server", None), "started", False):
        await asyncio.sleep(0.05)
    base = models.model_name()
    adapters = ", ".join(f"{name} ({r.kind})" for name, r in models.revisions.items()) or "none"
    example = next(iter(models.revisions), base)
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": example, "temperature": 0, "messages": [question]}
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n[bold green]Ready[/bold green] on {address}   base: {base}   adapters: {adapters}")
    for rejection in models.rejections.values():
        console.print(f"[yellow]Not served:[/yellow] {rejection.name}: {rejection.reason}")
    url = f"--unix-socket {args.uds} http://localhost" if args.uds else address
    key = "-H 'Authorization: Bearer <your key>' " if args.api_key or envs.VLLM_API_KEY else ""
    console.print(
        f"Try:  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{json.dumps(body)}'\n",
        markup=False,
    )
