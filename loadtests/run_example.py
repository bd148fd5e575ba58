"""What `make load` runs: a server of the example with a hundred more adapters, a load on it, and a report.

    python loadtests/run_example.py [--seconds 120] [--port 8010] [--output reports/load] -- SERVER COMMAND

The server's command comes from the Makefile and is that of `make serve`. It gets a copy of the example's adapters
with random ones beside them, of which its memory holds a quarter, so that some are cold. Port, state and process
group are its own, and it is ended with all its processes. The exit status is locust's: 1 if requests failed, 3 if
the SLO was missed.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from make_adapters import make_adapters

HERE = Path(__file__).resolve().parent
START_LIMIT_S = 600
STOP_LIMIT_S = 60
ADAPTERS = {"qaa": 80, "lora": 20}

#: The limits are for noticing that something is wrong on any machine, not for what a good one can do.
PROFILE = [
    "--users", "8", "--spawn-rate", "8", "--base-share", "0.1",
    "--cold-share", "0,0.1,0.3,1", "--hot", "4", "--popularity", "zipf:1",
    "--prompt-tokens", "uniform:8-24", "--output-tokens", "lognormal:24,0.5",
    "--swap", "swapping=brief,pirate", "--swap-every", "10",
    "--slo-ttft-ms", "5000", "--slo-itl-ms", "2000", "--slo-share", "0.95",
]  # fmt: skip


def stage(adapters: Path, place: Path) -> int:
    """The example's adapters and random ones in a source of their own.

    Returns:
        bytes of a quarter of all.
    """
    shutil.copytree(adapters, place, ignore=shutil.ignore_patterns(".*"))
    for kind, count in ADAPTERS.items():
        list(make_adapters(str(adapters.parent / "base"), place, kind, count, rank=8, size=0.02))
    return sum(file.stat().st_size for file in place.glob("*/*.safetensors")) // 4


def wait_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server is ready.

    Raises:
        SystemExit: if it ends or takes too long; with the end of its log.
    """
    deadline = time.monotonic() + START_LIMIT_S
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=5):
            return
        time.sleep(0.5)
    raise SystemExit(f"the server did not start; {log} ends with:\n{log.read_text(errors='replace')[-3000:]}")


def end(server: subprocess.Popen[bytes]) -> None:
    """End the server's process group."""
    for which, limit in ((signal.SIGTERM, STOP_LIMIT_S), (signal.SIGKILL, STOP_LIMIT_S)):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, which)
        with suppress(subprocess.TimeoutExpired):
            server.wait(limit)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120, help="load that is measured (120)")
    parser.add_argument("--warm-up", type=int, default=10, help="seconds of load before that (10)")
    parser.add_argument("--turn", type=int, default=5, help="seconds of each share of cold requests (5)")
    parser.add_argument("--port", type=int, default=8010, help="the server's (8010)")
    parser.add_argument("--output", type=Path, default=Path("reports/load"), help="(reports/load)")
    parser.add_argument("server", nargs="+", metavar="SERVER COMMAND", help="with --adapters, without --port")
    args = parser.parse_args()
    with socket.socket() as sock:
        if sock.connect_ex(("127.0.0.1", args.port)) == 0:
            raise SystemExit(f"something listens on port {args.port} already: choose another --port")
    args.output.mkdir(parents=True, exist_ok=True)
    log, url = args.output / "server.log", f"http://127.0.0.1:{args.port}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through the `finally` below
    os.environ["QAA_SERVE_ADMIN_KEY"] = secrets.token_urlsafe()  # of the server, and of locust
    with tempfile.TemporaryDirectory(prefix="load-") as temporary:
        root, command = Path(temporary), list(args.server)
        at = command.index("--adapters") + 1
        cache = stage(Path(command[at]).resolve(), root / "adapters")
        command[at] = str(root / "adapters")
        command += [
            "--port", str(args.port), "--state-dir", str(root / "state"), "--adapters-check", "lazy",
            "--adapter-cache-bytes", str(cache), "--max-loras", "4",
        ]  # fmt: skip
        with log.open("wb") as file:
            server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            print(f"starting the server; its log: {log}", flush=True)
            wait_ready(url, server, log)
            locust = [
                sys.executable, "-m", "locust", "-f", os.path.relpath(HERE / "locustfile.py"), "--host", url,
                "--headless",
                "--run-time", f"{args.warm_up + args.seconds}s", "--warm-up", str(args.warm_up),
                "--turn", str(args.turn), "--stop-timeout", "20", "--only-summary",
                "--html", str(args.output / "locust.html"), "--report", str(args.output), *PROFILE,
            ]  # fmt: skip
            return subprocess.run(locust).returncode
        finally:
            end(server)


if __name__ == "__main__":
    sys.exit(main())
