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
from typing import Any, Protocol

from qaa_serve.training.compare.files import read_json, write_json
from qaa_serve.training.compare.plan import digest_of, slug

#: Followed by the config file.
TRAIN = (sys.executable, "-m", "qaa_serve.cli", "train", "--config")
EVALUATE = (sys.executable, "-m", "qaa_serve.training.compare.evaluate")

_RECORD = "training.json"
_TAIL = 8192  # bytes of a log that are read for its last lines
_PATIENCE = 60.0  # seconds for the last step and a checkpoint


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        variant: name of the row it belongs to.
        label: the same for people, with what tells the points of a grid apart.
        seed: of this training.
        options: every option of ``qaa-serve train`` but ``output``.
        digest: SHA-256 of what the result depends on.
        directory: where its files are.
    """

    variant: str
    label: str
    seed: int
    options: Mapping[str, Any]
    digest: str
    directory: Path

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.directory.name

    @property
    def model(self) -> Path:
        """Directory of what was trained."""
        return self.directory / "model"

    @property
    def log(self) -> Path:
        """What the training said."""
        return self.directory / "train.log"


def make_run(
    runs: Path, variant: str, label: str, options: Mapping[str, Any], seed: int, digests: Mapping[str, str | None]
) -> Run:
    """A run, known by everything its result depends on.

    Args:
        runs: directory of all runs.
        variant: name of the row.
        label: see ``Run``.
        options: of the training; ``model``, ``data`` and ``eval_data`` among them.
        seed: of the training.
        digests: of the contents behind those three; where they lie does not count.
    """
    complete = {**options, "seed": seed}
    digest = digest_of({"format": 2, "options": {**complete, **digests}})
    return Run(variant, label, seed, complete, digest, runs / f"{slug(variant)}-seed{seed}-{digest[:10]}")


class Reporter(Protocol):
    """Who is told how things go."""

    def begin(self, title: str) -> None:
        """A training or evaluation begins."""

    def line(self, text: str) -> None:
        """The last line it wrote."""

    def end(self, title: str, outcome: str) -> None:
        """It ended."""


def training_of(run: Run) -> dict[str, Any] | None:
    """The record of a finished training, else None."""
    record = read_json(run.model / _RECORD)
    return record if isinstance(record, dict) else None


def failure_of(run: Run) -> str | None:
    """Why a training failed, None if it did not."""
    failure = read_json(run.directory / "failure.json")
    return str(failure["reason"]) if isinstance(failure, dict) else None


def train_all(runs: Iterable[Run], reporter: Reporter, *, lock: int, retry_failed: bool, tried: set[str]) -> None:
    """Train what is not trained yet.

    Args:
        runs: in this order.
        reporter: is told about each.
        lock: a descriptor that the trainings inherit.
        retry_failed: also those that failed in an earlier comparison.
        tried: names of runs that this comparison has had its turn with; added to.
    """
    for run in runs:
        title = f"{run.label}, seed {run.seed}"
        if training_of(run) is not None:
            if run.name not in tried:
                tried.add(run.name)
                reporter.end(title, "reused")
            continue
        if failure_of(run) is not None and (run.name in tried or not retry_failed):
            reporter.end(title, f"failed before: {failure_of(run)}")
            continue
        tried.add(run.name)
        reporter.begin(title)
        reporter.end(title, _train(run, reporter, lock))


def _train(run: Run, reporter: Reporter, lock: int) -> str:
    config = run.directory / "config.json"
    options = {**run.options, "output": str(run.model), "resume": True, "accept_worse": True}
    # What is there was interrupted and can go on, unless it failed, or its files were moved meanwhile.
    resumes = read_json(config) == options and failure_of(run) is None
    if run.directory.exists() and not resumes:
        shutil.rmtree(run.directory)
    resumes = resumes and any(run.directory.glob(".*.checkpoints/checkpoint-*"))
    run.directory.mkdir(parents=True, exist_ok=True)
    write_json(config, options)
    write_json(
        run.directory / "run.json",
        {"format": 1, "variant": run.variant, "seed": run.seed, "digest": run.digest, "resumed": resumes},
    )
    status = run_process([*TRAIN, str(config)], run.log, reporter.line, lock)
    record = training_of(run)
    if status == 0 and record is not None:
        return f"loss {record['train_loss']:.3f}, {record['seconds']:.0f} s"
    reason = why(status, run.log) if status else f"it ended well but wrote no {_RECORD}"
    write_json(run.directory / "failure.json", {"reason": reason, "exit_status": status})
    return f"failed: {reason}"


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


@dataclass(frozen=True)
class Evaluation:
    """One model's answers to the test set.

    Attributes:
        name: for people.
        model: directory of what was trained; None: the base.
        directory: where its files are.
        digest: SHA-256 of what the answers depend on.
    """

    name: str
    model: Path | None
    directory: Path
    digest: str

    @property
    def output(self) -> Path:
        """The result's file."""
        return self.directory / f"evaluation-{self.digest[:10]}.json"

    @property
    def failure(self) -> Path:
        """The file of the reason why there is none."""
        return self.directory / f"evaluation-{self.digest[:10]}.failure.json"

    def result(self) -> dict[str, Any] | None:
        """What came out, None if nothing did."""
        result = read_json(self.output)
        return result if isinstance(result, dict) and result.get("digest") == self.digest else None

    def reason(self) -> str | None:
        """Why there is no result, None if it was not tried."""
        failure = read_json(self.failure)
        return f"evaluation: {failure['reason']}" if isinstance(failure, dict) else None


def evaluate_all(
    evaluations: Sequence[Evaluation],
    job: Mapping[str, Any],
    log: Path,
    reporter: Reporter,
    *,
    lock: int,
    retry_failed: bool,
) -> None:
    """Evaluate what is not evaluated yet, in one process as long as none dies.

    Args:
        evaluations: in this order.
        job: what ``evaluate.main`` reads, but for ``models``.
        log: of the process; a second process's has a number.
        reporter: is told about each.
        lock: a descriptor that the process inherits.
        retry_failed: also those that failed in an earlier comparison.
    """
    if retry_failed:
        for evaluation in evaluations:
            evaluation.failure.unlink(missing_ok=True)
    for evaluation in evaluations:
        if evaluation.result() is not None:
            reporter.end(f"evaluation of {evaluation.name}", "reused")
        elif evaluation.reason() is not None:
            reporter.end(f"evaluation of {evaluation.name}", f"failed before: {evaluation.reason()}")
    open_ones = [each for each in evaluations if each.result() is None and each.reason() is None]
    attempt = 0
    while open_ones:
        attempt += 1
        for evaluation in open_ones:
            evaluation.directory.mkdir(parents=True, exist_ok=True)
        job_file = log.with_suffix(".json")
        models = [
            {
                "name": each.name,
                "directory": None if each.model is None else str(each.model),
                "output": str(each.output),
                "failure": str(each.failure),
                "digest": each.digest,
            }
            for each in open_ones
        ]
        write_json(job_file, {**job, "models": models})
        this_log = log if attempt == 1 else log.with_name(f"{log.stem}-{attempt}{log.suffix}")
        reported: set[str] = set()
        reporter.begin(f"evaluation of {open_ones[0].name}")

        def line(text: str, reported: set[str] = reported, batch: Sequence[Evaluation] = tuple(open_ones)) -> None:
            _report(batch, reported, reporter)
            reporter.line(text)

        status = run_process([*EVALUATE, str(job_file)], this_log, line, lock)
        left = [each for each in open_ones if each.result() is None and each.reason() is None]
        if left:  # the process died over the first of them
            write_json(left[0].failure, {"reason": why(status, this_log), "exit_status": status})
        _report(open_ones, reported, reporter)
        open_ones = left[1:]


def _report(evaluations: Sequence[Evaluation], reported: set[str], reporter: Reporter) -> None:
    for each in evaluations:
        result, reason = each.result(), each.reason()
        if str(each.output) not in reported and (result or reason):
            reported.add(str(each.output))
            reporter.end(
                f"evaluation of {each.name}",
                f"test loss {result['loss']:.3f}, {result['seconds']:.0f} s" if result else f"failed: {reason}",
            )
