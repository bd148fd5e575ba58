"""Two real servers over one adapters directory, a real nginx before them, a real Prometheus that scrapes them."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

import faults
import try_stack
from faults import PROMPTS, Stage, rename_into_place
from server_process import ADMIN_KEY, ServerProcess, free_port, gone
from test_deploy import tool
from try_stack import Stack, query

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return Stage.make(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def servers(stage):
    """Two replicas: they share nothing but the adapters directory."""
    with ExitStack() as stack:
        started = []
        for i in range(2):
            command = [
                "qaa-serve", str(stage.base), "--adapters", str(stage.adapters), "--dtype", "float32",
                "--kv-cache-memory-bytes", "64M", "--max-loras", "4", "--max-num-seqs", "16",
                "--adapters-quiet", "0.5", "--state-dir", str(stage.root / f"state-{i}"),
                "--disable-uvicorn-access-log",
            ]  # fmt: skip
            started.append(ServerProcess(command, stage.root / f"server-{i}.log", forked=True))
            stack.callback(started[-1].stop)
        yield [server.wait_ready() for server in started]


@pytest.fixture(scope="module")
def prometheus(stage, servers):
    """Prometheus' URL; it scrapes both servers every second and evaluates the rules of deploy/."""
    tool("prometheus", "apt-get install prometheus")
    directory = stage.root / "prometheus"
    directory.mkdir()
    with Stack(directory) as stack:
        yield stack.start_prometheus([server.port for server in servers], interval="1s")


@pytest.fixture(scope="module")
def front(stage, servers):
    """nginx as deploy/ configures it."""
    tool("nginx", "apt-get install nginx-light")
    directory = stage.root / "front"
    directory.mkdir()
    with Stack(directory) as stack:
        yield stack.start_nginx(free_port(), [server.port for server in servers])


def fetch(url):
    return httpx.get(url, timeout=60).json()


def values(prometheus: str, expression: str, *labels: str) -> dict[tuple[str, ...], float]:
    found = {
        tuple(r["metric"].get(label, "") for label in labels): float(r["value"][1])
        for r in query(prometheus, expression)
    }
    return {key: value for key, value in found.items() if value}


def wait_until(condition, limit_s: float = 60) -> None:
    assert try_stack.wait_until(condition, limit_s)


def test_prometheus_agrees_with_what_the_clients_counted(servers, prometheus):
    """Requests and tokens exactly; latencies between what clients saw and what they cannot have missed."""
    expected_requests, expected_tokens, seconds = {}, {}, {}

    async def ask(client, i):
        name, endpoint = ("n0", "n2", "base")[i % 3], ("completions", "chat")[i % 2]
        stream, n = i % 4 < 2, 1 + (i % 5 == 0)
        common = {
            "model": name,
            "max_tokens": 5 + i % 3,
            "n": n,
            "stream": stream,
            "extra_body": {"ignore_eos": True},
        }
        if stream:
            common["stream_options"] = {"include_usage": True}
        begun = time.perf_counter()
        if endpoint == "chat":
            answer = await client.chat.completions.create(
                messages=[{"role": "user", "content": PROMPTS[i % 3]}], **common
            )
        else:
            answer = await client.completions.create(prompt=PROMPTS[i % 3], **common)
        usage = [chunk.usage async for chunk in answer][-1] if stream else answer.usage
        seconds.setdefault((name, endpoint), []).append(time.perf_counter() - begun)
        key = (name, endpoint, "success")
        expected_requests[key] = expected_requests.get(key, 0) + 1
        for kind, count in (("prompt", usage.prompt_tokens), ("generated", usage.completion_tokens)):
            expected_tokens[name, kind] = expected_tokens.get((name, kind), 0) + count

    async def ask_all():
        async with faults.openai_client(servers[0]) as client:
            await asyncio.gather(*(ask(client, i) for i in range(30)))
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="nobody", prompt="t5")
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="n0", prompt="t5", max_tokens=-1)
            with servers[0].admin() as admin:
                assert admin.post("/v1/adapters/n5/load").status_code == 200
            with servers[0].held():
                stream = await client.completions.create(
                    model="n5", prompt="t5", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
                )
                await stream.close()
                async with faults.Admin(servers[0].url, faults.Keys()) as admin, asyncio.timeout(30):
                    while (await admin.get("n5"))["running"]:
                        await asyncio.sleep(0.05)

    asyncio.run(ask_all())
    expected_requests[("unknown", "completions", "client_error")] = 1
    expected_requests[("n0", "completions", "client_error")] = 1
    expected_requests[("n5", "completions", "aborted")] = 1
    here = f'instance="127.0.0.1:{servers[0].port}"'
    labels = ("adapter", "endpoint", "outcome")
    wait_until(lambda: values(prometheus, f"qaa_requests_total{{{here}}}", *labels) == expected_requests)
    tokens = values(prometheus, f"qaa_tokens_total{{{here}}}", "adapter", "kind")
    cached = {key: tokens.pop(key) for key in list(tokens) if key[1] == "cached"}
    assert {key: count for key, count in tokens.items() if key[0] != "n5"} == expected_tokens
    assert all(count <= tokens[name, "prompt"] for (name, _), count in cached.items())
    assert values(prometheus, f"qaa_requests_in_flight{{{here}}}", "adapter") == {}
    sums = values(prometheus, f"qaa_request_seconds_sum{{{here}}}", "adapter", "endpoint")
    firsts = values(prometheus, f"qaa_time_to_first_token_seconds_sum{{{here}}}", "adapter", "endpoint")
    gaps = values(prometheus, f"qaa_inter_token_seconds_count{{{here}}}", "adapter", "endpoint")
    for key, mine in seconds.items():
        assert 0.02 * sum(mine) < sums[key] <= sum(mine) + 0.1 * len(mine), key
        assert 0 < firsts[key] < sums[key], key
        assert gaps[key] > 0


def test_every_query_of_dashboard_and_rules_finds_series(servers, prometheus):
    """Under a load of locust's, with a swap: nothing asks for a metric or label that is not there."""
    with servers[0].admin() as admin:
        assert admin.put("/v1/aliases/canary", json={"to": {"n0": 9, "n1": 1}}).status_code == 200
    stop, client = threading.Event(), servers[0].client()

    def ask_for_the_alias():
        while not stop.wait(0.5):
            client.completions.create(model="canary", prompt="t5", max_tokens=1)

    asking = threading.Thread(target=ask_for_the_alias)
    asking.start()
    locust = subprocess.run(
        [
            sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py"), "--headless",
            "--host", servers[0].url, "--users", "3", "--spawn-rate", "3", "--run-time", "12s",
            "--prompt-tokens", "fixed:8", "--output-tokens", "fixed:8", "--only-summary", "--admin-key", ADMIN_KEY,
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    stop.set()
    asking.join()
    assert locust.returncode == 0, locust.stdout[-2000:] + locust.stderr[-2000:]
    board = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "qaa-serve.json").read_text())
    text = json.dumps(board)
    expressions = sorted({json.loads(f'"{found}"') for found in re.findall(r'"expr": "((?:[^"\\]|\\.)*)"', text)})
    assert len(expressions) > 20
    empty = []
    for expression in expressions:
        filled = (
            expression.replace("$__rate_interval", "30s").replace("$__range", "1m").replace("$__interval", "5s")
        )
        filled = re.sub(r"\$\{?(namespace|job|instance|adapter|datasource)(:\w+)?\}?", ".*", filled)
        # What is there only when something is wrong: its other labels must find something all the same.
        filled = re.sub(r', outcome="\w+"', "", re.sub(r" (==|>) \d+$", "", filled))
        # These servers have no keys, for which tests/test_server_rules.py looks; and on a CPU no backend is timed.
        if "qaa_key_" in filled or "qaa_circuit_backend_seconds" in filled:
            continue
        if not query(prometheus, filled):
            empty.append(expression)
    assert empty == []
    rules = fetch(f"{prometheus}/api/v1/rules")["data"]["groups"]
    unhealthy = [
        (rule["name"], rule.get("lastError"))
        for group in rules
        for rule in group["rules"]
        if rule["health"] != "ok"
    ]
    assert unhealthy == []
    recorded = [rule["name"] for group in rules for rule in group["rules"] if rule["type"] == "recording"]
    assert [name for name in recorded if "qaa_key_" not in name and not query(prometheus, name)] == []


def test_replicas_agree_and_a_swap_reaches_both(servers, stage):
    listings = [{name: item["revision"] for name, item in server.adapters().items()} for server in servers]
    assert listings[0] == listings[1]
    rename_into_place(stage.version("n6", "B"), stage.adapters / "n6")
    expected = stage.revision("n6", "B")
    for server in servers:
        wait_until(lambda server=server: server.adapter("n6")["revision"] == expected)


def test_a_replica_is_killed_under_load_and_clients_lose_nothing(servers, stage, front):
    """Through nginx, with clients that retry as OpenAI's do: each request is answered, and rightly."""
    expected = stage.answers(PROMPTS[:2])
    wrong, answered = [], []
    killed = asyncio.Event()

    async def ask(client, i):
        for j in range(12):
            name, prompt = ("n0", "n1", "n3", "base")[(i + j) % 4], PROMPTS[j % 2]
            try:
                text = await faults.complete(client, name, prompt, stream=False)
            except Exception as error:
                wrong.append(repr(error))
                continue
            answered.append(name)
            if text != expected[name, "" if name == "base" else "A", prompt]:
                wrong.append(f"{name}: {text}")
            if len(answered) == 10 and not killed.is_set():
                killed.set()
                servers[1].process.kill()

    async def load():
        async with openai.AsyncOpenAI(base_url=f"{front}/v1", api_key="none", max_retries=4, timeout=60) as client:
            await asyncio.gather(*(ask(client, i) for i in range(4)))

    family = servers[1].family()
    asyncio.run(load())
    assert killed.is_set()
    assert wrong == []
    assert len(answered) == 48
    assert gone(family) == [], "the kernel ends engine and worker with their server"
