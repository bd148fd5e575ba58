"""The loss while training goes on: a bar on a terminal, some lines elsewhere."""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TextIO

import rich.progress
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState

from qaa_serve.training.errors import DivergedError

_LINES = 20  # where there is no terminal
_SMOOTHING = 0.9


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows the losses; stops the training when they are no numbers any more, or do not get better.

    Use it as a context around the training, so that the bar is closed in any case.

    Attributes:
        stopped_early: whether ``patience`` ran out.

    Args:
        stream: where to write; None: stderr.
        quiet: write nothing.
        patience: stop after so many evaluations that are not better; None: never.
        best_by: what says which is better: ``eval_loss``, or a score of the evaluations.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        quiet: bool = False,
        patience: int | None = None,
        best_by: str = "eval_loss",
    ) -> None:
        self.stopped_early = False
        self._patience, self._best_by = patience, best_by
        self._console = Console(file=stream or sys.stderr, quiet=quiet)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("training"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("of which left"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("loss -", total=None)
        self._smooth = math.nan
        self._taken = self._told = 0  # entries of the history; the step of the last line

    def waiting(self, what: str) -> AbstractContextManager[object]:
        """Shows on a terminal what is being waited for."""
        return self._console.status(what)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Takes the losses of the steps since the last log."""
        if "loss" not in logs:
            return
        for entry in [entry for entry in state.log_history if "loss" in entry][self._taken :]:
            self._taken += 1
            loss = float(entry["loss"])
            if not math.isfinite(loss) or not math.isfinite(float(entry.get("grad_norm", 0.0))):
                raise DivergedError(
                    f"training diverged at step {entry['step']} of {state.max_steps} (loss {loss}): "
                    "try a lower --lr or --alpha. Nothing was saved"
                )
            before = loss if math.isnan(self._smooth) else self._smooth
            self._smooth = _SMOOTHING * before + (1 - _SMOOTHING) * loss
        text = f"loss {self._smooth:.3f}, rate {logs['learning_rate']:.2g}"
        if "grad_norm" in logs:
            text += f", gradient norm {logs['grad_norm']:.2g}"
        self._bar.update(self._task, completed=state.global_step, total=state.max_steps, description=text)
        if not self._console.is_terminal and self._is_line_due(state):
            self._told = state.global_step
            self._console.print(f"step {state.global_step}/{state.max_steps}, {text}", highlight=False)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """Takes what an evaluation found. Patience is counted from the history, which checkpoints keep."""
        key = self._best_by
        found = [entry[key] for entry in state.log_history if key in entry and entry["step"]]
        best = (min if key == "eval_loss" else max)(found, default=None)
        if self._patience is not None and found and len(found) - 1 - found.index(best) >= self._patience:
            self.stopped_early = control.should_training_stop = True
        scores = {name: score for name, score in metrics.items() if name != "eval_loss"}
        text = "".join(f", {name.removeprefix('eval_')} {score:.1f}" for name, score in scores.items())
        self._bar.console.print(
            f"step {state.global_step}, evaluation loss {metrics['eval_loss']:.3f}{text}", highlight=False
        )

    def _is_line_due(self, state: TrainerState) -> bool:
        step: int = state.global_step
        return step - self._told >= max(1, state.max_steps // _LINES) or step == int(state.max_steps)
