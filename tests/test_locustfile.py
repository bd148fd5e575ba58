"""The locust file, run headless against a stand-in for an OpenAI-compatible server whose delays are known."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("locust") is None:  # importing it here would patch the sockets of every test
    pytest.skip("locust is not installed", allow_module_level=True)
pytestmark = pytest.mark.slow

import uvicorn
from server_process import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

ROOT = Path(__file__).resolve().parents[1]
LOADTESTS = ROOT / "loadtests"
WARM_S, COLD_S = 0.1, 0.4
GAP_S = 0.02
TOKENS = 3
DIGEST = "0123456789ab"
ADAPTERS = tuple(f"a{i:02}" for i in range(14))


@dataclass
class Stub:
    """What the stand-in serves, and what it was asked. Its memory holds the last five adapters."""

    port: int
    models: tuple[str, ...] = ("base", *ADAPTERS)
    tells_tiers: bool = True
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    puts: list[tuple[str, str, str]] = field(default_factory=list)
    checked: set[str] = field(default_factory=set)
    memory: OrderedDict[str, None] = field(default_factory=OrderedDict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def list_models(self, request: Request) -> Response:
        parents = {name: None if name.startswith("base") else "base" for name in self.models}
        return JSONResponse({"data": [{"id": name, "parent": parent} for name, parent in parents.items()]})

    def describe(self, name: str) -> dict[str, Any]:
        slot = 1 if self.memory and name == next(reversed(self.memory)) else 0
        return {
            "id": name,
            "state": "served" if name in self.checked else "known",
            "kind": ("LORA" if name == "a00" else "QAA") if name in self.checked else None,
            "bytes": {"store": 9, "host": int(name in self.memory), "slot": slot}
            if name in self.checked
            else None,
            "revisions": [{"revision": f"{name}@{DIGEST}", "bytes": {"store": 9, "host": 7, "slot": 0}}],
        }

    async def list_adapters(self, request: Request) -> Response:
        if not self.tells_tiers:
            return JSONResponse({"detail": "Not Found"}, 404)
        return JSONResponse({"data": [self.describe(name) for name in self.models if name in ADAPTERS]})

    async def get_adapter(self, request: Request) -> Response:
        return JSONResponse(self.describe(request.path_params["name"]))

    async def put_adapter(self, request: Request) -> Response:
        path = (await request.json())["path"]
        self.puts.append((request.path_params["name"], path, request.headers.get("authorization", "")))
        return JSONResponse({}, 404 if path == "missing" else 200)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            "# TYPE qaa_requests counter\n"
            f'qaa_requests_total{{adapter="a00",outcome="success"}} {100 + len(self.bodies)}\n'
            f'qaa_requests_total{{adapter="a01",outcome="success"}} 100\n'
        )

    def load(self, model: str) -> float:
        """Seconds to the first token of a model, which is in memory then."""
        if model not in ADAPTERS:
            return WARM_S
        warm = model in self.memory
        self.checked.add(model)
        self.memory[model] = None
        self.memory.move_to_end(model)
        while len(self.memory) > 5:
            self.memory.popitem(last=False)
        return WARM_S if warm else COLD_S

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append((request.url.path, body))
        if body["model"] == "base-busy":
            return JSONResponse({"error": {"message": "later"}}, 429, {"Retry-After": "0.3"})
        if body["model"] == "base-down":
            return JSONResponse({"error": {"message": "the engine is gone"}}, 500)
        first = self.load(body["model"])
        if body.get("stream"):
            return StreamingResponse(self.stream(body, first), media_type="text/event-stream")
        await asyncio.sleep(first)
        return JSONResponse(
            {"choices": [{"text": "word"}], "usage": {"prompt_tokens": 5, "completion_tokens": TOKENS}}
        )

    async def stream(self, body: dict[str, Any], first: float) -> Any:
        chat = "messages" in body
        if chat:
            yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for i in range(TOKENS):
            await asyncio.sleep(GAP_S if i else first)
            if body["model"] == "base-broken" and i:
                yield _event({"error": {"message": "the worker died"}})
                break
            yield _event({"choices": [{"delta": {"content": "word"}} if chat else {"text": "word"}]})
        yield _event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": TOKENS}})
        if body["model"] != "base-cut":
            yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


@pytest.fixture(scope="module")
def server():
    stub = Stub(free_port())
    app = Starlette(
        routes=[
            Route("/metrics", stub.metrics),
            Route("/v1/models", stub.list_models),
            Route("/v1/adapters", stub.list_adapters),
            Route("/v1/adapters/{name}", stub.get_adapter),
            Route("/v1/adapters/{name}", stub.put_adapter, methods=["PUT"]),
            Route("/v1/chat/completions", stub.answer, methods=["POST"]),
            Route("/v1/completions", stub.answer, methods=["POST"]),
        ]
    )
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", stub.port, log_level="warning"))
    thread = threading.Thread(target=uvicorn_server.run, daemon=True)
    thread.start()
    while not uvicorn_server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield stub
    uvicorn_server.should_exit = True
    thread.join(10)


@pytest.fixture
def stub(server):
    server.models, server.tells_tiers = Stub.models, True
    for kept in (server.bodies, server.puts, server.checked, server.memory):
        kept.clear()
    return server


@dataclass
class Done:
    """What a run of locust left."""

    status: int
    output: str
    directory: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "out" / "summary.json").read_text())

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "out" / "records.jsonl").read_text().splitlines()]

    def entries(self) -> dict[tuple[str, str], dict[str, str]]:
        """Locust's statistics by type and name."""
        with (self.directory / "load_stats.csv").open() as file:
            return {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}


def run_locust(stub: Stub, directory: Path, *options: str, seconds: int = 3, file: Path | None = None) -> Done:
    command = [
        sys.executable, "-m", "locust", "-f", str(file or LOADTESTS / "locustfile.py"), "--host", stub.url,
        "--headless", "--csv", str(directory / "load"), "--report", "out", "--only-summary", "--stop-timeout", "2",
        "--prompt-tokens", "uniform:8-40", "--output-tokens", "fixed:5", "--run-time", f"{seconds}s", *options,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(LOADTESTS)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=directory, env=environment)
    return Done(done.returncode, done.stdout + done.stderr, directory)


def test_cold_adapters_are_told_from_warm_ones_and_throughput_from_their_share(stub, tmp_path):
    done = run_locust(
        stub, tmp_path, "-u", "4", "-r", "100", "--warm-up", "2", "--cold-share", "0,1", "--turn", "3",
        "--hot", "2", "--base-share", "0.2", "--api-key", "it's secret", "--admin-key=top'secret",
        "--slo-ttft-ms", "300", "--slo-share", "0.2",
        seconds=12,  # 8 and what a busy machine needs to begin
    )  # fmt: skip
    assert done.status == 0, done.output
    summary, records = done.summary, done.records
    assert len(records) == len(stub.bodies)
    # Of the measured time alone: the warm-up's requests are in the records only.
    measured = [record for record in records if record["at"] >= 2]
    assert summary["all"]["answered"] == sum(record["outcome"] == "answered" for record in measured)
    assert 0 < len(measured) < len(records)
    tiers = summary["tiers"]
    for tier in ("base", "host"):
        assert WARM_S <= tiers[tier]["ttft_s"]["p50"] <= 2.5 * WARM_S
    assert COLD_S <= tiers["store"]["ttft_s"]["p50"] <= 2.5 * COLD_S
    assert GAP_S * 0.9 <= summary["all"]["inter_token_s"]["p50"] <= 3 * GAP_S
    assert summary["ttft_s"]["cold"]["p50"] > 2 * summary["ttft_s"]["warm"]["p50"]
    # One turn with none cold and one with all, and there may be another.
    warm, cold, *_ = summary["turns"]
    assert (warm["asked_cold"], cold["asked_cold"]) == (0, 1)
    assert warm["cold_share"] <= 0.2
    assert cold["cold_share"] >= 0.8
    assert warm["requests_per_second"] > 1.5 * cold["requests_per_second"]
    # The stand-in's adapters had no kind before they were asked for.
    assert set(summary["kinds"]) <= {"base", "qaa", "lora"}
    assert {record["kind"] for record in records} >= {"base", "qaa"}
    assert summary["all"]["tokens"] == TOKENS * summary["all"]["answered"]
    # The SLO leaves out those that were cold.
    assert summary["slo"]["met"] is True
    assert summary["all"]["attainment"] < 0.9

    assert "First token of a cold adapter" in done.output
    assert "secret" not in (tmp_path / "out" / "summary.json").read_text()
    page = (tmp_path / "out" / "report.md").read_text()
    assert "secret" not in page
    assert {"| 0% ", "| 100% "} <= {
        line[: line.index("|", 1)] for line in page.splitlines() if line.startswith("| ")
    }
    (series,) = (line for line in page.splitlines() if "qaa_requests_total" in line)
    change = int(series.split("|")[2])
    assert abs(change - len(measured)) <= 8, "what was asked for after the warm-up, and what ran when it ended"
    for name in ("first-token", "cold-share", "time"):
        assert f"{name}.png" in page
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_locusts_tables_have_first_tokens_by_tier_beside_the_requests(stub, tmp_path):
    done = run_locust(
        stub, tmp_path, "-u", "4", "-r", "100", "--swap", "a03=here,there", "--swap-every", "0.5",
        "--admin-key", "top", "--models", "a03,a04", seconds=4,
    )  # fmt: skip
    assert done.status == 0, done.output
    entries = done.entries()
    firsts = [row for (kind, _), row in entries.items() if kind == "TTFT"]
    assert {name for kind, name in entries if kind == "TTFT"} >= {"source", "host", "device"}
    assert 1000 * WARM_S <= float(entries["TTFT", "host"]["Median Response Time"]) <= 2500 * WARM_S
    assert sum(int(row["Request Count"]) for row in firsts) > 10
    # Aggregated has the HTTP requests and swaps alone; locust writes its tables a second before the end.
    asked = len(stub.bodies) + len(stub.puts) - 1
    assert 0.5 * asked <= int(entries["", "Aggregated"]["Request Count"]) <= asked
    assert {body["model"] for _, body in stub.bodies} == {"a03", "a04"}
    assert {path for path, _ in stub.bodies} == {"/v1/chat/completions", "/v1/completions"}
    # The first is published before the load, then one every half second, in turn, with the admin's key.
    assert stub.puts[:3] == [("a03", path, "Bearer top") for path in ("here", "there", "here")]
    assert done.summary["swaps"]["a03"]["failed"] == 0


def test_a_missed_slo_is_the_exit_status_and_a_server_need_not_tell_tiers(stub, tmp_path):
    stub.tells_tiers = False
    done = run_locust(stub, tmp_path, "--slo-ttft-ms", "20", "-u", "3", "ChatUser", seconds=2)
    assert done.status == 3, done.output
    summary = done.summary
    assert set(summary["kinds"]) == {"adapter"}
    assert set(summary["tiers"]) == {"unknown"}
    assert summary["cold_share"] is None
    assert (summary["all"]["failed"], summary["all"]["attainment"], summary["slo"]["met"]) == (0, 0, False)
    assert {path for path, _ in stub.bodies} == {"/v1/chat/completions"}


def test_errors_cut_streams_and_refusals_are_told_apart(stub, tmp_path):
    stub.models = ("base", "base-broken", "base-cut", "base-busy", "base-down")
    done = run_locust(stub, tmp_path, "-u", "10", "-r", "100", seconds=2)
    assert done.status == 1, done.output
    summary = done.summary
    asked = Counter(body["model"] for _, body in stub.bodies)
    assert summary["failures"]["error in the answer: the worker died"] > 0
    assert summary["failures"]["the stream ended without [DONE]"] > 0
    assert summary["failures"]["500 the engine is gone"] == asked["base-down"]
    assert len(summary["failures"]) == 3
    assert summary["all"]["refused"] == asked["base-busy"]
    assert sum(summary["failures"].values()) == summary["all"]["failed"]
    assert summary["all"]["tokens"] == TOKENS * summary["all"]["answered"]


def test_several_processes_add_up(stub, tmp_path):
    done = run_locust(stub, tmp_path, "-u", "4", "-r", "100", "--processes", "2", seconds=5)
    assert done.status == 0, done.output
    assert len(done.records) == len(stub.bodies)
    assert done.summary["all"]["answered"] == sum(record["outcome"] == "answered" for record in done.records)
    assert len({body["model"] for _, body in stub.bodies}) > 8


def test_users_of_ones_own_choose_what_they_ask_for(stub, tmp_path):
    stub.checked.add("a05")
    (tmp_path / "mine.py").write_text(
        "from adapter_users import AdapterUser\n"
        "from locust import constant, task\n"
        "class Support(AdapterUser):\n"
        "    wait_time = constant(0.1)\n"
        "    stream = False\n"
        "    @task\n"
        "    def question(self):\n"
        "        assert self.complete('a05@0123456789ab', 'Where is my order?', 7, temperature=0).answered\n"
    )
    done = run_locust(stub, tmp_path, "-u", "2", "--extra-body", '{"ignore_eos": true}', file=tmp_path / "mine.py")
    assert done.status == 0, done.output
    (asked,) = {json.dumps([path, body], sort_keys=True) for path, body in stub.bodies}
    assert json.loads(asked) == [
        "/v1/completions",
        {
            "model": f"a05@{DIGEST}", "prompt": "Where is my order?", "max_tokens": 7, "temperature": 0,
            "ignore_eos": True,
        },
    ]  # fmt: skip
    assert {record["tokens"] for record in done.records if record["outcome"] == "answered"} == {TOKENS}
    assert {record["first_s"] for record in done.records} == {None}
    assert {(record["kind"], record["tier"]) for record in done.records} == {("qaa", "host")}, "the revision's"


def test_with_a_tokenizer_prompts_are_exactly_as_long_as_was_asked_for(stub, tmp_path):
    from tokenizers import Tokenizer

    tokenizer = ROOT / "examples" / "assistant" / "base" / "tokenizer.json"
    done = run_locust(
        stub, tmp_path, "--tokenizer", str(tokenizer), "--prompt-tokens", "fixed:33", "CompletionUser", seconds=2
    )
    assert done.status == 0, done.output
    read = Tokenizer.from_file(str(tokenizer))
    lengths = [len(read.encode(body["prompt"], add_special_tokens=False).ids) for _, body in stub.bodies]
    assert set(lengths) == {33}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--swap", "a01=missing,here"], "--swap a01: 404"),
        (["--popularity", "often"], "uniform, zipf:EXPONENT or distinct"),
        (["--cold-share", "0,2"], "2 is not from 0 to 1"),
        (["--cold-share", "0,1", "--hot", "14"], "of 14 adapters 14 are to be hot"),
        (["--models", "b*"], "fits none of: a00, a01"),
        (["--tokenizer", "nowhere"], "the tokenizer nowhere cannot be read"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_options_that_cannot_be_carried_out_end_it_and_say_why(stub, tmp_path, options, message):
    done = run_locust(stub, tmp_path, *options, seconds=5)
    assert done.status == 2, done.output
    assert message in " ".join(done.output.split())
    assert stub.bodies == []


@pytest.mark.vllm
def test_make_load_loads_the_example_on_the_real_server_and_leaves_a_report(tmp_path):
    make = ["make", "-n", "load", f"VENV={sys.prefix}"]
    made = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True)
    joined = made.stdout.replace("\\\n", " ")
    (line,) = (line for line in joined.splitlines() if "run_example.py" in line)
    words = shlex.split(line)
    given = {"--port": str(free_port()), "--seconds": "8", "--output": str(tmp_path / "out")}
    for option, value in given.items():
        words[words.index(option) + 1] = value
    words[words.index("--") : words.index("--")] = ["--warm-up", "2", "--turn", "2"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    done = Done(0, "", tmp_path)
    assert done.summary["failures"] == {}
    assert set(done.summary["kinds"]) >= {"base", "qaa", "lora"}
    assert {"source", "store"} & set(done.summary["tiers"])
    assert {"host", "device"} & set(done.summary["tiers"])
    assert done.summary["ttft_s"]["cold"]["count"] > 0
    assert done.summary["swaps"]["swapping"]["failed"] == 0
    # The server counted what locust did.
    before, after = (done.summary["server"][which] for which in ("before", "after"))
    success = 'qaa_requests_total{outcome="success"}'
    assert after[success] == sum(record["outcome"] == "answered" for record in done.records)
    assert before[success] < after[success]
    assert "![cold-share](cold-share.png)" in (tmp_path / "out" / "report.md").read_text()


def test_run_by_itself_the_locust_file_explains_our_options_beside_locusts():
    told = subprocess.run(
        [sys.executable, str(LOADTESTS / "locustfile.py"), "--help"], capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr
    for option in ("--cold-share", "--warm-up", "--tokenizer", "--report", "--run-time", "--processes"):
        assert option in told.stdout
