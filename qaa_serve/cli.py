"""The command `qaa-serve`: `serve` (the default) and `train`. Each imports only what it needs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from qaa_serve import __version__

USAGE = f"""\
qaa-serve {__version__}: many quantum-circuit (QAA) and LoRA adapters on one language model

  qaa-serve [serve] [MODEL] --adapters DIR [any option of vllm serve]
      serve a model and every adapter directory in DIR with an OpenAI-compatible API
  qaa-serve train --model MODEL --data FILE.jsonl --output DIR [options]
      train a QAA (or LoRA) adapter

  qaa-serve COMMAND --help explains a command, qaa-serve --version prints the version.
"""


def _serve(arguments: Sequence[str]) -> int:
    from qaa_serve.server.main import main as serve

    return serve(arguments)


def _train(arguments: Sequence[str]) -> int:
    import argparse

    from qaa_serve.training import cli

    parser = argparse.ArgumentParser(prog="qaa-serve train", formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(arguments))


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"serve": _serve, "train": _train}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if arguments[0] in _COMMANDS:
        return _COMMANDS[arguments[0]](arguments[1:])
    return _serve(arguments)


if __name__ == "__main__":
    sys.exit(main())
