"""The locust file, run headless against a stand-in for an OpenAI-compatible server whose delays are known."""

from __future__ import annotations

import asyncio
import csv
import json
import subprocess
import sys
import threading
import time
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
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LOADTESTS = Path(__file__).resolve().parents[1] / "loadtests"
FIRST_S = 0.15
GAP_S = 0.03
KINDS = {"one": "QAA", "two": "QAA", "three": "LORA"}


@dataclass
class Stub:
    """What the stand-in serves, and what it was asked."""

    port: int
    models: tuple[str, ...] = ("base", "one", "two", "three")
    tells_kinds: bool = True
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    puts: list[tuple[str, str, str]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def list_models(self, request: Request) -> Response:
        parents = {name: None if name.startswith("base") else "base" for name in self.models}
        return JSONResponse({"data": [{"id": name, "parent": parent} for name, parent in parents.items()]})

    async def list_adapters(self, request: Request) -> Response:
        if not self.tells_kinds:
            return JSONResponse({"detail": "Not Found"}, 404)
        return JSONResponse({"data": [{"id": name, "kind": kind} for name, kind in KINDS.items()]})

    async def put_adapter(self, request: Request) -> Response:
        path = (await request.json())["path"]
        self.puts.append((request.path_params["name"], path, request.headers.get("authorization", "")))
        return JSONResponse(
            {} if path != "missing" else {"error": "no such path"}, 200 if path != "missing" else 404
        )

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append((request.url.path, body))
        if body["model"] == "base-busy":
            return JSONResponse({"error": {"message": "later"}}, 429, {"Retry-After": "0.3"})
        if body["model"] == "base-down":
            return JSONResponse({"error": {"message": "the engine is gone"}}, 500)
        if body.get("stream"):
            return StreamingResponse(self.stream(body), media_type="text/event-stream")
        await asyncio.sleep(FIRST_S + GAP_S * (body["max_tokens"] - 1))
        usage = {"prompt_tokens": 5, "completion_tokens": body["max_tokens"]}
        return JSONResponse({"choices": [{"text": "word"}], "usage": usage})

    async def stream(self, body: dict[str, Any]) -> Any:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if "messages" in body:
                yield _event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            for i in range(body["max_tokens"]):
                await asyncio.sleep(GAP_S if i else FIRST_S)
                if body["model"] == "base-broken" and i:
                    yield _event({"error": {"message": "the worker died"}})
                    break
                yield _event(
                    {"choices": [{"delta": {"content": "word"}} if "messages" in body else {"text": "word"}]}
                )
            usage = {"prompt_tokens": 5, "completion_tokens": body["max_tokens"]}
            yield _event({"choices": [], "usage": usage})
            if body["model"] != "base-cut":
                yield "data: [DONE]\n\n"
        finally:
            self.under_way -= 1


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


@pytest.fixture(scope="module")
def server():
    stub = Stub(free_port())
    app = Starlette(
        routes=[
            Route("/v1/models", stub.list_models),
            Route("/v1/adapters", stub.list_adapters),
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
    server.models, server.tells_kinds = Stub.models, True
    server.bodies.clear()
    server.puts.clear()
    server.most_under_way = 0
    return server


@dataclass
class Done:
    """What a run of locust left."""

    status: int
    output: str
    directory: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text())

    def entries(self) -> dict[tuple[str, str], dict[str, str]]:
        """Locust's statistics by type and name."""
        with (self.directory / "load_stats.csv").open() as file:
            return {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}


def run_locust(stub: Stub, directory: Path, *options: str, seconds: int = 3) -> Done:
    command = [
        sys.executable, "-m", "locust", "-f", str(LOADTESTS / "locustfile.py"), "--host", stub.url, "--headless",
        "--csv", str(directory / "load"), "--csv-full-history", "--html", str(directory / "report.html"),
        "--summary", str(directory / "summary.json"), "--only-summary", "--stop-timeout", "2",
        "--prompt-tokens", "uniform:8-40", "--output-tokens", "fixed:5", "--run-time", f"{seconds}s", *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=directory)
    return Done(done.returncode, done.stdout + done.stderr, directory)


def test_closed_users_are_timed_by_class_and_adapters_swapped_meanwhile(stub, tmp_path):
    done = run_locust(
        stub, tmp_path, "-u", "6", "-r", "100", "--endpoint", "mix", "--stream-share", "0.8",
        "--popularity", "zipf:1", "--mix", "base=0.4,qaa=0.4,lora=0.2",
        "--swap", "two=here,there", "--swap-every", "0.5", "--admin-key", "top", "--api-key", "secret",
        "--slo-ttft-ms", "1500", "--slo-inter-token-ms", "500", "--slo-attainment", "0.9",
        seconds=5,
    )  # fmt: skip
    assert done.status == 0, done.output
    entries, summary = done.entries(), done.summary
    for name in ("base", "qaa", "lora"):
        first = float(entries["TTFT", name]["Median Response Time"])
        gap = float(entries["inter-token", name]["Average Response Time"])
        assert 1000 * FIRST_S * 0.95 <= first <= 1000 * FIRST_S * 4
        assert 1000 * GAP_S * 0.9 <= gap <= 1000 * GAP_S * 4
        assert FIRST_S * 0.95 <= summary["classes"][name]["ttft_s"]["p50"] <= FIRST_S * 4
        assert ("end-to-end", name) in entries
        assert ("tokens/s", name) in entries
    # All HTTP requests are answered requests, swaps among them, and nothing else is in locust's total.
    answered, swaps = summary["all"]["answered"], summary["swaps"]["two"]["done"]
    assert int(entries["", "Aggregated"]["Request Count"]) == answered + swaps
    assert answered == len(stub.bodies) - summary["all"]["unfinished"]
    assert summary["all"]["tokens"] == 5 * answered
    assert summary["all"]["prompt_tokens"] == 5 * answered
    assert summary["slo"]["met"] is True
    assert summary["slo"]["attainment"] >= 0.9
    streamed = sum(body.get("stream", False) for _, body in stub.bodies)
    assert 0.5 < streamed / len(stub.bodies) < 1
    assert {path for path, _ in stub.bodies} == {"/v1/chat/completions", "/v1/completions"}
    # Swaps: the first before the load, then every half second, in turn, with the admin's key.
    assert stub.puts[:3] == [("two", path, "Bearer top") for path in ("here", "there", "here")]
    assert swaps in (len(stub.puts), len(stub.puts) - 1), "the end may have cut one off"
    assert "secret" not in (tmp_path / "summary.json").read_text()
    assert "<html" in (tmp_path / "report.html").read_text()[:2000]
    assert (tmp_path / "load_stats_history.csv").stat().st_size > 0

    made = subprocess.run(
        [sys.executable, str(LOADTESTS / "report.py"), "summary.json", "--csv", "load", "--output", "out"],
        capture_output=True, text=True, timeout=180, cwd=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    assert "SLO" in report
    assert "two" in report
    for name in ("throughput", "first-token", "inter-token", "attainment"):
        assert f"{name}.png" in report
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_poisson_arrivals_do_not_wait_and_a_missed_slo_is_the_exit_status(stub, tmp_path):
    stub.tells_kinds = False
    done = run_locust(
        stub, tmp_path, "--arrivals", "poisson:30", "--slo-ttft-ms", "20", "--slo-attainment", "0.5", "-u", "3",
        seconds=2,
    )  # fmt: skip
    assert done.status == 3, done.output
    summary = done.summary
    assert summary["open"]["sent"] == len(stub.bodies)
    assert 25 <= summary["open"]["sent"] <= 110
    assert stub.most_under_way >= 3
    assert set(summary["classes"]) == {"base", "adapter"}
    assert summary["all"]["failed"] == 0
    assert summary["slo"]["attainment"] == 0
    assert summary["slo"]["met"] is False
    assert (tmp_path / "report.html").exists()


def test_requests_beyond_max_open_wait_and_count_as_late_from_when_they_were_due(stub, tmp_path):
    done = run_locust(stub, tmp_path, "--arrivals", "bursty:40,2", "--max-open", "2", seconds=2)
    assert done.status == 0, done.output
    assert stub.most_under_way == 2
    summary = done.summary
    assert summary["open"]["late"] > 0
    assert summary["all"]["ttft_s"]["max"] > 2 * FIRST_S
    assert "late" in done.output


def test_errors_cut_streams_and_refusals_are_told_apart(stub, tmp_path):
    stub.models = ("base", "base-broken", "base-cut", "base-busy", "base-down")
    done = run_locust(stub, tmp_path, "-u", "10", "-r", "100", "--popularity", "distinct", seconds=2)
    assert done.status == 1, done.output
    summary = done.summary
    asked = [body["model"] for _, body in stub.bodies]
    assert summary["failures"]["error in the stream: the worker died"] > 0
    assert summary["failures"]["the stream ended without [DONE]"] > 0
    assert summary["failures"]["500 the engine is gone"] == asked.count("base-down")
    assert len(summary["failures"]) == 3
    assert summary["all"]["refused"] == asked.count("base-busy")
    assert sum(summary["failures"].values()) == summary["all"]["failed"]
    assert summary["all"]["tokens"] == 5 * summary["all"]["answered"]
    refused = done.entries()["POST", "/v1/chat/completions (stream) (429)"]
    assert int(refused["Request Count"]) == asked.count("base-busy")
    assert refused["Failure Count"] == "0"


def test_a_ramp_adds_users_and_reports_the_knee(stub, tmp_path):
    done = run_locust(stub, tmp_path, "--ramp", "2:3", "-u", "4", seconds=30)
    assert done.status == 0, done.output
    ramp = done.summary["ramp"]
    assert [step["users"] for step in ramp["steps"]] == [2, 4]
    assert ramp["knee"]["users"] == 4
    assert "most users" in ramp["ended"]
    assert "knee: 4 users" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mix", "base=1,prefix=1"], "no such model; it has: base (1), lora (1), qaa (2)"),
        (["--swap", "one=missing,here"], "no such path"),
        (["--arrivals", "often"], "closed, poisson:RATE or bursty:RATE,CV"),
        (["--arrivals", "poisson:2", "--ramp", "2:5"], "--ramp adds users"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_options_that_cannot_be_carried_out_end_it_and_say_why(stub, tmp_path, options, message):
    done = run_locust(stub, tmp_path, *options, seconds=5)
    assert done.status == 2, done.output
    assert message in " ".join(done.output.split())
    assert stub.bodies == []
