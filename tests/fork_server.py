"""Starts `qaa-serve` without the ten seconds in which the server and its engine each import vLLM.

A process that has imported everything forks for each server, and the server forks for its engine, as vLLM does by
default for a GPU. A line of JSON on its standard input asks for a server; on its standard output, [pid, null] says
that one has begun, [pid, status] that it has ended.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

#: What a server, its engine and its workers import.
MODULES = (
    "qaa_serve.server.launch",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm_qaa.worker",
)

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
            raise subprocess.TimeoutExpired("qaa-serve", timeout or 0)
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

    def __init__(self, environment: Mapping[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            text=True,
            bufsize=1,
        )
        self._started: queue.SimpleQueue[ForkedProcess | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def start(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> ForkedProcess:
        """`qaa-serve` with arguments, in a process group of its own, what it says appended to the log."""
        assert self._process.stdin is not None
        request = {"arguments": arguments, "environment": dict(environment), "log": str(log), "cwd": os.getcwd()}
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


# ------------------------------------------------------------------------------------- in the fork server


def main() -> int:
    """Fork for each line of standard input; in the forks, be `qaa-serve`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _import_everything()
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
            return _serve(**json.loads(line))
        running.add(pid)
        answers.write(json.dumps([pid, None]) + "\n")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    os._exit(0)  # the tests have ended: what Triton says of itself at an end is not for pytest's output


def _import_everything() -> None:
    from qaa_serve.server import settings

    settings.prepare_environment([])
    for module in MODULES:
        importlib.import_module(module)
    import setproctitle

    setproctitle.getproctitle()  # it finds where a title is shown before the environment is another
    gc.collect()
    gc.freeze()  # pages that are shared are not copied for the collector


def _serve(arguments: list[str], environment: dict[str, str], log: str, cwd: str) -> int:
    from qaa_serve.cli import main as qaa_serve

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    os.chdir(cwd)
    for path, mode, number in ((os.devnull, os.O_RDONLY, 0), (log, os.O_WRONLY | os.O_APPEND, 1)):
        os.dup2(os.open(path, mode), number)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["qaa-serve", *arguments]

    # vLLM spawns where the device is a CPU, whatever VLLM_WORKER_MULTIPROC_METHOD says.
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)  # type: ignore[assignment]
    # The engine inherits the file that tells the server's event loop of signals: its own are none of the server's.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    return qaa_serve(arguments)


if __name__ == "__main__":
    sys.exit(main())
