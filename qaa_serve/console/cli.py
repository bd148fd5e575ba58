"""``qaa-serve console``."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
A web page for a running server: ask several models side by side, look at and change adapters and aliases, see
what an adapter is, and what the server does now. It speaks to the server's API only, with the keys that are typed
into the page.
"""


def make_parser() -> argparse.ArgumentParser:
    """The options of ``qaa-serve console``."""
    parser = argparse.ArgumentParser(
        prog="qaa-serve console", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="where the server is (default: http://127.0.0.1:8000)")
    add(
        "--admin-url",
        help="where its admin routes are, or unix:PATH (default: what a server on this machine says, else --url)",
    )
    add("--host", default="127.0.0.1", help="address of the page (default: 127.0.0.1)")
    add("--port", type=int, default=8001, help="port of the page (default: 8001)")
    add("--adapters", metavar="DIR", type=Path, help="directory of adapters, for their circuits, norms and cards")
    add("--end-with", metavar="PID", type=int, help="end when this process does, such as the server")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Serve the page until a signal; returns the exit status: 2 for what cannot be done, with the reason."""
    args = make_parser().parse_args(list(arguments))
    args.url = args.url.rstrip("/")
    problem = _problem(args)
    if problem is None:
        try:
            from qaa_serve.console.app import run
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("nicegui", "httpx", "prometheus_client"):
                raise
            problem = f'{error.name} is not installed: pip install "qaa-serve[console]"'
        else:
            run(**vars(args))
            return 0
    print(f"qaa-serve console: {problem}", file=sys.stderr)
    return 2


def _problem(args: argparse.Namespace) -> str | None:
    """Why this cannot be done."""
    if not args.url.startswith(("http://", "https://")):
        return f"--url {args.url}: http://HOST:PORT is needed"
    if args.adapters is not None and not args.adapters.is_dir():
        return f"--adapters {args.adapters}: there is no such directory"
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except (OSError, OverflowError) as error:
            return f"the page cannot be at {args.host}:{args.port} ({error}): choose another --port"
    return None
