"""The stack without containers: two servers, nginx, Prometheus and, if it is here, Grafana, as processes.

    python deploy/try_stack.py            the bundled example, on a CPU, until Ctrl-C
    python deploy/try_stack.py --check    asks every model, ends one server, asks again; status 1 if that fails
    python deploy/try_stack.py --adapters DIR -- BASE --dtype float32    what follows -- goes to both servers

nginx, Prometheus and Grafana run as deploy/ configures them, with addresses of 127.0.0.1 in place of theirs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "assistant" / "adapters"

#: Debian's package of each program.
PACKAGES = {"nginx": "nginx-light", "prometheus": "prometheus"}
#: The example needs no larger KV cache; engine and worker of a server in one process start sooner.
SERVER_OPTIONS = ("--dtype", "float32", "--kv-cache-memory-bytes", "256M", "--adapter-cache-bytes", "256Mi")
SERVER_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
START_S = 480.0


class StackError(Exception):
    """Something does not run, or does not do what it should."""


def find(program: str) -> str | None:
    """The path of a program; Debian has servers where a user's PATH does not lead."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _replaced(text: str, changes: Mapping[str, str]) -> str:
    """The text with all changes made at once: what one puts in is not changed by another."""
    if missing := [old for old in changes if old not in text]:
        raise StackError(f"deploy/ has changed, and this script has not: the configuration has no {missing}")
    return re.sub("|".join(map(re.escape, changes)), lambda found: changes[found[0]], text)


def nginx_configuration(directory: Path, port: int, replicas: Sequence[int]) -> Path:
    """Write deploy/nginx/nginx.conf with files in a directory and other ports.

    Args:
        directory: for the configuration and all that nginx writes.
        port: where nginx listens.
        replicas: the two servers' ports.

    Returns:
        The configuration's path.
    """
    temporary = "".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    changes = {
        "user www-data;": "user root;" if os.geteuid() == 0 else "",
        "/run/nginx.pid": str(directory / "nginx.pid"),
        "/var/log/nginx/": f"{directory}/",
        "http {": "http {" + temporary,
        "        listen 80;": f"        listen 127.0.0.1:{port};",
        "        listen [::]:80;": "",
    }
    for number, replica in enumerate(replicas, 1):
        inner = free_port()
        changes[f"127.0.0.1:800{number}"] = f"127.0.0.1:{replica}"
        changes[f"127.0.0.1:801{number}"] = f"127.0.0.1:{inner}"
        changes[f"        801{number} "] = f"        {inner} "
    path = directory / "nginx.conf"
    path.write_text(_replaced((HERE / "nginx" / "nginx.conf").read_text(), changes))
    return path


def prometheus_configuration(directory: Path, port: int, servers: Sequence[int], interval: str = "15s") -> Path:
    """Write deploy/prometheus/prometheus.yml for other ports of this machine; returns its path."""
    targets = ", ".join(f"127.0.0.1:{server}" for server in servers)
    changes = {
        "qaa-serve:8000": targets,
        "localhost:9090": f"127.0.0.1:{port}",
        "_interval: 15s": f"_interval: {interval}",
        "scrape_timeout: 10s": f"scrape_timeout: {'1s' if interval == '1s' else '10s'}",
        "- rules.yml": f"- {HERE / 'prometheus' / 'rules.yml'}",
    }
    path = directory / "prometheus.yml"
    path.write_text(_replaced((HERE / "prometheus" / "prometheus.yml").read_text(), changes))
    return path


def grafana_configuration(directory: Path, prometheus: str) -> Path:
    """Write deploy/grafana/provisioning for a Prometheus at a URL; returns the folder."""
    folder = directory / "provisioning"
    shutil.copytree(HERE / "grafana" / "provisioning", folder)
    for name, old, new in (
        ("datasources/prometheus.yaml", "http://prometheus:9090", prometheus),
        ("dashboards/qaa-serve.yaml", "/var/lib/qaa-dashboards", str(HERE / "grafana" / "dashboards")),
    ):
        (folder / name).write_text(_replaced((folder / name).read_text(), {old: new}))
    return folder


class Stack(ExitStack):
    """The processes, each the leader of a group that ends with the stack.

    Attributes:
        directory: has a log of each process, NAME.log, and all that they write.
        processes: by name.
    """

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start a process; its output goes to its log."""
        with (self.directory / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self.processes[name] = process
        self.callback(_end, process)

    def wait_for(self, name: str, url: str, limit_s: float = START_S) -> None:
        """Wait until a process answers 200 at a URL.

        Raises:
            StackError: if it ends or takes longer; with the end of its log.
        """

        def answers() -> bool:
            if (status := self.processes[name].poll()) is not None:
                raise StackError(f"{name} ended with status {status}:\n{self._log_of(name)}")
            with suppress(httpx.TransportError):
                return httpx.get(url, timeout=30, trust_env=False).status_code == 200
            return False

        if not wait_until(answers, limit_s):
            raise StackError(f"{name} does not answer at {url}:\n{self._log_of(name)}")

    def start_nginx(self, port: int, servers: Sequence[int]) -> str:
        """Start nginx before two servers; returns its URL."""
        directory = self.directory / "nginx"
        directory.mkdir()
        configuration = nginx_configuration(directory, port, servers)
        self.start("nginx", [_needed("nginx"), "-p", directory, "-c", configuration, "-g", "daemon off;"])
        url = f"http://127.0.0.1:{port}"
        self.wait_for("nginx", f"{url}/ready", 60)
        return url

    def start_prometheus(self, servers: Sequence[int], interval: str = "15s") -> str:
        """Start a Prometheus that scrapes the servers; returns its URL."""
        port = free_port()
        configuration = prometheus_configuration(self.directory, port, servers, interval)
        command = [
            _needed("prometheus"), f"--config.file={configuration}", "--log.level=warn",
            f"--storage.tsdb.path={self.directory / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        self.start("prometheus", command)
        url = f"http://127.0.0.1:{port}"
        self.wait_for("prometheus", f"{url}/-/ready", 60)
        return url

    def start_grafana(self, program: str, prometheus: str) -> str:
        """Start Grafana with the dashboard, readable for all on this machine; returns its URL. Never run."""
        port = free_port()
        environment = {
            "GF_PATHS_PROVISIONING": str(grafana_configuration(self.directory, prometheus)),
            "GF_PATHS_DATA": str(self.directory / "grafana"),
            "GF_SERVER_HTTP_ADDR": "127.0.0.1",
            "GF_SERVER_HTTP_PORT": str(port),
            "GF_AUTH_ANONYMOUS_ENABLED": "true",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
            "GF_PLUGINS_PREINSTALL_DISABLED": "true",
        }
        self.start("grafana", [program, "server", "--homepath", "/usr/share/grafana"], environment)
        url = f"http://127.0.0.1:{port}"
        self.wait_for("grafana", f"{url}/api/health", 120)
        return url

    def start_server(self, name: str, port: int, adapters: Path, options: Sequence[str]) -> None:
        """Start a server with a state of its own."""
        command = [
            Path(sys.executable).with_name("qaa-serve"), "serve", *options, "--adapters", adapters,
            "--port", str(port), "--state-dir", self.directory / f"{name}.state",
            "--distributed-executor-backend", "uni",
        ]  # fmt: skip
        threads = str(max(1, (os.cpu_count() or 2) // 2))
        self.start(name, command, SERVER_ENVIRONMENT | {"OMP_NUM_THREADS": threads})

    def _log_of(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")[-4000:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and end its group."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        process.terminate()
        process.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _needed(program: str) -> str:
    if (path := find(program)) is None:
        raise StackError(f"{program} is not here: apt-get install {PACKAGES[program]}")
    return path


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Whether a condition came true in time; it is asked four times a second."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)
    return True


def query(prometheus: str, expression: str) -> list[dict[str, Any]]:
    """What Prometheus answers to an expression, an entry a series."""
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}, timeout=30, trust_env=False)
    result: list[dict[str, Any]] = answer.raise_for_status().json()["data"]["result"]
    return result


def ask_all(front: str) -> list[str]:
    """Ask every model for a few tokens; returns their names.

    Raises:
        StackError: if one does not answer.
    """
    with httpx.Client(base_url=front, timeout=120, trust_env=False) as client:
        names = [model["id"] for model in client.get("/v1/models").raise_for_status().json()["data"]]
        for name in names:
            body = {"model": name, "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
            answer = client.post("/v1/chat/completions", json=body)
            if answer.status_code != 200:
                raise StackError(f"{name}: {answer.status_code} {answer.text}")
    return names


def check(stack: Stack, front: str, prometheus: str) -> None:
    """Ask all models, with both servers and with one; compare with what Prometheus has counted.

    Raises:
        StackError: if something is not as it should be.
    """
    names = ask_all(front)
    print(f"answered: {', '.join(names)}", flush=True)

    def counted() -> bool:
        series = query(prometheus, 'sum by (adapter) (qaa_requests_total{job="qaa-serve", outcome="success"})')
        return {item["metric"]["adapter"] for item in series if item["value"][1] != "0"} >= set(names)

    if not wait_until(lambda: len(query(prometheus, 'up{job="qaa-serve"} == 1')) == 2, 60):
        raise StackError("Prometheus does not see both servers")
    if not wait_until(counted, 60):
        raise StackError("Prometheus has not counted a request for each model")
    print("counted by Prometheus", flush=True)
    stack.processes["server-2"].terminate()
    ask_all(front)  # while it drains
    stack.processes["server-2"].wait(90)
    ask_all(front)
    print("answered with one server gone", flush=True)


def main() -> int:
    """Run the stack until Ctrl-C, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=EXAMPLE, help="(default: the bundled example's)")
    parser.add_argument("--port", type=int, default=8080, help="nginx's (default: 8080)")
    parser.add_argument("--check", action="store_true", help="ask, compare, and end")
    parser.add_argument("options", nargs="*", help="for both servers, after --")
    arguments = parser.parse_args()
    options = arguments.options or ["--served-model-name", "assistant", *SERVER_OPTIONS]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="qaa-stack-") as folder, Stack(Path(folder)) as stack:
            ports = [free_port(), free_port()]
            for number, port in enumerate(ports, 1):
                # One after the other: the second finds what the first has compiled.
                stack.start_server(f"server-{number}", port, arguments.adapters.resolve(), options)
                stack.wait_for(f"server-{number}", f"http://127.0.0.1:{port}/ready")
            front = stack.start_nginx(arguments.port, ports)
            prometheus = stack.start_prometheus(ports, "1s" if arguments.check else "15s")
            print(f"servers     {' '.join(f'http://127.0.0.1:{port}' for port in ports)}")
            print(f"nginx       {front}\nPrometheus  {prometheus}")
            if program := find("grafana"):
                print(f"Grafana     {stack.start_grafana(program, prometheus)}")
            else:
                print("Grafana     is not here: deploy/compose.yaml has it")
            print(f"logs        {folder}", flush=True)
            if arguments.check:
                check(stack, front, prometheus)
            else:
                signal.pause()
    except KeyboardInterrupt:
        print()
    except (StackError, httpx.HTTPError) as error:
        print(f"try_stack: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
