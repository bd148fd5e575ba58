"""Training from the options to a saved adapter."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from qaa_serve.adapters import CONFIG_FILE
from qaa_serve.adapters.staging import staged
from qaa_serve.training.card import model_card
from qaa_serve.training.data import Answers, Examples, collator, read_examples
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.methods import get_method
from qaa_serve.training.progress import Progress
from qaa_serve.training.targets import resolve_targets

_DEFAULT_MAX_LENGTH = 1024


@dataclass(frozen=True)
class TrainOptions:
    """What to train, on what, and how.

    Attributes:
        model: the base: a directory, or a name on the Hugging Face hub.
        data: JSON lines, see ``qaa_serve.training.data``.
        output: directory of the adapter.
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
        max_length: tokens a row; None: 1024, or what the base can take if that is less.
        answers: whether the loss is on all assistant messages of a conversation or on the last one.
        eval_data: rows for the evaluation before the first and after every epoch.
        skip_bad_rows: leave unusable rows out instead of refusing the file.
        seed: of the initial angles and weights, the order of the rows, and dropout.
        bf16: keep the frozen base in bfloat16; the adapter is float32 in any case.
        gradient_checkpointing: recompute activations in the backward pass, which saves memory and costs time.
        threads: CPU threads; None: torch's choice.
        overwrite: replace an adapter that is at ``output``.
        trust_remote_code: run code that comes with the base model.

    Raises:
        TrainingError: for a value out of range.
    """

    model: str
    data: Path
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
    max_length: int | None = None
    answers: Answers = "all"
    eval_data: Path | None = None
    skip_bad_rows: bool = False
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    threads: int | None = None
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        positive = ("epochs", "max_steps", "lr", "batch_size", "grad_accum", "max_length", "threads")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TrainingError(f"--{name.replace('_', '-')} must be above 0, found {value}")
        if not 0 <= self.warmup_ratio < 1:
            raise TrainingError(f"--warmup-ratio must be at least 0 and below 1, found {self.warmup_ratio}")
        if self.max_grad_norm < 0:
            raise TrainingError(f"--max-grad-norm must not be below 0, found {self.max_grad_norm}")
        if self.schedule not in SCHEDULES:
            raise TrainingError(f"--schedule must be one of {', '.join(SCHEDULES)}, found {self.schedule!r}")
        if not 0 <= self.seed < 2**32:
            raise TrainingError(f"--seed must be from 0 to 2**32 - 1, found {self.seed}")


#: Name -> what transformers calls the schedule.
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainResult:
    """What came out.

    Attributes:
        output: the adapter's directory.
        target_modules: the layers it adapts.
        trainable: number of trained parameters.
        total: number of parameters of the base.
        rows: number of rows trained on.
        steps: optimiser steps.
        seconds: duration of the training loop.
        first_loss: mean loss over the first twentieth of the steps, in nats a token.
        train_loss: the same over the last twentieth.
        base_eval_loss: loss on the evaluation rows before training, None without such rows.
        eval_loss: loss on them after training.
        notes: lines about rows that were left out or cut.
    """

    output: Path
    target_modules: tuple[str, ...]
    trainable: int
    total: int
    rows: int
    steps: int
    seconds: float
    first_loss: float
    train_loss: float
    base_eval_loss: float | None
    eval_loss: float | None
    notes: tuple[str, ...]


def train(options: TrainOptions) -> TrainResult:
    """Train an adapter and save it.

    Nothing is at ``options.output`` before all of it is: an error or an interrupt leaves what was there.

    Raises:
        TrainingError: for anything wrong with the options, the base or the data, and if the loss diverges.
    """
    method = get_method(options.method)
    method_options = method.with_defaults(options.method_options)
    learning_rate = method.learning_rate if options.lr is None else options.lr
    _check_output(options)
    _check_devices()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    set_seed(options.seed)

    base, tokenizer = _load_base(options)
    total = base.num_parameters()
    max_length = _max_length(options, base)

    def read(path: Path) -> Examples:
        return read_examples(
            path,
            tokenizer,
            max_length=max_length,
            answers=options.answers,
            skip_bad_rows=options.skip_bad_rows,
        )

    rows = read(options.data)
    eval_rows = None if options.eval_data is None else read(options.eval_data)
    targets = resolve_targets(base, options.target_modules)
    model = method.build(base, targets, method_options)
    groups = method.groups(model, learning_rate, method_options)
    progress = Progress()
    started = time.perf_counter()
    _fit(options, model, groups, tokenizer, rows, eval_rows, progress)
    result = TrainResult(
        output=options.output,
        target_modules=tuple(targets),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=total,
        rows=len(rows),
        steps=progress.steps,
        seconds=time.perf_counter() - started,
        first_loss=progress.first_loss(),
        train_loss=progress.last_loss(),
        base_eval_loss=progress.eval_losses[0] if eval_rows else None,
        eval_loss=progress.eval_losses[-1] if eval_rows else None,
        notes=tuple(_notes(options, tokenizer, max_length, rows, eval_rows)),
    )
    with staged(options.output) as directory:
        method.save(model, directory, base_reference(options.model, options.output))
        card = model_card(options, method_options, learning_rate, max_length, rows, eval_rows, result)
        (directory / "README.md").write_text(card, encoding="utf-8")
    return result


def base_reference(model: str, output: Path) -> str:
    """The base as an adapter's config names it: a hub's name as is, a directory relative to the adapter's."""
    if not Path(model).is_dir():
        return model
    try:
        return Path(os.path.relpath(Path(model).resolve(), output.resolve())).as_posix()
    except ValueError:  # another drive
        return str(Path(model).resolve())


def _check_output(options: TrainOptions) -> None:
    """Fail now on what would make saving fail later."""
    output = options.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not options.overwrite:
            raise TrainingError(f"output {output} exists; choose another --output, or replace it with --overwrite")
        if not (output / CONFIG_FILE).is_file():
            raise TrainingError(
                f"output {output} is no adapter (it has no {CONFIG_FILE}) and --overwrite would delete it: "
                "choose another --output"
            )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise TrainingError(f"output {output} cannot be made: {parent} is not a directory that may be written to")


def _check_devices() -> None:
    if torch.cuda.device_count() > 1:
        raise TrainingError(
            f"{torch.cuda.device_count()} GPUs are visible and one is used: choose it, "
            "for example CUDA_VISIBLE_DEVICES=0"
        )


def _load_base(options: TrainOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name, trust = options.model, options.trust_remote_code
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise TrainingError(f"model {name!r}: there is no such directory")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise TrainingError(f"model {name!r} has no config.json: it is no directory of a transformers model")
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, trust_remote_code=trust)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TrainingError(f"model {name!r} cannot be loaded: {error}") from error
    return model, tokenizer


def _max_length(options: TrainOptions, base: PreTrainedModel) -> int:
    most = getattr(base.config, "max_position_embeddings", None) or _DEFAULT_MAX_LENGTH
    if options.max_length is None:
        return min(_DEFAULT_MAX_LENGTH, most)
    if options.max_length > most:
        raise TrainingError(f"--max-length is {options.max_length}, but the base model takes {most} tokens")
    return options.max_length


def _fit(
    options: TrainOptions,
    model: PeftModel,
    groups: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    rows: Examples,
    eval_rows: Examples | None,
    progress: Progress,
) -> None:
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:  # Trainer insists on a directory; nothing is kept in it
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=options.epochs,
                max_steps=options.max_steps or -1,
                per_device_train_batch_size=options.batch_size,
                per_device_eval_batch_size=options.batch_size,
                gradient_accumulation_steps=options.grad_accum,
                gradient_checkpointing=options.gradient_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                lr_scheduler_type=SCHEDULES[options.schedule],
                warmup_steps=options.warmup_ratio,
                max_grad_norm=options.max_grad_norm,
                train_sampling_strategy="group_by_length",
                eval_strategy="epoch" if eval_rows else "no",
                eval_on_start=eval_rows is not None,
                prediction_loss_only=True,
                logging_strategy="steps",
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                label_names=["labels"],
                dataloader_pin_memory=on_gpu,
                use_cpu=not on_gpu,
                seed=options.seed,
            ),
            train_dataset=rows,
            eval_dataset=eval_rows,
            data_collator=collator(tokenizer.pad_token_id or 0),
            optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        with progress:
            trainer.train()
            if eval_rows and progress.evaluated_at != progress.steps:  # stopped within an epoch
                trainer.evaluate()


def _notes(
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    rows: Examples,
    eval_rows: Examples | None,
) -> list[str]:
    notes = []
    for path, read in ((options.data, rows), (options.eval_data, eval_rows)):
        if read is not None:
            notes += [f"{path}: left out {problem}" for problem in read.problems]
            if read.shortened:
                notes.append(f"{path}: {read.shortened} of {len(read)} rows were cut to {max_length} tokens")
    if not any(tokenizer.eos_token_id in row["labels"] for row in rows.rows):
        notes.append(
            f"{options.data}: no answer ends with {tokenizer.eos_token!r}, the model's end token, "
            "so that the adapter learns no end"
        )
    return notes
