"""training.json: what a training was, for programs. The README.md beside it says it to people."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from qaa_serve import __version__
from qaa_serve.training.data import Examples
from qaa_serve.training.options import TrainOptions
from qaa_serve.training.result import TrainResult

RECORD_FILE = "training.json"
RECORD_FORMAT = 1


def versions() -> dict[str, str]:
    """Of everything that the numbers depend on."""
    return {
        "qaa-serve": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }


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
        "versions": versions(),
        "data": source(rows),
        "eval_data": None if eval_rows is None else source(eval_rows),
        "target_modules": list(result.target_modules),
        "trainable": result.trainable,
        "total": result.total,
        "steps": result.steps,
        "tokens": result.tokens,
        "best_step": result.best_step,
        "losses": list(result.losses),
        "grad_norms": list(result.grad_norms),
        "learning_rates": list(result.learning_rates),
        "evaluations": [list(pair) for pair in result.evaluations],
        "first_loss": result.first_loss,
        "train_loss": result.train_loss,
        "base_eval_loss": result.base_eval_loss,
        "eval_loss": result.eval_loss,
        "seconds": result.seconds,
        "seconds_per_step": result.seconds_per_step,
        "adapter_bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        "memory": {f"{name}_bytes": value for name, value in dataclasses.asdict(result.memory).items()},
    }
