"""What to train, on what, and how: each option with its default, help and range, written down here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qaa_serve.training.errors import TrainingError
from qaa_serve.training.fields import check_ranges, flag, option

#: Which of a conversation's assistant messages the loss is on.
Answers: TypeAlias = Literal["all", "last"]

#: What the learning rate does after the warm-up, by transformers' names.
Schedule: TypeAlias = Literal["cosine", "linear", "constant"]

#: A score of answers, in percent.
Metric: TypeAlias = Literal["bleu", "rouge1", "rouge2", "rouge_l", "exact_match"]

#: Packages, of the extra `compare`, that scores need.
METRIC_PACKAGES = ("rouge_score", "sacrebleu")

WHAT, ADAPTER, COURSE = "what to train, on what", "the adapter", "the course of training"
ROWS, MACHINE, SHOWN = "the rows", "the machine", "what is told, and to whom"


@dataclass(frozen=True)
class TrainOptions:
    """What to train, on what, and how; ``qaa-serve train --help`` says what each option is.

    ``method_options`` are the method's own, such as ``{"layers": 3}``.

    Raises:
        TrainingError: for a value out of range.
    """

    model: str = option(
        help="base model: a directory, or a name on the Hugging Face hub",
        group=WHAT, metavar="BASE", card=False, shared=False,
    )  # fmt: skip
    data: str | Path | tuple[str | Path, ...] = option(
        help="training rows: .jsonl, .json, .csv, .parquet, or NAME[:SPLIT] of a data set, such as "
        "owner/name:train[:1000]; several are put together",
        group=WHAT, metavar="FILE", card=False, shared=False,
    )  # fmt: skip
    output: Path = option(help="where the adapter goes", group=WHAT, metavar="DIR", card=False, shared=False)
    data_weights: tuple[float, ...] = option(
        (), "how often an epoch takes the rows of each --data, such as 1 0.5 3; a part of a source is drawn "
        "by the seed (default: once)",
        group=WHAT, metavar="X", above=0, shared=False,
    )  # fmt: skip
    eval_data: str | Path | None = option(
        None, "rows to evaluate on, before and during training; the state that is best on them is kept",
        group=WHAT, metavar="FILE", card=False, shared=False,
    )  # fmt: skip
    overwrite: bool = option(
        False, "replace the adapter that is at --output", group=WHAT, free=True, card=False, shared=False
    )
    resume: bool = option(
        False, "go on where an interrupted training of the same options stopped",
        group=WHAT, free=True, card=False, shared=False,
    )  # fmt: skip
    accept_worse: bool = option(
        False, "save also what ends with a higher loss than it began with, which is an error otherwise",
        group=WHAT, free=True, card=False, shared=False,
    )  # fmt: skip
    method: str = option("qaa", "", card=False, shared=False)
    method_options: Mapping[str, Any] = field(default_factory=dict)
    target_modules: tuple[str, ...] = option(
        (), "linear layers to adapt, by name or its end (q_proj v_proj), or all-linear (default: those of the "
        "attention blocks)",
        group=ADAPTER, card=False,
    )  # fmt: skip
    exclude_modules: tuple[str, ...] = option(
        (), "of these, the layers to leave out, by name or its end", group=ADAPTER
    )
    layers_to_transform: tuple[int, ...] = option(
        (), "numbers of the blocks to adapt, from 0 (default: all)", group=ADAPTER, metavar="N", least=0
    )
    epochs: float = option(3.0, "passes over the data", group=COURSE, above=0)
    max_steps: int | None = option(None, "optimiser steps, in place of --epochs", group=COURSE, above=0)
    lr: float | None = option(None, "peak learning rate (default: the method's, see below)", group=COURSE, above=0)
    schedule: Schedule = option("cosine", "the learning rate after the warm-up", group=COURSE)
    warmup_ratio: float = option(
        0.05, "part of the steps in which the learning rate rises", group=COURSE, least=0, below=1
    )
    optim: str = option(
        "adamw_torch", "optimiser, by transformers' name: adamw_torch_fused, adamw_8bit (with bitsandbytes), "
        "adafactor, ...",
        group=COURSE,
    )  # fmt: skip
    batch_size: int = option(8, "rows a batch", group=COURSE, above=0)
    grad_accum: int = option(1, "batches an optimiser step", group=COURSE, above=0)
    max_grad_norm: float = option(1.0, "gradient clipping, 0 for none", group=COURSE, least=0)
    weight_decay: float = option(
        0.0,
        "the optimiser's, on matrices; angles, gates, biases and norms are never decayed",
        group=COURSE,
        least=0,
    )
    eval_steps: int | None = option(
        None, "steps from one evaluation on --eval-data to the next (default: an epoch)", group=COURSE, above=0
    )
    eval_metrics: tuple[Metric, ...] = option(
        (), "at each evaluation, have the prompts of --eval-data answered too, and score the answers (needs the "
        "extra compare)",
        group=COURSE,
    )  # fmt: skip
    eval_prompts: int = option(
        32, "prompts to have answered for it at most, taken evenly from --eval-data", group=COURSE, above=0,
        card=False,
    )  # fmt: skip
    eval_max_new_tokens: int = option(128, "tokens of such an answer at most", group=COURSE, above=0, card=False)
    best_by: Literal["loss", Metric] = option(
        "loss", "what says which state is best: the loss on --eval-data, or one of --eval-metrics", group=COURSE
    )
    patience: int | None = option(
        None, "stop after N evaluations that are not better (default: never)", group=COURSE, above=0
    )
    save_steps: int | None = option(
        None, "steps from one checkpoint to the next, without --eval-data (default: an epoch)",
        group=COURSE, above=0, card=False, shared=False,
    )  # fmt: skip
    seed: int = option(0, "of initial values, order and dropout", group=COURSE, least=0, below=2**32, shared=False)
    max_length: int | None = option(
        None,
        "tokens a row, longer ones are cut (default: 1024, or what the base takes if less)",
        group=ROWS,
        above=0,
    )
    answers: Answers = option(
        "all", "loss on all assistant messages of a conversation or on the last one", group=ROWS
    )
    packing: bool = option(
        False, "put short rows together, as many as --max-length holds; they do not see each other", group=ROWS
    )
    skip_bad_rows: bool = option(
        False, "report unusable rows and go on; by default they are an error", group=ROWS, card=False
    )
    threads: int | None = option(
        None, "CPU threads (default: torch's choice)", group=MACHINE, above=0, free=True, card=False
    )
    bf16: bool = option(False, "keep the base in bfloat16; the adapter stays float32", group=MACHINE)
    load_in_4bit: bool = option(
        False, "keep the base in 4 bits (NF4; a GPU and bitsandbytes are needed)", group=MACHINE
    )
    attn_implementation: str | None = option(
        None, "the base's attention, by transformers' name: sdpa, eager, flash_attention_2 (default: its own)",
        group=MACHINE, card=False,
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        False, "less memory for activations, more time", group=MACHINE, card=False
    )
    trust_remote_code: bool = option(
        False, "run Python code that comes with the base model", group=MACHINE, card=False
    )
    logging_steps: int = option(
        10, "steps from one line of the log to the next; every step's loss is kept in any case",
        group=SHOWN, above=0, free=True, card=False, shared=False,
    )  # fmt: skip
    report_to: tuple[str, ...] = option(
        (), "send the log there too: tensorboard, wandb, or another of transformers' integrations",
        group=SHOWN, free=True, card=False, shared=False,
    )  # fmt: skip
    push_to_hub: str | None = option(
        None, "upload the result to this repository of the Hugging Face hub, made as a private one if need be",
        group=SHOWN, metavar="OWNER/NAME", free=True, card=False, shared=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.data_weights and len(self.data_weights) != len(self.sources):
            raise TrainingError(
                f"--data-weights has {len(self.data_weights)} numbers for {len(self.sources)} sources of --data: "
                "give one for each"
            )
        for name in ("eval_steps", "eval_metrics", "patience"):
            if getattr(self, name) not in (None, ()) and self.eval_data is None:
                raise TrainingError(f"{flag(name)} needs --eval-data")
        if self.best_by not in ("loss", *self.eval_metrics):
            raise TrainingError(f"--best-by {self.best_by} needs --eval-metrics {self.best_by}")
        if self.save_steps is not None and self.eval_data is not None:
            raise TrainingError(
                "--save-steps: with --eval-data a checkpoint follows each evaluation: use --eval-steps"
            )

    @property
    def sources(self) -> tuple[str | Path, ...]:
        """What ``data`` names, one by one."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    def to_json(self) -> dict[str, Any]:
        """Every option as JSON has it, the method's own among the others: what ``--config`` reads."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        own = values.pop("method_options")
        return {name: _json_value(value) for name, value in {**values, **own}.items()}


def names(**metadata: object) -> set[str]:
    """Names of the options whose fields say so: ``names(free=True)``."""
    return {
        field.name
        for field in fields(TrainOptions)
        if "help" in field.metadata and metadata.items() <= dict(field.metadata).items()
    }


def _json_value(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return [_json_value(item) for item in value] if isinstance(value, tuple) else value
