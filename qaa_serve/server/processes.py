"""The processes that this one has started: the engine, its workers, and what those started."""

from __future__ import annotations

from contextlib import suppress

import psutil


def kill_children() -> None:
    """End all of them, at once."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            process.kill()


def engine_work_s() -> float:
    """Processor time that the engine's workers and all that they started have used, in seconds.

    vLLM's engine process waits for its workers by looking again and again: where it has workers of their own, its
    own time says nothing.
    """
    here = psutil.Process()
    family = here.children(recursive=True)
    workers = [process for process in family if _is_worker(process)]
    total = 0.0
    for process in {*workers, *_below(workers)} or family or [here]:
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _below(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(psutil.Error):
            found += process.children(recursive=True)
    return found


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "Worker" in " ".join(process.cmdline())
    except psutil.Error:
        return False
