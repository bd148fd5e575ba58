"""Training from the options to what is saved."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from qaa_serve.adapters import CONFIG_FILE
from qaa_serve.adapters.staging import staged
from qaa_serve.training.card import model_card
from qaa_serve.training.data import Examples, collate, read_examples
from qaa_serve.training.errors import DivergedError, Interrupted, TrainingError, WorseError
from qaa_serve.training.loss import row_losses
from qaa_serve.training.methods import Method, Setting, check_shared, configured, get_method
from qaa_serve.training.options import TrainOptions, names
from qaa_serve.training.progress import Progress
from qaa_serve.training.result import RECORD_FILE, TrainResult, training_record
from qaa_serve.training.targets import resolve_targets
from qaa_serve.training.trainer import (
    AdapterTrainer,
    Flow,
    PeakMemory,
    SavedBytes,
    drop_incomplete,
    is_main_process,
    last_checkpoint,
    planned_steps,
    world_size,
)

_DEFAULT_MAX_LENGTH = 1024

#: Schedules that transformers calls otherwise.
_SCHEDULES = {"constant": "constant_with_warmup"}

#: Rows of the training data whose loss before and after says whether it helped, where there is no evaluation data.
_PROBED_ROWS = 16


@dataclass
class _Run:
    """Everything that is known before the first step."""

    options: TrainOptions
    method: Method
    learning_rate: float
    max_length: int
    total: int
    tokenizer: PreTrainedTokenizerBase
    rows: Examples
    eval_rows: Examples | None
    targets: list[str]
    model: nn.Module

    @property
    def used(self) -> dict[str, Any]:
        """Options with the values that stood for None or were the method's defaults."""
        return {"lr": self.learning_rate, "max_length": self.max_length, **dataclasses.asdict(self.method)}

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def train(options: TrainOptions) -> TrainResult:
    """Train and save.

    Nothing is at ``options.output`` before all of it is: an error or an interrupt leaves what was there.

    Raises:
        TrainingError: for anything wrong with the options, the base or the data, and if the loss diverges.
        WorseError: if the loss ends higher than it began, unless ``options.accept_worse``.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    run = _prepare(options)
    checkpoints = _checkpoints(options.output)
    resume_from = _resume_point(run, checkpoints)
    try:
        with _without_cache(run.model):
            result = _fit(run, checkpoints, resume_from)
        if result.is_worse and not options.accept_worse:
            before, after = result.compared
            raise WorseError(
                f"the training made it worse: loss {before:.3f} before, {after:.3f} after, on the "
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


@dataclass(frozen=True)
class Plan:
    """What a training would be: see ``plan``.

    Attributes:
        target_modules: the layers that would be adapted.
        trainable: number of parameters that would be trained.
        total: number of parameters of the base.
        rows: number of rows, of the source and as they are trained on.
        tokens: of all rows.
        answer_tokens: those that the loss is on.
        steps: optimiser steps.
        memory: what the bytes are for -> bytes; activations are measured on the longest batch.
        example: (text, whether the loss is on it): the first row in parts.
        notes: lines about rows that would be left out or cut.
    """

    target_modules: tuple[str, ...]
    trainable: int
    total: int
    rows: tuple[int, int]
    tokens: int
    answer_tokens: int
    steps: int
    memory: dict[str, int]
    example: tuple[tuple[str, bool], ...]
    notes: tuple[str, ...]


def plan(options: TrainOptions) -> Plan:
    """Do all that ``train`` does before its first step, and say what it found. Nothing is written.

    Raises:
        TrainingError: as ``train``.
    """
    run = _prepare(options)
    return Plan(
        target_modules=tuple(run.targets),
        trainable=run.trainable,
        total=run.total,
        rows=(run.rows.source_rows, len(run.rows)),
        tokens=run.rows.tokens,
        answer_tokens=run.rows.answer_tokens,
        steps=planned_steps(options, len(run.rows), world_size()),
        memory={
            "weights": sum(p.nbytes for p in run.model.parameters()),
            "gradients": 4 * run.trainable,
            "AdamW's two moments": 8 * run.trainable,
            "activations kept for the backward pass": _measure_saved(run),
        },
        example=tuple(_spans(run.rows[0], run.tokenizer)),
        notes=tuple(_notes(run)),
    )


def _prepare(options: TrainOptions) -> _Run:
    method = configured(get_method(options.method), options.method_options)
    check_shared(method, options)
    _check_output(options)
    _check_devices(options)
    _check_hub(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    set_seed(options.seed)
    base, tokenizer = _load_base(options, method)
    if method.trains_base:
        _check_saveable(base)
    total = base.num_parameters()
    max_length = _max_length(options, base)

    def read(source: str | Path) -> Examples:
        return read_examples(
            source,
            tokenizer,
            max_length=max_length,
            vocabulary=getattr(base.config.get_text_config(), "vocab_size", None),
            answers=options.answers,
            skip_bad_rows=options.skip_bad_rows,
        )

    rows = combined([read(source) for source in options.sources], options.data_weights, options.seed)
    eval_rows = None if options.eval_data is None else read(options.eval_data)
    if options.packing:
        rows = rows.packed(max_length)
        eval_rows = eval_rows and eval_rows.packed(max_length)
        _check_packing(base)
    targets: list[str] = []
    if method.adapts_layers:
        targets = resolve_targets(
            base, options.target_modules, exclude=options.exclude_modules, blocks=options.layers_to_transform
        )
    elif options.target_modules or options.exclude_modules or options.layers_to_transform:
        raise TrainingError(f"--method {options.method} adapts no layers: leave --target-modules and its kin out")
    try:
        model = method.build(base, Setting(targets, tokenizer, planned_steps(options, len(rows), world_size())))
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error) from error
    rate = method.learning_rate if options.lr is None else options.lr
    return _Run(options, method, rate, max_length, total, tokenizer, rows, eval_rows, targets, model)


def combined(parts: list[Examples], weights: tuple[float, ...], seed: int) -> Examples:
    """The rows of several sources as those of one.

    Args:
        parts: the sources.
        weights: how often the rows of each come; of 2.5 all come twice and half of them, by the seed, once more.
        seed: chooses the rows of a part.
    """
    if len(parts) == 1 and not weights:
        return parts[0]
    chosen = random.Random(seed)
    rows: list[dict[str, list[int]]] = []
    for part, weight in zip(parts, weights or [1.0] * len(parts), strict=True):
        rows += [*part.rows] * int(weight)
        rows += chosen.sample(list(part.rows), round(len(part.rows) * (weight % 1)))
    if not rows:
        raise TrainingError("--data-weights leave no row: give larger ones")
    return dataclasses.replace(
        parts[0],
        name=" + ".join(part.name for part in parts),
        rows=rows,
        digest=hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest(),
        problems=tuple(f"{part.name}: {problem}" for part in parts for problem in part.problems),
        shortened=sum(part.shortened for part in parts),
        source_rows=len(rows),
    )


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
    if not is_main_process():
        return
    place = output.resolve()  # a link is followed: what it points to is replaced
    here = Path.cwd()
    if place == here or place in here.parents:
        raise TrainingError(
            f"output {output} is the current directory or one above it, which cannot be replaced: give one of its "
            f"own, such as {output / 'adapter'}"
        )
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        if not options.overwrite:
            raise TrainingError(f"output {output} exists; choose another --output, or replace it with --overwrite")
        if not any((place / name).is_file() for name in (CONFIG_FILE, RECORD_FILE)):
            raise TrainingError(
                f"output {output} is no adapter (it has no {CONFIG_FILE}) and --overwrite would delete it: "
                "choose another --output"
            )
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise TrainingError(f"output {output} cannot be made: {parent} is not a directory that may be written to")


def _check_saveable(base: PreTrainedModel) -> None:
    """transformers reads a generation_config.json with contradictions, and refuses to write it."""
    try:
        if base.generation_config is not None:
            base.generation_config.validate(strict=True)
    except ValueError as error:
        raise TrainingError(
            f"the generation_config.json of {base.name_or_path} could not be saved with the trained model: "
            f"{' '.join(str(error).split())}. Correct it there first"
        ) from error


def _check_devices(options: TrainOptions) -> None:
    if options.load_in_4bit and not torch.cuda.is_available():
        raise TrainingError(
            "--load-in-4bit needs a GPU, and there is none: --bf16 halves the base's memory on a CPU"
        )
    count = torch.cuda.device_count()
    if count > 1 and world_size() == 1:
        raise TrainingError(
            f"{count} GPUs are visible. Use them all with `torchrun --nproc-per-node {count} -m qaa_serve.cli "
            "train ...`, or choose one, for example with CUDA_VISIBLE_DEVICES=0"
        )


def _check_hub(options: TrainOptions) -> None:
    """Fail now on what would make the upload fail after hours."""
    if options.push_to_hub is None or not is_main_process():
        return
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network
        raise TrainingError(
            f"--push-to-hub {options.push_to_hub}: the hub does not take uploads ({error}): "
            "log in with `hf auth login`"
        ) from error


def _load_base(options: TrainOptions, method: Method) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name, trust = options.model, options.trust_remote_code
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise TrainingError(f"model {name!r}: there is no such directory")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise TrainingError(f"model {name!r} has no config.json: it is no directory of a transformers model")
    more: dict[str, Any] = {"dtype": torch.bfloat16 if options.bf16 and not method.trains_base else torch.float32}
    if options.attn_implementation is not None:
        more["attn_implementation"] = options.attn_implementation
    if options.load_in_4bit:
        more["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        model = AutoModelForCausalLM.from_pretrained(name, config=config, trust_remote_code=trust, **more)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TrainingError(f"model {name!r} cannot be loaded: {error}") from error
    if options.load_in_4bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.gradient_checkpointing)
    return model, tokenizer


def _max_length(options: TrainOptions, base: PreTrainedModel) -> int:
    most = getattr(base.config, "max_position_embeddings", None) or _DEFAULT_MAX_LENGTH
    if options.max_length is None:
        return min(_DEFAULT_MAX_LENGTH, most)
    if options.max_length > most:
        raise TrainingError(f"--max-length is {options.max_length}, but the base model takes {most} tokens")
    return options.max_length


def _check_packing(base: PreTrainedModel) -> None:
    """Packing rests on the base's attention keeping rows apart by their positions; not every one does."""
    first, second = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[6, 5, 4]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    base.eval()
    try:
        with torch.no_grad():
            packed = base(
                input_ids=torch.cat([first, second], 1).to(base.device),
                position_ids=positions.to(base.device),
                use_cache=False,
            ).logits[:, 4:]
            alone = base(input_ids=second.to(base.device), use_cache=False).logits
    except TypeError as error:
        raise TrainingError(f"--packing: the base model takes no position_ids ({error})") from error
    spread = alone.float().std().item()
    if (packed - alone).abs().max().item() > 0.05 * spread:
        raise TrainingError("--packing: the base model's attention does not keep packed rows apart; train without")


def _checkpoints(output: Path) -> Path:
    """Where checkpoints go: beside the output, hidden from servers that watch the directory."""
    place = output.resolve()
    return place.parent / f".{place.name}.checkpoints"


def _resume_point(run: _Run, checkpoints: Path) -> Path | None:
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


def _fit(run: _Run, checkpoints: Path, resume_from: Path | None) -> TrainResult:
    options = run.options
    on_gpu = torch.cuda.is_available()
    evaluates = run.eval_rows is not None
    every = options.eval_steps if evaluates else options.save_steps
    interval = {"strategy": "epoch" if every is None else "steps", "steps": every or 500}
    progress = Progress(quiet=not is_main_process(), patience=options.patience)
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
            metric_for_best_model="eval_loss" if evaluates else None,
            greater_is_better=False if evaluates else None,
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
            raise _out_of_memory(error) from error
    seconds = time.perf_counter() - started
    state = trainer.state
    if flow.stopped_by is not None and state.global_step < state.max_steps and not progress.stopped_early:
        raise Interrupted(state.global_step, state.max_steps, flow.stopped_by)
    history = state.log_history
    evaluations = tuple((entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry)
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
        evaluations=evaluations,
        probe=(before, _mean_loss(run.model, probed)) if probed else None,
        seconds=seconds,
        seconds_per_step=flow.seconds_per_step,
        memory={
            "base_rss_bytes": memory.start,
            "peak_rss_bytes": memory.peak(),
            "saved_for_backward_bytes": trainer.saved_for_backward or 0,
            "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        },
        notes=tuple(_notes(run)),
    )


def _mean_loss(model: Any, rows: Sequence[dict[str, list[int]]]) -> float:
    """The loss over all answer tokens of the rows, in nats a token."""
    loss, tokens = row_losses(model, rows, 1).sum(0).tolist()
    return float(loss / max(tokens, 1))


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """While training, no keys and values are kept for a next token; the setting is not to reach a saved model."""
    before = model.config.use_cache
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = before


def _save(run: _Run, result: TrainResult) -> None:
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


def _out_of_memory(error: torch.OutOfMemoryError) -> TrainingError:
    return TrainingError(
        f"the GPU's memory is full ({str(error).splitlines()[0]}): try a smaller --batch-size with more "
        "--grad-accum, a shorter --max-length, --gradient-checkpointing or --bf16"
    )


def _measure_saved(run: _Run) -> int:
    """Bytes that a forward pass over the longest batch keeps for the backward pass."""
    model: Any = run.model
    longest = sorted(run.rows.rows, key=lambda row: -len(row["input_ids"]))[: run.options.batch_size]
    device = next(run.model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate(longest).items()}
    if run.options.gradient_checkpointing:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.gradient_checkpointing_enable({"use_reentrant": False})
    run.model.train()
    with _without_cache(run.model), SavedBytes(run.model) as saved:
        run.model(**batch)
    return saved.total


def _spans(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """A row's text in parts, each with whether the loss is on it."""
    spans: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if not spans or spans[-1][1] != (label >= 0):
            spans.append(([], label >= 0))
        spans[-1][0].append(token)
    return [(tokenizer.decode(ids), learnt) for ids, learnt in spans]


def _notes(run: _Run) -> list[str]:
    notes = []
    for read in (run.rows, run.eval_rows):
        if read is not None:
            notes += [f"{read.name}: left out {problem}" for problem in read.problems]
            if read.unused:
                notes.append(f"{read.name}: not used: {', '.join(read.unused)}")
            if read.shortened:
                notes.append(
                    f"{read.name}: {read.shortened} of {read.source_rows} rows were cut to {run.max_length} tokens"
                )
    if not any(run.tokenizer.eos_token_id in row["labels"] for row in run.rows.rows):
        notes.append(
            f"{run.rows.name}: no answer ends with {run.tokenizer.eos_token!r}, the model's end token, "
            "so that the adapter learns no end"
        )
    return notes


__all__ = ["Plan", "TrainOptions", "TrainResult", "base_reference", "plan", "train"]
