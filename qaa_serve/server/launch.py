"""The server's life: engine, app, adapters, HTTP, shutdown. vLLM's own pieces in vLLM's own order."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY
from rich.console import Console
from starlette.responses import JSONResponse
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.logger import init_logger
from vllm.v1.metrics import buckets

from qaa_serve.registry import Catalogue, DirectoryWatcher, RevisionStore
from qaa_serve.server.account import EngineAccount
from qaa_serve.server.admin import Readiness, Status, make_router
from qaa_serve.server.engine import AdapterEngine, running_engine
from qaa_serve.server.gate import Gate, Turns
from qaa_serve.server.http import HTTPServer
from qaa_serve.server.keys import KeyRing
from qaa_serve.server.metrics import (
    Exposition,
    ServerMetrics,
    StateCollector,
    remove_metrics_routes,
    say_what_runs,
)
from qaa_serve.server.models import ServedModels
from qaa_serve.server.settings import ServingOptions

logger = init_logger("vllm.qaa_serve")  # vLLM's handlers hang on the name "vllm"


ACCOUNT_EVERY_S = 10.0


async def serve(args: argparse.Namespace, options: ServingOptions, store: RevisionStore, keys: KeyRing) -> int:
    """Serve until a signal or the engine's death.

    Args:
        args: vLLM's arguments.
        options: ours.
        store: where revisions are kept.
        keys: who may do what.

    Returns:
        the exit status: 0 after a signal, 1 if the engine died, 2 if an adapter is invalid and none may be.
    """
    address, sock = setup_server(args, reuse_port=False)
    try:
        async with running_engine(args) as engine:
            tasks = await engine.get_supported_tasks()
            app = build_app(args, tasks, engine.model_config)
            with _our_models():
                await app_state.init_app_state(engine, app.state, args, tasks)
            models: ServedModels = app.state.openai_serving_models
            metrics = ServerMetrics(
                REGISTRY,
                max_adapters=options.metrics_max_adapters,
                max_keys=options.metrics_max_keys,
                latency_buckets=buckets.REQUEST_LATENCY_BUCKETS,
                first_token_buckets=buckets.TIME_TO_FIRST_TOKEN_BUCKETS,
                inter_token_buckets=buckets.INTER_TOKEN_LATENCY_BUCKETS,
            )
            say_what_runs(REGISTRY)
            remove_metrics_routes(app)
            app.include_router(Exposition(REGISTRY).router())
            catalogue = Catalogue(
                store,
                engine,
                observer=metrics,
                cache_bytes=options.adapter_cache_bytes,
                max_count=args.max_cpu_loras,
                keep=options.keep_revisions,
                reserved=models.base_names.__contains__,
                logger=logger,
            )
            models.catalogue, engine.cache = catalogue, catalogue.cache
            monitor = EngineMonitor(engine)
            gate, state = _stand_before(app, engine, catalogue, metrics, monitor, options, keys, models.base_names)
            REGISTRY.register(state)
            http = HTTPServer(app, gate, engine, args, drain_timeout_s=options.drain_timeout_s)
            background = [
                asyncio.create_task(_publish(catalogue, options, http, address, args, models)),
                asyncio.create_task(monitor.run()),
            ]
            try:
                return await http.run(sock)
            finally:
                for task in background:
                    task.cancel()
                await asyncio.gather(*background, return_exceptions=True)
    finally:
        sock.close()


@contextmanager
def _our_models() -> Iterator[None]:
    """Let vLLM's set-up of the app make our list of served models instead of its own."""
    original = app_state.OpenAIServingModels
    app_state.OpenAIServingModels = ServedModels
    try:
        yield
    finally:
        app_state.OpenAIServingModels = original


def _stand_before(
    app: FastAPI,
    engine: AdapterEngine,
    catalogue: Catalogue,
    metrics: ServerMetrics,
    monitor: EngineMonitor,
    options: ServingOptions,
    keys: KeyRing,
    base_names: list[str],
) -> tuple[Gate, StateCollector]:
    """Give vLLM's app our routes, and put the gate before it."""
    turns = Turns(
        options.adapter_max_running or engine.vllm_config.scheduler_config.max_num_seqs, options.adapter_max_queue
    )
    app.include_router(make_router(catalogue, lambda: monitor.account, turns, options.adapters))

    def status() -> Status:
        if engine.errored:
            return "engine dead"
        if gate.draining:
            return "draining"
        return "ready" if catalogue.ready else "loading"

    @app.get("/ready", tags=["adapters"], responses={503: {"model": Readiness}})
    async def ready() -> JSONResponse:
        """Whether requests are taken: the engine is up, the adapters of the start are published."""
        readiness = Readiness(status=status())
        return JSONResponse(readiness.model_dump(), 200 if readiness.status == "ready" else 503)

    gate = Gate(
        app,
        catalogue=catalogue,
        keys=keys,
        turns=turns,
        metrics=metrics,
        base_names=base_names,
        max_body_bytes=options.max_body_bytes,
        max_upload_bytes=options.max_adapter_bytes + (1 << 21),  # and the config, and the form around them
        request_log=_log_request if options.log_format == "json" else None,
    )
    max_loras = engine.vllm_config.lora_config.max_loras
    return gate, StateCollector(catalogue, turns, metrics.labels, monitor, status, max_loras=max_loras)


def _log_request(fields: dict[str, Any]) -> None:
    logger.info("request", extra=fields)


async def _publish(
    catalogue: Catalogue,
    options: ServingOptions,
    http: HTTPServer,
    address: str,
    args: argparse.Namespace,
    models: ServedModels,
) -> None:
    """Publish what is there at the start, say that the server is ready, and follow the adapters directory."""
    try:
        await catalogue.restore()
        watcher = None
        if options.adapters is not None:
            watcher = DirectoryWatcher(
                options.adapters, catalogue, quiet_s=options.adapters_quiet_s, logger=logger
            )
            await watcher.publish_all()
        invalid = [entry.name for entry in catalogue.entries.values() if entry.rejection is not None]
        if options.strict_adapters and invalid:
            logger.error("--strict-adapters: the server ends, since these are invalid: %s", ", ".join(invalid))
            http.stop(2)
            return
        catalogue.start()
        await http.started.wait()
        _announce(catalogue, args, address, models)
        if watcher is not None:
            await watcher.run()
    except Exception:
        logger.exception("Publishing adapters failed; the server ends")
        http.stop(1)


class EngineMonitor:
    """What the engine says of itself, asked for now and then: Prometheus must get its answer at once."""

    def __init__(self, engine: AdapterEngine):
        self.account = EngineAccount()
        self._engine = engine
        self._answered = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the engine last answered, or since the start."""
        return time.monotonic() - self._answered

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            try:
                self.account = await self._engine.account()
                self._answered = time.monotonic()
            except Exception as error:  # a dead engine ends the server elsewhere
                logger.warning("The engine's account of its memory is missing: %s", error)
            await asyncio.sleep(ACCOUNT_EVERY_S)


def _announce(catalogue: Catalogue, args: argparse.Namespace, address: str, models: ServedModels) -> None:
    """Say that the server is ready, and how to try it."""
    base = models.base_names[0]
    served = [entry.current for entry in catalogue.entries.values() if entry.current is not None]
    shown = ", ".join(f"{r.name} ({r.kind})" for r in served[:20]) or "none"
    if len(served) > 20:
        shown += f", and {len(served) - 20} more"
    example = served[0].name if served else base
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": example, "temperature": 0, "messages": [question]}
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n[bold green]Ready[/bold green] on {address}   base: {base}   adapters: {shown}")
    for entry in catalogue.entries.values():
        if entry.rejection is not None:
            console.print(f"[yellow]Not served:[/yellow] {entry.name}: {entry.rejection.reason}")
    url = f"--unix-socket {args.uds} http://localhost" if args.uds else address
    key = "-H 'Authorization: Bearer <your key>' " if args.clients_need_a_key else ""
    console.print(
        f"Try:  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{json.dumps(body)}'\n",
        markup=False,
    )
