"""``qaa-serve train``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaa_serve.adapters import AdapterError
from qaa_serve.circuits import ANSATZ_NAMES
from qaa_serve.training.config_file import read_config, use_as_defaults
from qaa_serve.training.errors import Interrupted, TrainingError
from qaa_serve.training.methods import METHODS

if TYPE_CHECKING:
    from qaa_serve.training.options import TrainOptions

DESCRIPTION = """\
Train an adapter and save it as a directory that qaa-serve serves as it is.

Data are JSON lines, JSON, CSV or Parquet, or a data set of the Hugging Face hub. A row has one of three forms; the
loss is on the answer only:
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"prompt": "...", "completion": "..."}
  {"instruction": "...", "input": "...", "output": "..."}
"""

EXAMPLE = """\
example:
  qaa-serve train --model models/base --data support.jsonl --output adapters/support --epochs 3
  qaa-serve train --config adapters/support/training.json --output adapters/again --seed 1
  torchrun --nproc-per-node 4 -m qaa_serve.cli train --model ... (several GPUs)
"""

#: Packages that only the extra `train` brings.
_EXTRA = ("accelerate", "datasets", "peft", "transformers", "yaml")

#: Arguments that belong to methods and not to the training as such.
_METHOD_OPTIONS = (
    "ansatz", "layers", "alpha", "heads", "readouts", "constant", "length", "theta_lr", "rank", "sparsity",
    "prefix_tokens",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``qaa-serve train``."""
    parser.description = DESCRIPTION
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    main = parser.add_argument_group("what to train, on what")
    main.add_argument(
        "--model",
        required=True,
        metavar="BASE",
        help="base model: a directory, or a name on the Hugging Face hub",
    )
    main.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="training rows: .jsonl, .json, .csv, .parquet, or NAME[:SPLIT] of a data set, such as "
        "owner/name:train[:1000]",
    )
    main.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the adapter goes")
    main.add_argument("--overwrite", action="store_true", help="replace the adapter that is at --output")
    main.add_argument(
        "--eval-data",
        metavar="FILE",
        help="rows to evaluate on, before and during training; the state that is best on them is kept",
    )
    main.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="these options from a file, YAML, TOML or a training.json (names with underscores); the command line "
        "goes before it",
    )
    main.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: print parameters, memory, tokens, steps and the first row as it would be learnt",
    )
    main.add_argument(
        "--resume", action="store_true", help="go on where an interrupted training of the same options stopped"
    )

    method = parser.add_argument_group("the adapter")
    method.add_argument(
        "--method",
        choices=METHODS,
        default="qaa",
        help="; ".join(f"{name}: {what}" for name, (_, what) in METHODS.items()) + " (default: qaa)",
    )
    method.add_argument(
        "--target-modules",
        nargs="+",
        default=(),
        metavar="NAME",
        help="linear layers to adapt, by name or its end (q_proj v_proj), or all-linear "
        "(default: those of the attention blocks)",
    )
    method.add_argument("--alpha", type=float, metavar="X", help="size of the adapter's update (default: 16)")
    method.add_argument(
        "--ansatz", choices=ANSATZ_NAMES, help=f"qaa: form of the circuit (default: {ANSATZ_NAMES[0]})"
    )
    method.add_argument("--layers", type=int, metavar="N", help="qaa: layers of the circuit (default: 2)")
    method.add_argument(
        "--heads",
        type=int,
        metavar="N",
        help="qaa: circuits a layer, which multiply B's columns (default: 1)",
    )
    method.add_argument(
        "--readouts",
        type=int,
        metavar="N",
        help="qaa: expectation values a circuit, Z on each qubit and then on pairs (default: one a qubit)",
    )
    method.add_argument(
        "--constant",
        action="store_true",
        default=None,
        help="qaa: embed a constant beside the input, so that the circuit sees the input's sign (default: no)",
    )
    method.add_argument(
        "--length",
        action="store_true",
        default=None,
        help="qaa: multiply what is read out by the input's length (default: no)",
    )
    method.add_argument("--rank", type=int, metavar="N", help="lora, sora: rank of the update (default: 8)")
    method.add_argument(
        "--sparsity",
        type=float,
        metavar="X",
        help="sora: from 0 (prune nothing) to 1, how sure of its direction a rank's gate must be (default: 0.5)",
    )
    method.add_argument(
        "--prefix-tokens", type=int, metavar="N", help="prefix: keys and values before a layer's own (default: 16)"
    )

    course = parser.add_argument_group("the course of training")
    course.add_argument("--epochs", type=float, default=3.0, metavar="X", help="passes over the data (default: 3)")
    course.add_argument("--max-steps", type=int, metavar="N", help="optimiser steps, in place of --epochs")
    course.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="peak learning rate of AdamW (default: 0.005 for qaa, 0.001 for lora, 0.001 for sora, "
        "0.01 for prefix, 5e-05 for full)",
    )
    course.add_argument(
        "--theta-lr", type=float, metavar="X", help="qaa: that of the circuit's angles (default: as --lr)"
    )
    course.add_argument(
        "--schedule",
        choices=("cosine", "linear", "constant"),
        default="cosine",
        help="the learning rate after the warm-up (default: cosine)",
    )
    course.add_argument(
        "--warmup-ratio",
        type=float,
        default=0.05,
        metavar="X",
        help="part of the steps in which the learning rate rises (default: 0.05)",
    )
    course.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows a batch (default: 8)")
    course.add_argument(
        "--grad-accum", type=int, default=1, metavar="N", help="batches an optimiser step (default: 1)"
    )
    course.add_argument(
        "--max-grad-norm",
        type=float,
        default=1.0,
        metavar="X",
        help="gradient clipping, 0 for none (default: 1)",
    )
    course.add_argument(
        "--weight-decay",
        type=float,
        default=0.0,
        metavar="X",
        help="AdamW's, on matrices; angles and gates are never decayed (default: 0)",
    )
    course.add_argument(
        "--eval-steps",
        type=int,
        metavar="N",
        help="steps from one evaluation on --eval-data to the next (default: an epoch)",
    )
    course.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="stop after N evaluations without a lower loss (default: never)",
    )
    course.add_argument(
        "--save-steps",
        type=int,
        metavar="N",
        help="steps from one checkpoint to the next, without --eval-data (default: an epoch)",
    )
    course.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of initial values, order and dropout (default: 0)"
    )

    rows = parser.add_argument_group("the rows")
    rows.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens a row, longer ones are cut (default: 1024, or what the base takes if less)",
    )
    rows.add_argument(
        "--answers",
        choices=("all", "last"),
        default="all",
        help="loss on all assistant messages of a conversation or on the last one (default: all)",
    )
    rows.add_argument(
        "--packing",
        action="store_true",
        help="put short rows together, as many as --max-length holds; they do not see each other",
    )
    rows.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="report unusable rows and go on; by default they are an error",
    )

    machine = parser.add_argument_group("the machine")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    machine.add_argument(
        "--bf16", action="store_true", help="keep the base in bfloat16; the adapter stays float32"
    )
    machine.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory for activations, more time"
    )
    machine.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the base model"
    )


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, those of ``--config`` under those of the command line. Exits with 2 for what is wrong."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    config = early.parse_known_args(arguments)[0].config
    if config is not None:
        try:
            use_as_defaults(parser, read_config(config), f"--config {config}")
        except TrainingError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        except ModuleNotFoundError as error:
            parser.exit(2, f"{parser.prog}: {_missing(error)}\n")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Train as the arguments say.

    Returns:
        The exit status: 0; 2 for bad input, with the reason on stderr; 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        if args.dry_run:
            _print_plan(args)
        else:
            print(_summary(args))
    except (TrainingError, AdapterError) as error:
        print(f"qaa-serve train: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(f"qaa-serve train: {_missing(error)}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"qaa-serve train: {stop}; the same command with --resume goes on from there", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print(f"qaa-serve train: interrupted; nothing was written to {args.output}", file=sys.stderr)
        return 130
    return 0


def _missing(error: ModuleNotFoundError) -> str:
    return f'{error.name} is not installed; training needs the extra: pip install "qaa-serve[train]"'


def _options(args: argparse.Namespace) -> TrainOptions:
    from transformers.utils import logging

    from qaa_serve.training.options import TrainOptions

    logging.disable_progress_bar()
    given: dict[str, Any] = {
        name: getattr(args, name) for name in TrainOptions.__dataclass_fields__ if name in args
    }
    given["target_modules"] = tuple(args.target_modules)
    given["method_options"] = {
        name: getattr(args, name) for name in _METHOD_OPTIONS if getattr(args, name) is not None
    }
    return TrainOptions(**given)


def _summary(args: argparse.Namespace) -> str:
    options = _options(args)

    from qaa_serve.training.card import percent, usage
    from qaa_serve.training.loop import train
    from qaa_serve.training.methods import get_method
    from qaa_serve.training.trainer import is_main_process

    result = train(options)
    if not is_main_process():
        return ""
    share = percent(result.trainable, result.total)
    lines = [
        *result.notes,
        f"trained {result.trainable:,} parameters ({share} of the base) on {result.rows:,} rows: "
        f"{result.steps:,} steps in {result.seconds:.0f} s",
        f"loss {result.first_loss:.3f} -> {result.train_loss:.3f}",
    ]
    if result.eval_loss is not None:
        lines.append(
            f"evaluation loss {result.base_eval_loss:.3f} (before) -> {result.eval_loss:.3f} "
            f"(best, at step {result.best_step:,})"
        )
    lines += [f"saved in {result.output}", usage(get_method(options.method), options.to_json())]
    return "\n".join(lines)


def _print_plan(args: argparse.Namespace) -> None:
    options = _options(args)

    from rich.console import Console
    from rich.text import Text

    from qaa_serve.training.card import percent
    from qaa_serve.training.loop import plan

    found = plan(options)
    console = Console(highlight=False)
    rows, lines = found.rows
    packed = f" packed into {lines:,}" if lines != rows else ""
    total = sum(found.memory.values())
    say = [
        *found.notes,
        f"adapted layers: {', '.join(found.target_modules)}" if found.target_modules else "",
        f"trained parameters: {found.trainable:,} ({percent(found.trainable, found.total)} of the base's "
        f"{found.total:,})",
        f"data: {rows:,} rows{packed}, {found.tokens:,} tokens, of which the loss is on {found.answer_tokens:,}",
        f"steps: {found.steps:,} of {options.batch_size} x {options.grad_accum} rows",
        f"memory: {_megabytes(total)}, as an estimate: "
        + ", ".join(f"{what} {_megabytes(size)}" for what, size in found.memory.items()),
        "first row, the part that the loss is on in [[ ]]:" if not console.is_terminal else "first row:",
    ]
    for line in filter(None, say):
        console.print(line, markup=False, soft_wrap=True)
    example = Text()
    for text, learnt in found.example:
        shown = f"[[{text}]]" if learnt and not console.is_terminal else text
        example.append(shown, style="bold green" if learnt else "dim")
    console.print(example, soft_wrap=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """``qaa-serve train``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="qaa-serve train", formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parse(parser, arguments))


if __name__ == "__main__":
    sys.exit(main())
