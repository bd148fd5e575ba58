"""Executes the trainings and evaluations that are missing, each in a process that may fail by itself."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaa_serve.training.compare.display import Display
from qaa_serve.training.compare.files import read_json, write_json
from qaa_serve.training.compare.plan import digest_of, slug

#: Each followed by a file of JSON that says what to do.
TRAIN = (sys.executable, "-m", "qaa_serve.cli", "train", "--config")
EVALUATE = (sys.executable, "-m", "qaa_serve.training.compare.evaluate")

_TAIL = 8192  # bytes of a log that are read for its last lines
_PATIENCE = 60.0  # seconds for the last step and a checkpoint


@dataclass(frozen=True)
class Job:
    """What a process of its own does once.

    Attributes:
        title: for people.
        digest: SHA-256 of what the result depends on.
        directory: where all files are.
        output: the file of the result, which is there as soon as it is whole.
        failure: the file of the reason why there is none.
        log: what the process said.
    """

    title: str
    digest: str
    directory: Path
    output: Path
    failure: Path
    log: Path

    def result(self) -> dict[str, Any] | None:
        """What came out, None if nothing did."""
        found = read_json(self.output)
        return found if isinstance(found, dict) else None

    def reason(self) -> str | None:
        """Why it failed, None if it did not."""
        found = read_json(self.failure)
        return str(found["reason"]) if isinstance(found, dict) else None

    def start(self) -> Sequence[str]:
        """Write what the process reads; returns its command."""
        raise NotImplementedError

    def outcome(self, result: Mapping[str, Any]) -> str:
        """The result in a few words."""
        raise NotImplementedError


@dataclass(frozen=True)
class Run(Job):
    """One training; its result is the object of training.json.

    Attributes:
        variant: name of the row it belongs to.
        seed: of this training.
        options: every option of ``qaa-serve train`` but ``output``.
    """

    variant: str
    seed: int
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.directory.name

    @property
    def model(self) -> Path:
        """Directory of what was trained."""
        return self.output.parent

    def start(self) -> Sequence[str]:
        """Its directory, emptied unless the training can go on from a checkpoint there."""
        config = self.directory / "config.json"
        options = {**self.options, "output": str(self.model), "resume": True, "accept_worse": True}
        # What is there was interrupted and can go on, unless it failed, or its files were moved meanwhile.
        resumes = read_json(config) == options and self.reason() is None
        if self.directory.exists() and not resumes:
            shutil.rmtree(self.directory)
        resumes = resumes and any(self.directory.glob(".*.checkpoints/checkpoint-*"))
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(config, options)
        about = {
            "format": 1,
            "variant": self.variant,
            "seed": self.seed,
            "digest": self.digest,
            "resumed": resumes,
        }
        write_json(self.directory / "run.json", about)
        return [*TRAIN, str(config)]

    def outcome(self, result: Mapping[str, Any]) -> str:
        """Loss and time."""
        return f"loss {result['train_loss']:.3f}, {result['seconds']:.0f} s"


def make_run(
    runs: Path, variant: str, label: str, options: Mapping[str, Any], seed: int, digests: Mapping[str, str | None]
) -> Run:
    """A run, known by everything its result depends on.

    Args:
        runs: directory of all runs.
        variant: name of the row.
        label: the same for people, with what tells the points of a grid apart.
        options: of the training; ``model``, ``data`` and ``eval_data`` among them.
        seed: of the training.
        digests: of the contents behind those three; where they lie does not count.
    """
    complete = {**options, "seed": seed}
    digest = digest_of({"format": 2, "options": {**complete, **digests}})
    directory = runs / f"{slug(variant)}-seed{seed}-{digest[:10]}"
    return Run(
        title=f"{label}, seed {seed}",
        digest=digest,
        directory=directory,
        output=directory / "model" / "training.json",
        failure=directory / "failure.json",
        log=directory / "train.log",
        variant=variant,
        seed=seed,
        options=complete,
    )


@dataclass(frozen=True)
class Evaluation(Job):
    """One model's losses and answers on the test set.

    Attributes:
        job: what ``evaluate.main`` reads, but for ``output`` and ``digest``.
    """

    job: Mapping[str, Any]

    def result(self) -> dict[str, Any] | None:
        """What came out of the same model, test set and options."""
        found = super().result()
        return found if found is not None and found.get("digest") == self.digest else None

    def start(self) -> Sequence[str]:
        """Its job, in a file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.failure.unlink(missing_ok=True)
        file = self.output.with_suffix(".job.json")
        write_json(file, {**self.job, "output": str(self.output), "digest": self.digest})
        return [*EVALUATE, str(file)]

    def outcome(self, result: Mapping[str, Any]) -> str:
        """Loss and time."""
        return f"test loss {result['loss']:.3f}, {result['seconds']:.0f} s"


def make_evaluation(name: str, directory: Path, job: Mapping[str, Any], depends: Mapping[str, Any]) -> Evaluation:
    """An evaluation, known by everything its result depends on.

    Args:
        name: for people.
        directory: where its files go.
        job: see ``Evaluation``.
        depends: what the result depends on.
    """
    digest = digest_of(depends)
    output = directory / f"evaluation-{digest[:10]}.json"
    return Evaluation(
        title=f"evaluation of {name}",
        digest=digest,
        directory=directory,
        output=output,
        failure=output.with_suffix(".failure.json"),
        log=output.with_suffix(".log"),
        job=job,
    )


def execute(jobs: Iterable[Job], display: Display, *, lock: int, retry_failed: bool, tried: set[Path]) -> None:
    """Do what is not done yet.

    Args:
        jobs: in this order.
        display: shows how each goes.
        lock: a descriptor that the processes inherit.
        retry_failed: also those that failed in an earlier comparison.
        tried: outputs of what this comparison has had its turn with; added to.
    """
    for job in jobs:
        known, before = job.output in tried, job.reason()
        tried.add(job.output)
        if job.result() is not None:
            if not known:
                display.end(job.title, "reused")
        elif before is not None and (known or not retry_failed):
            display.end(job.title, f"failed before: {before}")
        else:
            display.begin(job.title)
            status = run_process(job.start(), job.log, display.line, lock)
            result = job.result()
            if status == 0 and result is not None:
                display.end(job.title, job.outcome(result))
                continue
            reason = why(status, job.log) if status else "it ended well but wrote no result"
            write_json(job.failure, {"reason": reason, "exit_status": status})
            display.end(job.title, f"failed: {reason}")


def run_process(command: Sequence[str], log: Path, line: Callable[[str], None], lock: int) -> int:
    """Run a command to its end, its output in a log.

    Whatever ends this function early, Ctrl-C included, ends the process too, in good order if it listens.

    Args:
        command: program and arguments.
        log: is written anew.
        line: is told the last line of the log now and then.
        lock: a descriptor to pass on.

    Returns:
        The exit status; negative: the signal.
    """
    with log.open("wb") as sink:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the other in good order.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
    try:
        while True:
            try:
                return child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                lines = tail(log)
                if lines:
                    line(lines[-1])
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process in good order, at once if Ctrl-C is pressed again.

    By SIGTERM: what runs in the background of a script may have SIGINT ignored.
    """
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        child.kill()  # does nothing to one that has ended
        child.wait()


def tail(log: Path) -> list[str]:
    """The last lines of a log that are not empty."""
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _TAIL))
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def why(status: int, log: Path) -> str:
    """The reason of a failure in one line, from the exit status and the log."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (", most likely for want of memory" if name == "SIGKILL" else "")
    lines = tail(log)
    said = [place for place, line in enumerate(lines) if line.startswith("qaa-serve train: ")]
    if said:
        text = " ".join(line.strip() for line in lines[said[-1] :]).removeprefix("qaa-serve train: ")
    else:
        text = lines[-1] if lines else "nothing was written to the log"
    return re.sub(r"\s+", " ", text)[:500]
