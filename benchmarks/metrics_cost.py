"""What our metrics cost in throughput: on and off in turn, in one server under its top load.

    python benchmarks/metrics_cost.py [--windows 12] [--seconds 8] [--clients 16] [--json FILE]

Serves the bundled example and keeps so many streamed requests under way. A signal to the server turns the timing
and counting of requests off and on between windows of some seconds; the ratio of tokens a second is taken between
neighbouring windows, on to off, so that a slow spell of the machine falls on both. Off means that the gate's
observations note nothing of a request but its beginning; vLLM's own metrics stay on, and so does the page that
Prometheus would read.

A machine's unevenness can be larger than what is looked for. So the processor time that is spent in the
observations is also taken while they are on, with some of what it costs to take it, as a share of the time that
passed: all requests go through one thread, which can do nothing else meanwhile. Last, the page is read a few
times.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "loadtests")]

SERVE = "--serve"


def serve(arguments: list[str]) -> int:
    """The server, with a switch: SIGUSR1 turns our metrics off, SIGUSR2 on.

    At each signal the file that is named first gets a line: processor seconds in the observations, and the clock.
    """
    from qaa_serve.cli import main as run
    from qaa_serve.server import metrics

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


def main() -> int:
    if sys.argv[1:2] == [SERVE]:
        return serve(sys.argv[2:])
    from server_process import ServerProcess

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
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
    figures = {
        "command": shlex.join(["python", "benchmarks/metrics_cost.py", *sys.argv[1:]]),
        "tokens_per_second": statistics.median(rate for _, rate in windows),
        "loss_percent_median": loss,
        "loss_percent_quartiles": [quartiles[2], quartiles[0]],
        "time_in_observations_percent": {"median": statistics.median(shares), "most": max(shares)},
        "milliseconds_to_read_the_page": 1e3 * page_s,
    }
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
