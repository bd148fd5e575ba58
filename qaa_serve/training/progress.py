"""The loss while training goes on: a bar on a terminal, some lines elsewhere."""

from __future__ import annotations

import math
import sys
from types import TracebackType
from typing import Any, TextIO

import rich.progress
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qaa_serve.training.errors import TrainingError

_LINES = 20  # where there is no terminal
_SMOOTHING = 0.9


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows and keeps the losses; stops the training when they are no numbers any more.

    Use it as a context around the training, so that the bar is closed in any case.

    Attributes:
        losses: loss of every step, in nats a token.
        eval_losses: loss of every evaluation, the first one before training.
        evaluated_at: step of the last evaluation, -1 for none.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.losses: list[float] = []
        self.eval_losses: list[float] = []
        self.evaluated_at = -1
        self._console = Console(file=stream or sys.stderr)
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

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def steps(self) -> int:
        """Number of steps done."""
        return len(self.losses)

    def first_loss(self) -> float:
        """Mean loss over the first twentieth of the steps."""
        return self._mean(self.losses[: self._twentieth])

    def last_loss(self) -> float:
        """Mean loss over the last twentieth of the steps."""
        return self._mean(self.losses[-self._twentieth :])

    @property
    def _twentieth(self) -> int:
        return max(1, self.steps // 20)

    @staticmethod
    def _mean(losses: list[float]) -> float:
        return math.fsum(losses) / len(losses)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes the loss of a step."""
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss) or not math.isfinite(float(logs.get("grad_norm", 0.0))):
            raise TrainingError(
                f"training diverged at step {state.global_step} of {state.max_steps} (loss {loss}): "
                "try a lower --lr or --alpha. Nothing was saved"
            )
        self.losses.append(loss)
        self._smooth = loss if self.steps == 1 else _SMOOTHING * self._smooth + (1 - _SMOOTHING) * loss
        text = f"loss {self._smooth:.3f}"
        self._bar.update(self._task, completed=state.global_step, total=state.max_steps, description=text)
        if not self._console.is_terminal and self._is_line_due(state):
            self._console.print(f"step {state.global_step}/{state.max_steps}, {text}", highlight=False)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Takes the loss of an evaluation."""
        self.eval_losses.append(metrics["eval_loss"])
        self.evaluated_at = state.global_step
        self._bar.console.print(
            f"step {state.global_step}, evaluation loss {metrics['eval_loss']:.3f}", highlight=False
        )

    @staticmethod
    def _is_line_due(state: TrainerState) -> bool:
        every = max(1, state.max_steps // _LINES)
        return bool(state.global_step % every == 0 or state.global_step == state.max_steps)
