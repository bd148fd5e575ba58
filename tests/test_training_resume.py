"""Trainings that end before their time: what is left, and that going on gives the result of an unbroken one."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fork_server import training_server
from safetensors.torch import load_file
from server_process import free_port
from training_support import ROWS, files, options, weights
from transformers import Trainer

from qaa_serve.training import TrainingError, TrainOptions, train
from qaa_serve.training.methods import COMPARED


class KilledError(RuntimeError):
    """Stands for a process that is gone at once."""


def kill_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KilledError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)


def changed(base: Path, data: Path, **more: Any) -> TrainOptions:
    """Three epochs of four steps, so that a resumption falls into the middle of one."""
    return options(base, data, max_steps=None, epochs=3.0, batch_size=2, **more)


def record(output: Path) -> dict[str, Any]:
    return json.loads((output / "training.json").read_text())


@pytest.mark.parametrize(("method", "evaluates"), [("qaa", False), *((method, True) for method in COMPARED)])
def test_resumed_training_ends_as_an_unbroken_one(
    base: Path, data: Path, method: str, evaluates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"eval_data": data, "eval_steps": 3} if evaluates else {"save_steps": 3}
    whole = train(changed(base, data, method=method, **more)).output
    broken = whole.with_name("broken")
    with monkeypatch.context() as patch:
        kill_at_step(patch, 8)
        with pytest.raises(KilledError):
            train(changed(base, data, method=method, output=broken, **more))
    assert not broken.exists()
    train(changed(base, data, method=method, output=broken, resume=True, **more))
    assert weights(broken) == weights(whole)
    for key in ("losses", "evaluations", "best_step", "eval_loss", "steps"):
        assert record(broken)[key] == record(whole)[key]
    assert sorted(path.name for path in whole.parent.iterdir()) == ["broken", "new"]


def test_checkpoints_hold_only_what_is_trained(base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at_step(monkeypatch, 5)
    with pytest.raises(KilledError):
        train(changed(base, data))
    checkpoints = data.parent / "adapters" / ".new.checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "options.json"]
    tensors = load_file(checkpoints / "checkpoint-4" / "trained.safetensors")
    assert all("qaa_" in name for name in tensors)


def test_half_written_checkpoint_is_passed_over(base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(changed(base, data, save_steps=2)).output
    broken = whole.with_name("broken")
    with monkeypatch.context() as patch:
        kill_at_step(patch, 7)
        with pytest.raises(KilledError):
            train(changed(base, data, output=broken, save_steps=2))
    half = broken.with_name(".broken.checkpoints") / "checkpoint-8"
    half.mkdir()
    (half / "trained.safetensors").write_bytes(b"half")
    train(changed(base, data, output=broken, save_steps=2, resume=True))
    assert weights(broken) == weights(whole)


def test_interrupted_training_is_not_begun_anew_unasked(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at_step(patch, 5)
        with pytest.raises(KilledError):
            train(changed(base, data))
    with pytest.raises(TrainingError, match=r"left .*checkpoint-4: go on with --resume, or begin anew with"):
        train(changed(base, data))
    with pytest.raises(TrainingError, match=r"had other options \(seed was 0, is 1\)"):
        train(changed(base, data, seed=1, resume=True))
    described = data.parent / "adapters" / ".new.checkpoints" / "options.json"
    before = described.read_text()
    described.write_text("{")
    with pytest.raises(TrainingError, match=r"options.json cannot be read .*to begin anew"):
        train(changed(base, data, resume=True))
    described.write_text(before)
    rows = data.read_text()
    data.write_text(rows + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(TrainingError, match=r"data SHA-256 was"):
        train(changed(base, data, resume=True))
    train(changed(base, data, overwrite=True))
    assert [path.name for path in (data.parent / "adapters").iterdir()] == ["new"]


def test_resume_without_a_checkpoint_begins(base: Path, data: Path) -> None:
    first = train(changed(base, data)).output
    again = train(changed(base, data, resume=True, output=first.with_name("again"))).output
    assert weights(again) == weights(first)


def test_early_stop_keeps_the_best(base: Path, data: Path) -> None:
    """Evaluated on answers that contradict the training data: the loss on them soon rises."""
    other = data.with_name("other.jsonl")
    other.write_text(data.read_text().replace("arr", "zzz"))
    result = train(changed(base, data, eval_data=other, eval_steps=1, patience=2, lr=0.1))
    losses = [loss for _, loss in result.evaluations[1:]]
    assert result.steps < 12
    assert result.best_step == 1 + losses.index(min(losses))
    assert len(losses) == result.steps == result.best_step + 2
    assert result.eval_loss == min(losses)


# ---------------------------------------------------------------------------------- the command, in a process


class Command:
    """`qaa-serve train`, forked from a process that has imported everything; `process` is it."""

    def __init__(
        self,
        base: Path,
        data: Path,
        *more: str,
        program: Sequence[str] = ("-m", "qaa_serve.cli"),
        **variables: str,
    ):
        given = ["--model", base, "--data", data, "--output", data.parent / "out", "--batch-size", "2", *more]
        place = Path(tempfile.mkdtemp(dir=data.parent.parent))
        self._files = (place / "out", place / "err")
        for file in self._files:
            file.touch()
        command = [sys.executable, *program, "train", *map(str, given)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        self.process = training_server().start(command, environment, *self._files)

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: the status, and what it has said on standard output and standard error."""
        status = self.process.wait(120)
        out, err = (file.read_text() for file in self._files)
        return status, out, err


def wait_for_checkpoint(command: Command, checkpoints: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/complete")):
        assert command.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_after_a_checkpoint(base: Path, data: Path, number: signal.Signals) -> None:
    command = Command(base, data, "--epochs", "100000")  # far more than there is time for
    wait_for_checkpoint(command, data.parent / ".out.checkpoints")
    command.process.send_signal(number)
    status, out, err = command.end()
    assert status == 128 + number
    assert "interrupted at step" in err
    assert "the same command with --resume goes on from there" in err
    assert "Traceback" not in err
    assert not out
    left = {path.name for path in data.parent.iterdir()}
    assert left == {data.name, ".out.checkpoints"}
    step = int(err.rpartition("at step ")[2].split()[0])
    assert (data.parent / ".out.checkpoints" / f"checkpoint-{step}" / "complete").exists()


#: The command, by whom a file may grow to 2 KiB and no further: what a full disk looks like to a writer. What it
#: says goes to files too.
LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
runpy.run_module("qaa_serve.cli", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_full_disk_is_one_message_and_nothing_half_written(base: Path, data: Path, tmp_path: Path) -> None:
    program = tmp_path / "limited.py"
    program.write_text(LIMITED)
    status, _, err = Command(base, data, "--epochs", "1", program=(str(program),)).end()
    assert status == 2
    assert "cannot be written" in err
    assert "Traceback" not in err
    assert not (data.parent / "out").exists()
    assert not list(data.parent.glob(".out.*[!s]"))


@pytest.mark.slow
def test_two_processes_train_as_one(base: Path, data: Path) -> None:
    """As torchrun starts them, two processes of two rows a step: the gradients of one process with four."""
    held = data.with_name("held.jsonl")  # of unlike lengths, and no number that two processes could share
    held.write_text(
        "".join(f'{{"prompt": "x", "completion": "{"ab~"[n % 3] * (1 + 5 * n)}"}}\n' for n in range(7))
    )
    given = {"max_steps": 6, "batch_size": 4, "lr": 1e-3, "accept_worse": True, "eval_data": held, "eval_steps": 2}
    given |= {"eval_metrics": ("rouge1",), "eval_max_new_tokens": 4}  # one prompt: a process has none to answer
    one = train(options(base, data, output=data.parent / "one", **given))
    options_of_two = [
        "--output", data.parent / "two", "--max-steps", "6", "--lr", "0.001", "--eval-data", held,
        "--eval-steps", "2", "--accept-worse", "--eval-metrics", "rouge1", "--eval-max-new-tokens", "4",
    ]  # fmt: skip
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    commands = [
        Command(base, data, *map(str, options_of_two), **together, RANK=rank, LOCAL_RANK=rank) for rank in "01"
    ]
    said = ""
    for command in commands:
        status, out, err = command.end()
        assert status == 0, err
        said += out
    assert said.count("saved in") == 1
    two = record(data.parent / "two")
    assert two["losses"] == pytest.approx(one.losses, abs=2e-3)
    assert [step for step, _ in two["evaluations"]] == [0, 2, 4, 6]
    assert two["evaluation_scores"][0] == list(one.evaluation_scores[0])
    assert two["base_eval_loss"] == pytest.approx(one.base_eval_loss, abs=1e-5)
    assert two["eval_loss"] == pytest.approx(one.eval_loss, abs=2e-3)
    assert sorted(files(data.parent / "two")) == sorted(files(data.parent / "one"))
