"""Training from the options to what is saved."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from qaa_serve.adapters.staging import staged
from qaa_serve.training.answers import score_answers
from qaa_serve.training.card import model_card
from qaa_serve.training.data import collate
from qaa_serve.training.errors import DivergedError, Interrupted, TrainingError, WorseError
from qaa_serve.training.loss import row_losses
from qaa_serve.training.options import TrainOptions, names
from qaa_serve.training.prepare import Prepared, out_of_memory, prepare, without_cache
from qaa_serve.training.progress import Progress
from qaa_serve.training.result import RECORD_FILE, TrainResult, training_record
from qaa_serve.training.trainer import (
    AdapterTrainer,
    Flow,
    PeakMemory,
    drop_incomplete,
    is_main_process,
    last_checkpoint,
    world_size,
)

#: Schedules that transformers calls otherwise.
_SCHEDULES = {"constant": "constant_with_warmup"}

#: Rows of the training data whose loss before and after says whether it helped, where there is no evaluation data.
_PROBED_ROWS = 16


def train(options: TrainOptions) -> TrainResult:
    """Train and save.

    Nothing is at ``options.output`` before all of it is: an error or an interrupt leaves what was there.

    Raises:
        TrainingError: for anything wrong with the options, the base or the data, and if the loss diverges.
        WorseError: if the loss ends higher than it began, unless ``options.accept_worse``.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    run = prepare(options)
    checkpoints = _checkpoints(options.output)
    resume_from = _resume_point(run, checkpoints)
    try:
        with without_cache(run.model):
            result = _fit(run, checkpoints, resume_from)
        if result.is_worse and not options.accept_worse:
            what, before, after = result.compared
            raise WorseError(
                f"the training made it worse: {what} {before:.3f} before, {after:.3f} after, on the "
                f"{'evaluation data' if result.evaluations else 'training data'}. Nothing was saved: try a lower "
                "--lr with --overwrite, or keep it with --resume --accept-worse"
            )
        if is_main_process():
            _save(run, result)
    except BaseException as error:
        if isinstance(error, DivergedError) or last_checkpoint(checkpoints) is None:
            shutil.rmtree(checkpoints, ignore_errors=True)
        raise
    if is_main_process():
        shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def base_reference(model: str, output: Path) -> str:
    """The base as an adapter's config names it: a hub's name as is, a directory relative to the adapter's."""
    if not Path(model).is_dir():
        return model
    try:
        return Path(os.path.relpath(Path(model).resolve(), output.resolve())).as_posix()
    except ValueError:  # another drive
        return str(Path(model).resolve())


def _checkpoints(output: Path) -> Path:
    """Where checkpoints go: beside the output, hidden from servers that watch the directory."""
    place = output.resolve()
    return place.parent / f".{place.name}.checkpoints"


def _resume_point(run: Prepared, checkpoints: Path) -> Path | None:
    """The checkpoint to go on from; makes the directory and notes there what it belongs to."""
    options = run.options
    used, free = options.to_json() | run.used, names(free=True)
    identity: dict[str, Any] = {name: value for name, value in used.items() if name not in free}
    identity |= {"data SHA-256": run.rows.digest, "processes": world_size()}
    if run.eval_rows is not None:
        identity["eval data SHA-256"] = run.eval_rows.digest
    described = checkpoints / "options.json"
    found = last_checkpoint(checkpoints)
    if found is not None and options.resume:
        try:
            before = json.loads(described.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"--resume: {described} cannot be read ({error}), so that nothing says what {found} belongs to. "
                f"Remove {checkpoints} to begin anew"
            ) from error
        changed = [name for name in sorted(before.keys() | identity) if before.get(name) != identity.get(name)]
        if changed:
            differences = "; ".join(
                f"{name} was {before.get(name)!r}, is {identity.get(name)!r}" for name in changed
            )
            raise TrainingError(
                f"--resume: the training interrupted at {found.name} had other options ({differences}). "
                f"Give the same ones, or remove {checkpoints} to begin anew"
            )
        if is_main_process():
            drop_incomplete(checkpoints)
        return found
    if not is_main_process():
        return None
    if found is not None and not options.overwrite:
        raise TrainingError(
            f"an interrupted training left {found}: go on with --resume, or begin anew with --overwrite"
        )
    try:
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir(parents=True)
        described.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"checkpoints cannot be written to {checkpoints}: {error.strerror}") from error
    return None


def _fit(run: Prepared, checkpoints: Path, resume_from: Path | None) -> TrainResult:
    options = run.options
    on_gpu = torch.cuda.is_available()
    evaluates = run.eval_rows is not None
    every = options.eval_steps if evaluates else options.save_steps
    interval = {"strategy": "epoch" if every is None else "steps", "steps": every or 500}
    best_by = f"eval_{options.best_by}"
    scores = None
    if run.eval_prompts:
        scores = partial(
            score_answers,
            tokenizer=run.tokenizer,
            prompts=run.eval_prompts,
            metrics=options.eval_metrics,
            batch_size=options.batch_size,
            max_new_tokens=options.eval_max_new_tokens,
        )
    progress = Progress(quiet=not is_main_process(), patience=options.patience, best_by=best_by)
    try:
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            num_train_epochs=options.epochs,
            max_steps=options.max_steps or -1,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.grad_accum,
            gradient_checkpointing=options.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            lr_scheduler_type=_SCHEDULES.get(options.schedule, options.schedule),
            warmup_steps=options.warmup_ratio,
            max_grad_norm=options.max_grad_norm,
            eval_strategy=interval["strategy"] if evaluates else "no",
            eval_steps=interval["steps"],
            eval_on_start=evaluates and resume_from is None,
            save_strategy=interval["strategy"],
            save_steps=interval["steps"],
            save_total_limit=1,
            load_best_model_at_end=evaluates,
            metric_for_best_model=best_by if evaluates else None,
            greater_is_better=options.best_by != "loss" if evaluates else None,
            logging_strategy="steps",
            logging_steps=options.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            report_to=list(options.report_to) or "none",
            optim=options.optim,
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=on_gpu,
            use_cpu=not on_gpu,
            ddp_backend=("nccl" if on_gpu else "gloo") if world_size() > 1 else None,
            ddp_find_unused_parameters=False,
            bf16=options.bf16 and run.method.trains_base,
            seed=options.seed,
        )
        groups = run.method.groups(run.model, run.learning_rate)
        kind, more = AdapterTrainer.get_optimizer_cls_and_kwargs(arguments, run.model)
        trainer = AdapterTrainer(
            lengths=[len(row["input_ids"]) for row in run.rows.rows],
            scores=scores,
            model=run.model,
            args=arguments,
            train_dataset=run.rows,
            eval_dataset=run.eval_rows,
            data_collator=collate,
            optimizer_cls_and_kwargs=(
                kind,
                {**more, "params": [{"weight_decay": options.weight_decay, **group} for group in groups]},
            ),
            callbacks=[progress, *run.method.callbacks()],
        )
    except (ImportError, ValueError, RuntimeError) as error:
        raise TrainingError(f"transformers cannot train so: {error}") from error
    trainer.remove_callback(PrinterCallback)
    flow = Flow(trainer, evaluates, handles_signals=world_size() == 1)
    trainer.add_callback(flow)
    some = run.rows.rows[:: -(-len(run.rows) // _PROBED_ROWS)]
    with progress.waiting(f"preparing {run.method.name}"):
        device = trainer.args.device
        batches = [{name: tensor.to(device) for name, tensor in collate([row]).items()} for row in some]
        run.method.prepare(run.model, batches)
    probed = () if evaluates else some
    before = _mean_loss(run.model, probed)
    memory = PeakMemory()
    started = time.perf_counter()
    with progress, flow:
        try:
            trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error) from error
    seconds = time.perf_counter() - started
    state = trainer.state
    if flow.stopped_by is not None and state.global_step < state.max_steps and not progress.stopped_early:
        raise Interrupted(state.global_step, state.max_steps, flow.stopped_by)
    history = state.log_history
    evaluations = [entry for entry in history if "eval_loss" in entry]
    return TrainResult(
        output=options.output,
        target_modules=tuple(run.targets),
        trainable=run.trainable,
        total=run.total,
        rows=run.rows.source_rows,
        steps=state.global_step,
        tokens=round(state.global_step * options.batch_size * run.rows.tokens / len(run.rows))
        * options.grad_accum
        * world_size(),
        best_step=state.best_global_step if evaluates else None,
        losses=tuple(entry["loss"] for entry in history if "loss" in entry),
        grad_norms=tuple(entry["grad_norm"] for entry in history if "grad_norm" in entry),
        learning_rates=tuple(entry["learning_rate"] for entry in history if "learning_rate" in entry),
        evaluations=tuple((entry["step"], entry["eval_loss"]) for entry in evaluations),
        evaluation_scores=tuple(
            (entry["step"], {name: entry[f"eval_{name}"] for name in options.eval_metrics})
            for entry in evaluations
            if options.eval_metrics
        ),
        best_by=options.best_by,
        probe=(before, _mean_loss(run.model, probed)) if probed else None,
        seconds=seconds,
        seconds_per_step=flow.seconds_per_step,
        memory={
            "base_rss_bytes": memory.start,
            "peak_rss_bytes": memory.peak(),
            "saved_for_backward_bytes": trainer.saved_for_backward or 0,
            "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        },
        notes=tuple(run.notes),
    )


def _mean_loss(model: Any, rows: Sequence[dict[str, list[int]]]) -> float:
    """The loss over all answer tokens of the rows, in nats a token."""
    loss, tokens = row_losses(model, rows, 1).sum(0).tolist()
    return float(loss / max(tokens, 1))


def _save(run: Prepared, result: TrainResult) -> None:
    options = run.options
    try:
        with staged(options.output) as directory:
            run.method.save(run.model, directory, base_reference(options.model, options.output))
            if run.method.trains_base:
                run.tokenizer.save_pretrained(directory)
            record = training_record(options, run.used, run.rows, run.eval_rows, result, directory)
            (directory / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            (directory / "README.md").write_text(model_card(run.method, record), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{options.output} cannot be written: {error}. What was trained is in the checkpoints: "
            "make room and go on with --resume"
        ) from error
    if options.push_to_hub is not None:
        _upload(options.output, options.push_to_hub)


def _upload(directory: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=directory)
    except Exception as error:  # the hub's client raises what its transports raise
        raise TrainingError(f"{directory} is saved, but not uploaded to {repository}: {error}") from error
