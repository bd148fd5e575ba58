"""What a training gives back, and what training.json says of it. The README.md beside that says it to people."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import peft
import torch
import transformers

from qaa_serve import __version__
from qaa_serve.training.data import Examples
from qaa_serve.training.options import TrainOptions

RECORD_FILE = "training.json"
RECORD_FORMAT = 1

#: Of a result, what is not in the record under the same name.
_UNRECORDED = ("output", "rows", "probe", "notes", "best_by")


@dataclass(frozen=True)
class TrainResult:
    """What came out.

    Attributes:
        output: directory of the adapter, or of the model.
        target_modules: the layers it adapts; empty for methods that adapt none.
        trainable: number of trained parameters.
        total: number of parameters of the base.
        rows: number of rows trained on.
        steps: optimiser steps.
        tokens: gone through in all of them, as an average over the rows.
        best_step: step whose state was kept, the best one by ``best_by``; None without evaluation.
        best_by: ``loss``, or the score of the evaluations that says what is best.
        losses: loss of every step, in nats a token.
        grad_norms: norm of every step's gradient before clipping; empty without clipping.
        learning_rates: of every step.
        evaluations: (step, loss) of every evaluation, the first one before training.
        evaluation_scores: (step, percent by metric) of every evaluation; empty if none were asked for.
        probe: loss on a few of the training rows before and after; None with evaluation data.
        seconds: duration of the training loop; after a resumption that of its last part.
        seconds_per_step: median duration of a step, evaluation left out.
        memory: bytes: ``base_rss_bytes`` and ``peak_rss_bytes``, resident before and at most during training;
            ``saved_for_backward_bytes``, kept by autograd for the first batch, without parameters;
            ``peak_cuda_bytes``, the most that the CUDA allocator handed out, None without a GPU.
        notes: lines about rows that were left out or cut.
    """

    output: Path
    target_modules: tuple[str, ...]
    trainable: int
    total: int
    rows: int
    steps: int
    tokens: int
    best_step: int | None
    best_by: str
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    learning_rates: tuple[float, ...]
    evaluations: tuple[tuple[int, float], ...]
    evaluation_scores: tuple[tuple[int, Mapping[str, float]], ...]
    probe: tuple[float, float] | None
    seconds: float
    seconds_per_step: float
    memory: Mapping[str, int | None]
    notes: tuple[str, ...]

    @property
    def first_loss(self) -> float:
        """Mean loss over the first twentieth of the steps, in nats a token."""
        return fmean(self.losses[: max(1, len(self.losses) // 20)])

    @property
    def train_loss(self) -> float:
        """Mean loss over the last twentieth of the steps."""
        return fmean(self.losses[-max(1, len(self.losses) // 20) :])

    @property
    def base_eval_loss(self) -> float | None:
        """Loss on the evaluation rows before training."""
        return self.evaluations[0][1] if self.evaluations else None

    @property
    def eval_loss(self) -> float | None:
        """Loss on them of the state that was kept."""
        return dict(self.evaluations)[self.best_step] if self.best_step is not None else None

    @property
    def scores(self) -> dict[str, tuple[float, float]]:
        """By metric of the evaluations: in percent, before training and of the state that was kept."""
        if self.best_step is None or not self.evaluation_scores:
            return {}
        before, after = self.evaluation_scores[0][1], dict(self.evaluation_scores)[self.best_step]
        return {name: (before[name], after[name]) for name in before}

    @property
    def compared(self) -> tuple[str, float, float]:
        """What says whether the training helped, before and after it.

        The score that the state was kept by if it changed, else the loss: on the evaluation rows or else on some
        of those trained on.
        """
        if self.best_by != "loss":
            before, after = self.scores[self.best_by]
            if before != after:
                return self.best_by, before, after
        if self.base_eval_loss is not None and self.eval_loss is not None:
            return "loss", self.base_eval_loss, self.eval_loss
        return "loss", *(self.probe or (0.0, 0.0))

    @property
    def is_worse(self) -> bool:
        """Whether the training did more harm than good. The few rows of the probe may be a hundredth off."""
        what, before, after = self.compared
        if what != "loss":
            return after < before
        return not after <= before * (1.0 if self.evaluations else 1.01)


def training_record(
    options: TrainOptions,
    used: dict[str, Any],
    rows: Examples,
    eval_rows: Examples | None,
    result: TrainResult,
    directory: Path,
) -> dict[str, Any]:
    """The object to write to training.json; docs/training.md lists its keys.

    Args:
        options: as given.
        used: options with the values that stood for None or were the method's defaults.
        rows: what was trained on.
        eval_rows: what was evaluated on.
        result: what came out.
        directory: holds the weights already.
    """

    def source(read: Examples) -> dict[str, Any]:
        return {"source": read.name, "rows": read.source_rows, "sha256": read.digest}

    return {
        "format": RECORD_FORMAT,
        "method": options.method,
        "options": options.to_json() | used,
        "versions": {  # of everything that the numbers depend on
            "qaa-serve": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
        },
        "data": source(rows),
        "eval_data": None if eval_rows is None else source(eval_rows),
        **{field.name: getattr(result, field.name) for field in fields(result) if field.name not in _UNRECORDED},
        "first_loss": result.first_loss,
        "train_loss": result.train_loss,
        "base_eval_loss": result.base_eval_loss,
        "eval_loss": result.eval_loss,
        "adapter_bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
    }
