"""Everything before the first step of a training: what would stop it later is found here."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from qaa_serve.adapters import CONFIG_FILE
from qaa_serve.training.data import Examples, read_examples
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.methods import Method, Setting, check_shared, configured, get_method
from qaa_serve.training.options import METRIC_PACKAGES, TrainOptions
from qaa_serve.training.result import RECORD_FILE
from qaa_serve.training.rows import as_test_set, check_positions, read_rows
from qaa_serve.training.targets import resolve_targets
from qaa_serve.training.trainer import is_main_process, planned_steps, world_size

_DEFAULT_MAX_LENGTH = 1024


@dataclass
class Prepared:
    """Everything that is known before the first step.

    Attributes:
        options: as given.
        method: with its own options.
        learning_rate: the peak.
        max_length: tokens a row.
        total: number of parameters of the base.
        tokenizer: the base's.
        rows: to train on, packed if so asked.
        eval_rows: to evaluate on; None: there are none.
        eval_prompts: to have answered at each evaluation: ``ids`` and ``references`` of each.
        targets: the layers to adapt; empty: the method adapts none.
        model: the base as the method built on it.
    """

    options: TrainOptions
    method: Method
    learning_rate: float
    max_length: int
    total: int
    tokenizer: PreTrainedTokenizerBase
    rows: Examples
    eval_rows: Examples | None
    eval_prompts: list[dict[str, Any]]
    targets: list[str]
    model: nn.Module

    @property
    def used(self) -> dict[str, Any]:
        """Options with the values that stood for None or were the method's defaults."""
        return {"lr": self.learning_rate, "max_length": self.max_length, **dataclasses.asdict(self.method)}

    @property
    def trainable(self) -> int:
        """Number of parameters that are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def notes(self) -> list[str]:
        """Lines about rows that are left out or cut, and what else is odd about them."""
        notes = []
        for read in (self.rows, self.eval_rows):
            if read is not None:
                notes += [f"{read.name}: left out {problem}" for problem in read.problems]
                if read.unused:
                    notes.append(f"{read.name}: not used: {', '.join(read.unused)}")
                if read.shortened:
                    notes.append(
                        f"{read.name}: {read.shortened} of {read.source_rows} rows were cut to "
                        f"{self.max_length} tokens"
                    )
        if not any(self.tokenizer.eos_token_id in row["labels"] for row in self.rows.rows):
            notes.append(
                f"{self.rows.name}: no answer ends with {self.tokenizer.eos_token!r}, the model's end token, "
                "so that the adapter learns no end"
            )
        return notes


def prepare(options: TrainOptions) -> Prepared:
    """Check the options, load the base, read the rows, and build what is to be trained. Nothing is written.

    Raises:
        TrainingError: for anything wrong with the options, the base or the data.
    """
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
    prompts = _eval_prompts(options, base, tokenizer)
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
        raise out_of_memory(error) from error
    rate = method.learning_rate if options.lr is None else options.lr
    return Prepared(options, method, rate, max_length, total, tokenizer, rows, eval_rows, prompts, targets, model)


def _eval_prompts(
    options: TrainOptions, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """What is to be answered for ``--eval-metrics``, evenly over the evaluation data."""
    if not options.eval_metrics:
        return []
    for package in METRIC_PACKAGES:  # not to be missed first after hours
        import_module(package)
    source = str(options.eval_data)
    read = read_rows(source, tokenizer, answers=options.answers, skip_bad_rows=options.skip_bad_rows)
    prompts: list[dict[str, Any]] = as_test_set(read.rows)["prompts"]
    number = min(options.eval_prompts, len(prompts))
    prompts = [prompts[place * len(prompts) // number] for place in range(number)]
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    check_positions(prompts, limit, options.eval_max_new_tokens, source, "--eval-max-new-tokens")
    return prompts


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
    # On a CPU bitsandbytes 0.50 has a kernel for 4 bits, but none for the gradient through it: training would go
    # on with wrong gradients.
    if options.load_in_4bit and not torch.cuda.is_available():
        raise TrainingError(
            "--load-in-4bit needs a GPU, and there is none: on a CPU no gradient goes through weights of 4 bits. "
            "--bf16 halves the base's memory"
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


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """While training, no keys and values are kept for a next token; the setting is not to reach a saved model."""
    before = model.config.use_cache
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = before


def out_of_memory(error: torch.OutOfMemoryError) -> TrainingError:
    """What to do about it."""
    return TrainingError(
        f"the GPU's memory is full ({str(error).splitlines()[0]}): try a smaller --batch-size with more "
        "--grad-accum, a shorter --max-length, --gradient-checkpointing or --bf16"
    )
