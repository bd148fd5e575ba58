"""A server in a process group of its own, on a free port of 127.0.0.1, with its log in a file."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import httpx
import psutil
from fork_server import SERVING, ForkedProcess, ForkServer
from openai import OpenAI

BIN = Path(sys.executable).parent
START_LIMIT_S = 480

#: The admin key of servers that are given no other.
ADMIN_KEY = "admin-of-the-tests"

#: Below those that Linux gives to whoever asks for any: such a one can go to another before a server is up.
PORTS = range(12_000, 32_000)
_given: set[int] = set()

#: Engine and worker are one process, with one thread for all arithmetic: two on two cores, which wait for each
#: other by spinning, starve the client, who then sees its own pauses of a second and more.
ONE_PROCESS = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def plain_environment() -> dict[str, str]:
    """That of these tests without what keeps their own engines in one process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "HF_"))}
    return environment | {"PYTHONUNBUFFERED": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@cache
def serving_server() -> ForkServer:
    """Forks servers, and what else needs vLLM, in a sixth of the time."""
    return ForkServer(SERVING, plain_environment() | ONE_PROCESS)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody takes before a server does: pytest's workers have different ones."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = PORTS[worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    while True:
        port = random.SystemRandom().choice(mine)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


class ServerProcess:
    """`command` with --port added; `wait_until` is what its log says when it serves.

    `measuring`: in ONE_PROCESS, unless the command says how many. `forked`: so too, by `serving_server`.
    `watched`: `outside` gets every address elsewhere that one of its processes is connected with.
    """

    def __init__(
        self,
        command: list[str],
        log: Path,
        wait_until: str = "Ready on",
        *,
        forked: bool = False,
        measuring: bool = False,
        watched: bool = False,
        environment: Mapping[str, str] | None = None,
    ):
        self.port = free_port()
        self.log = log
        self._wait_until = wait_until
        self.outside: set[str] = set()
        given = environment or {}
        environment = plain_environment()
        environment["XDG_DATA_HOME"] = str(log.with_name(f"{log.name}.data"))  # has uploads without --adapters
        if "--admin-key-file" not in command:
            environment["QAA_SERVE_ADMIN_KEY"] = ADMIN_KEY
        if forked or measuring:
            environment |= ONE_PROCESS
            if "--distributed-executor-backend" not in command:
                command = [*command, "--distributed-executor-backend", "uni"]
        command = [*command, "--port", str(self.port)]
        self.process: subprocess.Popen[bytes] | ForkedProcess
        with log.open("wb") as output:
            if forked:
                self.process = serving_server().start(command, environment | dict(given), log)
            else:
                self.process = subprocess.Popen(
                    [str(BIN / command[0]), *command[1:]],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment | dict(given),
                    start_new_session=True,
                )
        self._tree = psutil.Process(self.process.pid)
        self._watching = threading.Event()
        if watched:
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def admin(self, key: str = ADMIN_KEY) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def adapter(self, name: str) -> dict:
        """What the server says of an adapter."""
        with self.admin() as admin:
            return admin.get(f"/v1/adapters/{name}").json()

    def adapters(self) -> dict[str, dict]:
        """What it says of all."""
        with self.admin() as admin:
            return {item["id"]: item for item in admin.get("/v1/adapters").json()["data"]}

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self, limit_s: float = START_LIMIT_S) -> ServerProcess:
        deadline = time.monotonic() + limit_s
        while self._wait_until not in self.text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not start; its log ends with:\n{self.text()[-4000:]}")
            time.sleep(0.2)
        with suppress(httpx.HTTPError):  # it may listen elsewhere
            deadline = min(deadline, time.monotonic() + 120)
            while httpx.get(f"{self.url}/ready", timeout=60).json().get("unchecked"):
                assert time.monotonic() < deadline, (
                    f"adapters are not checked; the log ends with:\n{self.text()[-4000:]}"
                )
                time.sleep(0.1)
        return self

    def family(self) -> list[psutil.Process]:
        """The server and all processes it started, running now."""
        try:
            return [self._tree, *self._tree.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @contextmanager
    def held(self) -> Iterator[None]:
        """The engine stands still: what it was asked for stays under way, however fast it is or slow the test."""
        engine = self.family()[1:]
        assert engine
        try:
            for process in engine:
                process.suspend()
            yield
        finally:
            for process in engine:
                process.resume()

    def wait_exit(self, limit_s: float = 60) -> int:
        return self.process.wait(limit_s)

    def stop(self) -> None:
        """End what is left of the process group; for teardown."""
        self._watching.set()
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def _watch(self) -> None:
        """Note every connection of the server's processes that leaves this machine."""
        while not self._watching.wait(0.1):
            for process in self.family():
                try:
                    connections = process.net_connections(kind="inet")
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                for connection in connections:
                    if connection.raddr and not connection.raddr.ip.startswith(("127.", "::1", "::ffff:127.")):
                        self.outside.add(connection.raddr.ip)


def serve_command(example: str) -> list[str]:
    """What `make serve` runs for an example, without the port and what puts engine and server into one process."""
    root = Path(__file__).parents[1]
    made = subprocess.run(
        ["make", "-n", "serve", f"EXAMPLE={example}"], cwd=root, check=True, capture_output=True, text=True
    )
    (line,) = (
        line for line in made.stdout.splitlines() if "qaa-serve serve " in line
    )  # make says more within make
    words = line.partition("qaa-serve serve ")[2].split()
    for option in ("--port", "--distributed-executor-backend"):
        at = words.index(option)
        del words[at : at + 2]
    return ["qaa-serve", "serve", *(str(root / word) if word.startswith("examples/") else word for word in words)]


def gone(processes: list[psutil.Process], limit_s: float = 40) -> list[psutil.Process]:
    """Those of the processes that still run after the time limit."""
    _, alive = psutil.wait_procs(processes, timeout=limit_s)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
