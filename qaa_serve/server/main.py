"""`qaa-serve serve`: arguments in, exit status out."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from qaa_serve.server import settings


def main(arguments: Sequence[str]) -> int:
    """Run the server; returns the exit status (2: the command line is wrong, 1: the engine died)."""
    settings.prepare_environment(arguments)
    try:
        import uvloop
        from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.logger import configure_logging_from_args
    except ImportError as error:
        print(
            f"qaa-serve: {error}. Serving needs vLLM 0.32: install qaa-serve[cpu] or qaa-serve[cuda] "
            "(docs/install.md)",
            file=sys.stderr,
        )
        return 2
    cli_env_setup()
    args = settings.make_parser().parse_args(list(arguments))
    try:
        revisions, rejections = settings.resolve(args)
        settings.stay_offline(args.model)
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
    except (settings.UsageError, TypeError, ValueError) as error:
        print(f"qaa-serve: {error}", file=sys.stderr)
        return 2

    from qaa_serve.server.launch import serve

    # Until HTTP is up, SIGTERM ends the start-up as Ctrl-C does; then vLLM's own handlers take over.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return uvloop.run(serve(args, revisions, rejections))
    except KeyboardInterrupt:
        return 130


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
