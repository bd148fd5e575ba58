"""What to train, on what, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qaa_serve.training.errors import TrainingError

#: Which of a conversation's assistant messages the loss is on.
Answers: TypeAlias = Literal["all", "last"]


@dataclass(frozen=True)
class TrainOptions:
    """What to train, on what, and how.

    Attributes:
        model: the base: a directory, or a name on the Hugging Face hub.
        data: rows to train on: a file or a data set, see ``read_source``.
        output: directory of the adapter, or of the model for the method ``full``.
        method: name of the method.
        method_options: the method's own options, such as ``{"layers": 3}``.
        target_modules: the layers to adapt; empty: the linear layers of the attention blocks.
        epochs: passes over the data; may be a fraction.
        max_steps: optimiser steps after which to stop, in place of ``epochs``.
        lr: peak learning rate; None: the method's default.
        schedule: what the learning rate does after the warm-up: ``cosine``, ``linear`` or ``constant``.
        warmup_ratio: part of the steps in which the learning rate rises from 0.
        batch_size: rows a step on the device.
        grad_accum: how many such batches make one optimiser step.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        weight_decay: AdamW's, on matrices; angles, gates, biases and norms are never decayed.
        max_length: tokens a row; None: 1024, or what the base can take if that is less.
        answers: whether the loss is on all assistant messages of a conversation or on the last one.
        packing: put short rows together into rows of ``max_length`` tokens, which do not see each other.
        eval_data: rows for the evaluation before the first step and during training. The state with the lowest
            loss on them is what is kept.
        eval_steps: steps from one evaluation, and checkpoint, to the next; None: an epoch.
        patience: stop after so many evaluations without a lower loss; None: never.
        save_steps: steps from one checkpoint to the next, where there is no ``eval_data``; None: an epoch.
        resume: go on from the last checkpoint of a training that was interrupted, if there is one.
        skip_bad_rows: leave unusable rows out instead of refusing the file.
        seed: of the initial angles and weights, the order of the rows, and dropout.
        bf16: keep the frozen base in bfloat16, the adapter in float32; ``full`` computes in bfloat16 and keeps
            float32 weights.
        gradient_checkpointing: recompute activations in the backward pass, which saves memory and costs time.
        threads: CPU threads; None: torch's choice.
        overwrite: replace an adapter that is at ``output``.
        trust_remote_code: run code that comes with the base model.

    Raises:
        TrainingError: for a value out of range.
    """

    model: str
    data: str | Path
    output: Path
    method: str = "qaa"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    target_modules: tuple[str, ...] = ()
    epochs: float = 3.0
    max_steps: int | None = None
    lr: float | None = None
    schedule: str = "cosine"
    warmup_ratio: float = 0.05
    batch_size: int = 8
    grad_accum: int = 1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    max_length: int | None = None
    answers: Answers = "all"
    packing: bool = False
    eval_data: str | Path | None = None
    eval_steps: int | None = None
    patience: int | None = None
    save_steps: int | None = None
    resume: bool = False
    skip_bad_rows: bool = False
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    threads: int | None = None
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        positive = ("epochs", "max_steps", "lr", "batch_size", "grad_accum", "max_length", "threads")
        for name in (*positive, "eval_steps", "save_steps", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TrainingError(f"{flag(name)} must be above 0, found {value}")
        if not 0 <= self.warmup_ratio < 1:
            raise TrainingError(f"--warmup-ratio must be at least 0 and below 1, found {self.warmup_ratio}")
        for name in ("rank", "prefix_tokens", "theta_lr", "alpha"):
            value = self.method_options.get(name)
            if value is not None and not value > 0:
                raise TrainingError(f"{flag(name)} must be above 0, found {value}")
        for name in ("max_grad_norm", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise TrainingError(f"{flag(name)} must not be below 0, found {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise TrainingError(f"--schedule must be one of {', '.join(SCHEDULES)}, found {self.schedule!r}")
        if not 0 <= self.seed < 2**32:
            raise TrainingError(f"--seed must be from 0 to 2**32 - 1, found {self.seed}")
        for name in ("eval_steps", "patience"):
            if getattr(self, name) is not None and self.eval_data is None:
                raise TrainingError(f"{flag(name)} needs --eval-data")
        if self.save_steps is not None and self.eval_data is not None:
            raise TrainingError(
                "--save-steps: with --eval-data a checkpoint follows each evaluation: use --eval-steps"
            )

    def to_json(self) -> dict[str, Any]:
        """Every option as JSON has it, the method's own among the others: what ``--config`` reads."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        own = values.pop("method_options")
        return {name: _json_value(value) for name, value in {**values, **own}.items()}


def flag(name: str) -> str:
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def _json_value(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


#: Name -> what transformers calls the schedule.
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
