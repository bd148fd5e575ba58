"""Starts Python programs without the seconds in which each of them imports torch, vLLM or transformers.

A process that has imported everything forks for each program. A server forks once more for its engine, as vLLM
does by default for a GPU. A line of JSON on standard input asks for a program; on standard output, [pid, null]
says that one has begun, [pid, status] that it has ended.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import queue
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

#: What a server, its engine and its workers import.
SERVING = (
    "qaa_serve.server.launch",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm_qaa.worker",
)

#: What trainings, and the evaluations of a comparison, import.
TRAINING = ("peft", "qaa_serve.training.dry_run", "qaa_serve.training.loop", "qaa_serve.training.trained")

# ------------------------------------------------------------------------------------- in the tests' process


class ForkedProcess:
    """What `subprocess.Popen` offers, for a process that the fork server has started."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def end(self, status: int) -> None:
        self.returncode = status
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that forks, in an environment of its own; it ends with this one."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            text=True,
            bufsize=1,
        )
        self._started: queue.SimpleQueue[ForkedProcess | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, errors: Path | None = None
    ) -> ForkedProcess:
        """Start a program in a process group of its own.

        Args:
            command: `qaa-serve ARGUMENT ...`, `PYTHON -m MODULE ARGUMENT ...` or `PYTHON FILE ARGUMENT ...`.
            environment: all of it.
            log: to which standard output is appended.
            errors: to which standard error is appended, if not to the log too.
        """
        assert self._process.stdin is not None
        request = {
            "command": list(map(str, command)), "environment": dict(environment), "cwd": os.getcwd(),
            "log": str(log), "errors": str(errors or log),
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        started = self._started.get()
        assert started is not None, f"the fork server has ended with {self._process.wait()}"
        return started

    def _read(self) -> None:
        assert self._process.stdout is not None
        running = {}
        for line in self._process.stdout:
            pid, status = json.loads(line)
            if status is None:
                running[pid] = ForkedProcess(pid)
                self._started.put(running[pid])
            else:
                running.pop(pid).end(status)
        self._started.put(None)


@cache
def training_server() -> ForkServer:
    """Forks trainings and what else needs no vLLM, on one thread each."""
    # pyarrow's allocator would start a thread.
    settings = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    return ForkServer(TRAINING, os.environ | settings)


def forked_job(command: Sequence[str], *, stdout: Any, **_: object) -> ForkedProcess:
    """In place of ``subprocess.Popen`` in ``compare.runner``."""
    return training_server().start(command, os.environ, Path(stdout.name))


# ------------------------------------------------------------------------------------- in the fork server


def main() -> int:
    """Fork for each line of standard input; in the forks, be the program."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _import_everything(sys.argv[1:])
    if len(os.listdir("/proc/self/task")) > 1:
        print("A process with threads cannot be forked safely: which import has started one?", file=sys.stderr)
        return 1

    def reap(*_: object) -> None:
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            running.remove(ended[0])
            answers.write(json.dumps([ended[0], os.waitstatus_to_exitcode(ended[1])]) + "\n")

    running: set[int] = set()
    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            answers.close()
            return _run(**json.loads(line))
        running.add(pid)
        answers.write(json.dumps([pid, None]) + "\n")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    os._exit(0)  # the tests have ended: what Triton says of itself at an end is not for pytest's output


def _import_everything(modules: Sequence[str]) -> None:
    if modules == [*SERVING]:
        _prepare_vllm()
    for module in modules:
        importlib.import_module(module)
    import setproctitle

    setproctitle.getproctitle()  # it finds where a title is shown before the environment is another
    gc.collect()
    gc.freeze()  # pages that are shared are not copied for the collector


def _prepare_vllm() -> None:
    from qaa_serve.server import settings

    settings.prepare_environment([])
    # vLLM spawns where the device is a CPU, whatever VLLM_WORKER_MULTIPROC_METHOD says.
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)  # type: ignore[assignment]
    # The engine inherits the file that tells the server's event loop of signals: its own are none of the server's.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _run(command: list[str], environment: dict[str, str], cwd: str, log: str, errors: str) -> int:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    os.chdir(cwd)
    for path, number in ((os.devnull, 0), (log, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    atexit.register(gc.unfreeze)  # or Triton's bindings tell of all that is left at the end
    if command[0] == "qaa-serve":
        from qaa_serve.cli import main as qaa_serve

        sys.argv = command
        return qaa_serve(command[1:])
    _, *sys.argv = command
    if sys.argv[0] == "-m":
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
