"""The command `qaa-serve`: `serve` (the default), `adapters`, `train`, ...; each imports what it needs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from qaa_serve import __version__
from qaa_serve.preflight import UsageError, check_serve, check_train

USAGE = f"""\
qaa-serve {__version__}: many quantum-circuit (QAA) and LoRA adapters on one language model

  qaa-serve [serve] [MODEL] --adapters DIR [any option of vllm serve]
      serve a model and every adapter directory in DIR with an OpenAI-compatible API
  qaa-serve train --model MODEL --data FILE --output DIR [options]
      train a QAA adapter (or LoRA, SoRA, prefix tuning, or the whole model)
  qaa-serve compare --model MODEL --data FILE --eval-data FILE --output DIR [options]
      train several ways under the same budget and write a report: quality, size, memory, time
  qaa-serve adapters list|show|put|delete|rollback|pin|unpin [NAME] [options]
      look at and change what a running server serves
  qaa-serve console --url http://127.0.0.1:8000
      a web page to try, watch and change what a running server serves
  qaa-serve inspect DIR [options]
      say what an adapter is, draw or export its circuits, try them on imperfect quantum hardware

  qaa-serve doctor
      say what can run on this machine, and what to do about what cannot

  qaa-serve COMMAND --help explains a command, qaa-serve --version prints the version.
"""


def _serve(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        from qaa_serve.server.options import print_help

        print_help()
        return 0
    if arguments and not (arguments[0].startswith("-") or Path(arguments[0]).exists()):
        for command in get_close_matches(arguments[0], _COMMANDS, n=1, cutoff=0.75):
            raise UsageError(f"there is no command and no model {arguments[0]}: is {command} meant?")
    check_serve(arguments)
    print("qaa-serve: importing torch and vLLM, 10 to 20 s", file=sys.stderr, flush=True)
    from qaa_serve.server.main import main as serve

    return serve(arguments)


def _train(arguments: Sequence[str]) -> int:
    check_train(arguments)
    from qaa_serve.training.cli import main as train

    return train(arguments)


def _compare(arguments: Sequence[str]) -> int:
    check_train(arguments)
    from qaa_serve.training.compare.cli import main as compare

    return compare(arguments)


def _adapters(arguments: Sequence[str]) -> int:
    from qaa_serve.admin_cli import main as adapters

    return adapters(arguments)


def _console(arguments: Sequence[str]) -> int:
    from qaa_serve.console.cli import main as console

    return console(arguments)


def _inspect(arguments: Sequence[str]) -> int:
    from qaa_serve.inspection.cli import main as inspect

    return inspect(arguments)


def _doctor(arguments: Sequence[str]) -> int:
    from qaa_serve.doctor import main as doctor

    return doctor(arguments)


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "train": _train,
    "compare": _compare,
    "adapters": _adapters,
    "console": _console,
    "inspect": _inspect,
    "doctor": _doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    try:
        if arguments[0] in _COMMANDS:
            return _COMMANDS[arguments[0]](arguments[1:])
        return _serve(arguments)
    except UsageError as error:
        print(f"qaa-serve: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
