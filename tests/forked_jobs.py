"""Trainings and evaluations of a comparison, without the seconds in which each process imports transformers."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from typing import Any

#: One process imports what all need, and forks for each of them.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["peft", "qaa_serve.training.dry_run", "qaa_serve.training.loop", "qaa_serve.training.trained"]
)


class ForkedJob:
    """What ``compare.runner`` uses of ``subprocess.Popen``, for `python -m MODULE ARGUMENT ...` with a log."""

    def __init__(self, command: Sequence[str], *, stdout: Any, **_: object):
        python, option, *self.args = command
        assert (python, option) == (sys.executable, "-m")
        self._process = _CONTEXT.Process(target=_run, args=(self.args, stdout.name))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _run(arguments: list[str], log: str) -> None:
    os.setsid()
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
