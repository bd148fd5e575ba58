"""The server's life: engine, app, adapters, HTTP, shutdown. vLLM's own pieces in vLLM's own order."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import socket
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.logger import init_logger
from vllm.v1.metrics import buckets
from vllm_qaa import port

from qaa_serve.registry import Catalogue, Contents, Follower
from qaa_serve.server.admin import make_router
from qaa_serve.server.aliases import make_alias_router
from qaa_serve.server.announce import announce
from qaa_serve.server.asgi import Scope
from qaa_serve.server.audit import AuditLog
from qaa_serve.server.bodies import Bodies
from qaa_serve.server.drain import Drain
from qaa_serve.server.engine import AdapterEngine, running_engine
from qaa_serve.server.errors import answer_errors
from qaa_serve.server.gate import Gate
from qaa_serve.server.http import HTTPServer, Listener
from qaa_serve.server.keys import KeyRing, KeySources
from qaa_serve.server.metrics import (
    Exposition,
    ServerMetrics,
    StateCollector,
    remove_routes,
    say_what_runs,
)
from qaa_serve.server.models import ServedModels, make_models_router
from qaa_serve.server.monitor import EngineMonitor
from qaa_serve.server.options import ServingOptions
from qaa_serve.server.readiness import Readiness, make_readiness_router
from qaa_serve.server.request_log import RequestLog
from qaa_serve.server.resolvers import Resolvers
from qaa_serve.server.rights import Rights, Role, WrongKeys
from qaa_serve.server.runfile import RunningServer
from qaa_serve.server.stored_responses import KeptResponses
from qaa_serve.server.turns import Turns

logger = init_logger("vllm.qaa_serve")  # vLLM's handlers hang on the name "vllm"


async def serve(
    args: argparse.Namespace,
    options: ServingOptions,
    contents: Contents,
    key_sources: KeySources,
    admin_sock: socket.socket | None,
) -> int:
    """Serve until a signal or the end of the engine.

    Args:
        args: vLLM's arguments.
        options: ours.
        contents: where adapters come from.
        key_sources: where keys come from.
        admin_sock: where the admin routes are; None: where all routes are.

    Returns:
        the exit status: 0 after a signal, 1 if the engine died or hangs.
    """
    port.check_server()
    address, sock = setup_server(args, reuse_port=False)
    async with AsyncExitStack() as stack:
        stack.callback(sock.close)
        engine = await stack.enter_async_context(running_engine(args))
        server = await _assemble(engine, args, options, contents, key_sources, sock, admin_sock)
        stack.callback(server.audit.close)
        told = RunningServer(
            address,
            _url_of(options.admin_listen, address),
            str(options.made_admin_key or args.admin_key_file or "") or None,
            os.getpid(),
        )
        background = [
            asyncio.create_task(task)
            for task in (
                _follow(server, partial(announce, server.catalogue, args, told)),
                server.monitor.run(),
                key_sources.follow(server.keys, logger),
                server.catalogue.check_in_background(lazy=options.adapters_check == "lazy"),
            )
        ]
        try:
            return await server.http.run()
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)


@dataclass(frozen=True)
class Server:
    """The parts that run beside each other."""

    catalogue: Catalogue
    follower: Follower
    keys: KeyRing
    monitor: EngineMonitor
    audit: AuditLog
    http: HTTPServer


async def _assemble(
    engine: AdapterEngine,
    args: argparse.Namespace,
    options: ServingOptions,
    contents: Contents,
    key_sources: KeySources,
    sock: socket.socket,
    admin_sock: socket.socket | None,
) -> Server:
    """vLLM's app with our routes in it and the gate before it, on its listeners."""
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    base_names = args.served_model_name or [args.model]
    metrics = ServerMetrics(
        REGISTRY,
        max_adapters=options.metrics_max_adapters,
        max_keys=options.metrics_max_keys,
        latency_buckets=buckets.REQUEST_LATENCY_BUCKETS,
        first_token_buckets=buckets.TIME_TO_FIRST_TOKEN_BUCKETS,
        inter_token_buckets=buckets.INTER_TOKEN_LATENCY_BUCKETS,
    )
    audit = AuditLog(logger, options.audit_log)
    catalogue = Catalogue(
        contents,
        engine,
        observer=metrics,
        changed=audit.changed,
        cache_bytes=options.adapter_cache_bytes,
        max_count=args.max_cpu_loras,
        loaders=options.adapter_loaders,
        load_timeout_s=options.adapter_load_timeout_s,
        keep=options.keep_revisions,
        reserved=base_names.__contains__,
        logger=logger,
    )
    follower = Follower(
        contents.source,
        catalogue,
        contents.index,
        quiet_s=options.adapters_quiet_s,
        takers=options.adapter_loaders,
        timeout_s=options.adapter_load_timeout_s,
        logger=logger,
    )
    with port.replaced("OpenAIServingModels", partial(ServedModels, catalogue)):
        await app_state.init_app_state(engine, app.state, args, tasks)
    _own_responses(app)
    drain = Drain()
    monitor = EngineMonitor(engine.account, timeout_s=options.engine_stall_timeout_s, logger=logger)
    readiness = Readiness(engine, monitor, drain, catalogue)
    turns = Turns(
        options.adapter_max_running or engine.vllm_config.scheduler_config.max_num_seqs,
        options.adapter_max_queue,
        max_wait_s=options.max_queue_wait_s,
    )
    max_loras = engine.vllm_config.lora_config.max_loras
    REGISTRY.register(
        StateCollector(catalogue, follower, turns, metrics.labels, monitor, readiness.status, max_loras=max_loras)
    )
    say_what_runs(REGISTRY, *await engine.circuits_backend())
    remove_routes(app, "/metrics", "/v1/models")  # ours do not hold up the event loop
    for router in (
        Exposition(REGISTRY).router(),
        make_readiness_router(readiness),
        make_models_router(app.state.openai_serving_models),
        make_router(catalogue, monitor, turns, audit, options.adapter_repos),
        make_alias_router(catalogue, audit),
    ):
        app.include_router(router)
    answer_errors(app)
    await asyncio.to_thread(app.openapi)  # takes seconds; the first who asks for it must not stop all others
    keys = KeyRing(*key_sources.read())
    resolvers = Resolvers(app.state.openai_serving_models.lora_resolvers, catalogue, base_names[0], logger)
    gated = partial(
        Gate,
        app,
        rights=Rights(keys, WrongKeys(metrics.wrong_key, logger)),
        bodies=Bodies(
            max_bytes=options.max_body_bytes,
            max_held_bytes=options.max_held_bytes,
            timeout_s=options.body_timeout_s,
        ),
        turns=turns,
        catalogue=catalogue,
        metrics=metrics,
        drain=drain,
        base_names=base_names,
        max_upload_bytes=options.max_adapter_bytes + (1 << 21),  # and the config, and the form around them
        has_route=partial(_has_route, app),
        request_log=RequestLog(logger) if options.log_format == "json" else None,
        resolve=resolvers.resolve,
    )
    cors = _take_cors(app)
    app.middleware_stack = None  # vLLM has built it already; the first request builds it as it is now
    admins_apart = frozenset((Role.ADMIN,)) if admin_sock is not None else frozenset()
    listeners: list[Listener] = [(sock, cors(gated(roles=set(Role) - admins_apart)))]
    if admin_sock is not None:
        listeners.append((admin_sock, cors(gated(roles=(Role.ADMIN, Role.ANYONE)))))
    http = HTTPServer(app, listeners, engine, monitor, drain, args, options)
    return Server(catalogue, follower, keys, monitor, audit, http)


def _url_of(admin_listen: str | None, address: str) -> str:
    """Where the admin routes are, with the scheme that the clients' have."""
    if admin_listen is None or admin_listen.startswith("unix:"):
        return admin_listen or address
    return f"{'https' if address.startswith('https:') else 'http'}://{admin_listen}"


def _own_responses(app: FastAPI) -> None:
    """Have vLLM keep responses apart by client. A model that generates no text has no such handler."""
    if (handler := getattr(app.state, "openai_serving_responses", None)) is not None:
        # Ids may be a client's choice: none can write over another's messages or events either.
        kept = KeptResponses()
        handler.response_store, handler.msg_store, handler.event_store = (kept.table() for _ in range(3))


def _take_cors(app: FastAPI) -> Any:
    """Take vLLM's CORS middleware out of its app, to stand before the gate: refusals need its headers too."""
    middleware: list[Any] = app.user_middleware
    cors = next(entry for entry in middleware if entry.cls is CORSMiddleware)
    middleware.remove(cors)
    return partial(CORSMiddleware, **cors.kwargs)


def _has_route(app: FastAPI, scope: Scope) -> bool:
    return any(route.matches(scope)[0] is not Match.NONE for route in app.routes)


async def _follow(server: Server, announce: Any) -> None:
    """Take over what the source has, say that the server is ready, and follow the source."""
    run_file: Path | None = None
    try:
        await server.follower.start()
        gc.freeze()  # what a hundred thousand adapters take would be gone through at every full collection
        server.catalogue.ready = True
        await server.http.started.wait()
        run_file = announce()
        await server.follower.run()
    except Exception:
        logger.exception("Following the adapters failed; the server ends")
        server.http.stop(1)
    finally:
        if run_file is not None:
            with suppress(OSError):
                run_file.unlink()
