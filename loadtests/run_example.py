"""What `make load` runs: a server, two minutes of mixed load with a swapping adapter, and a report.

    python loadtests/run_example.py [--seconds 120] [--port 8010] [--output reports/load] -- SERVER COMMAND

The server's command comes from the Makefile and is that of `make serve`. It gets a port, a state directory and a
process group of its own, and is ended with all its processes. The exit status is locust's: 1 if requests failed, 3
if the SLO was missed.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
START_LIMIT_S = 600
STOP_LIMIT_S = 60

#: The load: all kinds of models and endpoints, short questions, an adapter that is replaced every ten seconds. The
#: limits are for noticing that something is wrong on any machine, not for what a good one can do.
PROFILE = [
    "--users", "8", "--spawn-rate", "4", "--endpoint", "mix", "--stream-share", "0.8",
    "--mix", "base=0.2,qaa=0.6,lora=0.2", "--popularity", "zipf:1",
    "--prompt-tokens", "uniform:8-24", "--output-tokens", "lognormal:24,0.5",
    "--swap", "swapping=brief,pirate", "--swap-every", "10",
    "--slo-ttft-ms", "5000", "--slo-inter-token-ms", "2000", "--slo-attainment", "0.95",
]  # fmt: skip


def wait_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server is ready.

    Raises:
        SystemExit: if it ends or takes too long; with the end of its log.
    """
    deadline = time.monotonic() + START_LIMIT_S
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"the server did not start; {log} ends with:\n{log.read_text(errors='replace')[-3000:]}")


def end(server: subprocess.Popen[bytes]) -> None:
    """End the server's process group."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_LIMIT_S)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def run_locust(url: str, output: Path, seconds: int) -> int:
    """Run the profile.

    Returns:
        locust's exit status.
    """
    command = [
        sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py"), "--host", url, "--headless",
        "--run-time", f"{seconds}s", "--stop-timeout", "20", "--only-summary",
        "--csv", str(output / "load"), "--csv-full-history", "--html", str(output / "report.html"),
        "--summary", str(output / "summary.json"), *PROFILE,
    ]  # fmt: skip
    return subprocess.run(command).returncode


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120, help="how long the load lasts (default: 120)")
    parser.add_argument("--port", type=int, default=8010, help="the server's (default: 8010)")
    parser.add_argument("--output", type=Path, default=Path("reports/load"), help="(default: reports/load)")
    parser.add_argument("server", nargs="+", metavar="SERVER COMMAND", help="without --port and --state-dir")
    args = parser.parse_args()
    with socket.socket() as sock:
        if sock.connect_ex(("127.0.0.1", args.port)) == 0:
            raise SystemExit(f"something listens on port {args.port} already: choose another --port")
    args.output.mkdir(parents=True, exist_ok=True)
    log, url = args.output / "server.log", f"http://127.0.0.1:{args.port}"
    summary = args.output / "summary.json"
    summary.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through the `finally` below
    os.environ["QAA_SERVE_ADMIN_KEY"] = secrets.token_urlsafe()  # of the server, and of locust's swaps
    with tempfile.TemporaryDirectory(prefix="load-state-") as state:
        command = [*args.server, "--port", str(args.port), "--state-dir", state]
        with log.open("wb") as file:
            server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            print(f"starting the server; its log: {log}", flush=True)
            wait_ready(url, server, log)
            status = run_locust(url, args.output, args.seconds)
        finally:
            end(server)
    if summary.is_file():
        subprocess.run(
            [sys.executable, str(HERE / "report.py"), str(summary), "--csv", str(args.output / "load"),
             "--output", str(args.output)],
            check=True,
        )  # fmt: skip
    return status


if __name__ == "__main__":
    sys.exit(main())
