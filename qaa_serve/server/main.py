"""`qaa-serve serve`: arguments in, exit status out."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from qaa_serve.preflight import UsageError
from qaa_serve.server import settings


def main(arguments: Sequence[str]) -> int:
    """Run the server; returns the exit status (2: the command line is wrong, 1: the engine died)."""
    settings.prepare_environment(arguments)
    try:
        import uvloop
        from vllm.logger import configure_logging_from_args
        from vllm_qaa import port

        cli_env_setup, validate_parsed_serve_args = map(
            port.moved, ("cli_env_setup", "validate_parsed_serve_args")
        )
    except ImportError as error:
        print(
            f"qaa-serve: {error}. Serving needs vLLM 0.32 or 0.33: install qaa-serve[cpu] or qaa-serve[cuda] "
            "(docs/install.md)",
            file=sys.stderr,
        )
        return 2
    cli_env_setup()
    _log_as_vllm_does()
    try:
        args = settings.make_parser().parse_args(list(arguments))
        options, contents, key_sources = settings.resolve(args)
        configure_logging_from_args(args)
        _log_as_vllm_does()
        validate_parsed_serve_args(args)
        admin_sock = _open_admin_listener(options.admin_listen)
    except (UsageError, AssertionError, OSError, TypeError, ValueError) as error:
        print(f"qaa-serve: {error}", file=sys.stderr)
        return 2

    from qaa_serve.server.launch import serve

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_start_up)
    try:
        return uvloop.run(serve(args, options, contents, key_sources, admin_sock))
    finally:
        contents.close()
        if admin_sock is not None:
            admin_sock.close()
        gc.unfreeze()  # Triton's bindings would tell of everything that is never collected


def _log_as_vllm_does() -> None:
    """Have what our modules log come out where vLLM's does; its set-up silences loggers that were there before."""
    ours, theirs = logging.getLogger("qaa_serve"), logging.getLogger("vllm")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(theirs.getEffectiveLevel())
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("qaa_serve") and isinstance(logger, logging.Logger):
            logger.disabled = False


def _open_admin_listener(address: str | None) -> socket.socket | None:
    from qaa_serve.server.connections import open_listener

    try:
        return None if address is None else open_listener(address)
    except (OSError, ValueError) as error:
        raise UsageError(f"--admin-listen {address}: {error}") from error


def _end_start_up(number: int, _frame: object) -> NoReturn:
    """End at once, with every process started so far; once HTTP is up, vLLM's own handlers stand instead.

    An exception raised here would come up somewhere in vLLM's start-up, which does not always let it through.
    """
    from qaa_serve.server.processes import kill_children

    kill_children()
    print(f"qaa-serve: {signal.Signals(number).name} during start-up", file=sys.stderr, flush=True)
    os._exit(128 + number)
