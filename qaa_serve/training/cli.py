"""``qaa-serve train``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaa_serve.training.errors import Interrupted, TrainingError, WorseError
from qaa_serve.training.fields import add_fields, parse_values, read_config
from qaa_serve.training.methods import METHODS, configured, get_method
from qaa_serve.training.options import ADAPTER, METRIC_PACKAGES, WHAT, TrainOptions

if TYPE_CHECKING:
    from qaa_serve.training.result import TrainResult

DESCRIPTION = """\
Train an adapter and save it as a directory that qaa-serve serves as it is.

Data are JSON lines, JSON, CSV or Parquet, or a data set of the Hugging Face hub. A row has one of three forms; the
loss is on the answer only:
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"prompt": "...", "completion": "..."}
  {"instruction": "...", "input": "...", "output": "..."}
"""

EXAMPLE = """\
methods, with the default of --lr:
{methods}

example:
  qaa-serve train --model models/base --data support.jsonl --output adapters/support --epochs 3
  qaa-serve train --config adapters/support/training.json --output adapters/again --seed 1
  torchrun --nproc-per-node 4 -m qaa_serve.cli train --model ... (several GPUs)
"""

#: Packages that only the extra `train` brings.
_EXTRA = ("accelerate", "datasets", "peft", "transformers", "yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``qaa-serve train``."""
    methods = (f"  {name:10} {method.learning_rate:<7g} {method.summary}" for name, method in METHODS.items())
    parser.description = DESCRIPTION
    parser.epilog = EXAMPLE.format(methods="\n".join(methods))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_fields(parser, TrainOptions, only=("model", "data", "output"))
    what = next(group for group in parser._action_groups if group.title == WHAT)
    what.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="these options from a file, YAML, TOML or a training.json (names with underscores); the command line "
        "goes before it",
    )
    what.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: print parameters, memory, tokens, steps and the first row as it would be learnt",
    )
    adapter = parser.add_argument_group(ADAPTER)
    adapter.add_argument(
        "--method",
        choices=METHODS,
        metavar="NAME",
        default="qaa",
        help="what is trained, one of those listed below (default: qaa)",
    )
    add_fields(parser, *METHODS.values())
    add_fields(parser, TrainOptions)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, those of ``--config`` under those of the command line. Exits with 2 for what is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    config = early.parse_known_args(arguments)[0].config
    before: list[str] = []
    if config is not None:
        try:
            _, before = parse_values(parser, read_config(config), f"--config {config}")
        except TrainingError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        except ModuleNotFoundError as error:
            parser.exit(2, f"{parser.prog}: {_missing(error)}\n")
    return parser.parse_args([*before, *arguments])


def options_of(given: Mapping[str, Any]) -> TrainOptions:
    """Options by name, the method's own among the others.

    Raises:
        TrainingError: for a value out of range, or an option that the method does not have.
    """
    known = TrainOptions.__dataclass_fields__
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    if len(values.get("data", "")) == 1 and isinstance(values["data"], tuple):
        (values["data"],) = values["data"]
    own = {name: value for name, value in values.items() if name not in known}
    shared: dict[str, Any] = {name: value for name, value in values.items() if name in known}
    options = TrainOptions(**shared, method_options=own)
    configured(get_method(options.method), own)
    return options


def run(args: argparse.Namespace) -> int:
    """Train as the arguments say.

    Returns:
        The exit status: 0; 1 for a training that made it worse; 2 for bad input, with the reason on stderr; 130
        after Ctrl-C, 143 after SIGTERM.
    """
    given = {name: value for name, value in vars(args).items() if name not in ("config", "dry_run")}
    try:
        options = options_of(given)
        return _run(options, args.dry_run)
    except ModuleNotFoundError as error:
        if error.name not in (*_EXTRA, *METRIC_PACKAGES):
            raise
        print(f"qaa-serve train: {_missing(error)}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"qaa-serve train: {error}", file=sys.stderr)
        return 1 if isinstance(error, WorseError) else 2
    except Interrupted as stop:
        print(f"qaa-serve train: {stop}; the same command with --resume goes on from there", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print(f"qaa-serve train: interrupted; nothing was written to {args.output}", file=sys.stderr)
        return 130


def _run(options: TrainOptions, dry: bool) -> int:
    from transformers.utils import logging

    from qaa_serve.adapters import AdapterError
    from qaa_serve.training.dry_run import dry_run
    from qaa_serve.training.loop import train
    from qaa_serve.training.trainer import is_main_process

    logging.disable_progress_bar()
    try:
        if dry:
            dry_run(options)
        else:
            result = train(options)
            if is_main_process():
                print(_summary(options, result))
    except AdapterError as error:
        raise TrainingError(str(error)) from error
    return 0


def _missing(error: ModuleNotFoundError) -> str:
    if error.name in METRIC_PACKAGES:
        return f'{error.name} is not installed; --eval-metrics needs the extra: pip install "qaa-serve[compare]"'
    return f'{error.name} is not installed; training needs the extra: pip install "qaa-serve[train]"'


def _summary(options: TrainOptions, result: TrainResult) -> str:
    from qaa_serve.adapters import SERVED_RANK, load_adapter
    from qaa_serve.training.card import percent, usage

    lines = [
        *result.notes,
        f"trained {result.trainable:,} parameters ({percent(result.trainable, result.total)} of the base) on "
        f"{result.rows:,} rows: {result.steps:,} steps in {result.seconds:.0f} s",
        f"loss {result.first_loss:.3f} -> {result.train_loss:.3f}",
    ]
    if result.eval_loss is not None:
        lines.append(
            f"evaluation loss {result.base_eval_loss:.3f} (before) -> {result.eval_loss:.3f} "
            f"(best by {options.best_by}, at step {result.best_step:,})"
        )
    lines += [f"{name} {before:.1f} (before) -> {after:.1f}" for name, (before, after) in result.scores.items()]
    lines += [f"saved in {result.output}", usage(get_method(options.method), options.to_json())]
    if options.method == "qaa" and (rank := load_adapter(result.output).rank) > SERVED_RANK:
        lines.append(f"(its rank is {rank}, and a server takes {SERVED_RANK} by default: see --max-lora-rank)")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """``qaa-serve train``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="qaa-serve train", formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parse(parser, arguments))


if __name__ == "__main__":
    sys.exit(main())
