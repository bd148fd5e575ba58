"""``qaa-serve train``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaa_serve.adapters import AdapterError
from qaa_serve.circuits import ANSATZ_NAMES
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.methods import METHODS

if TYPE_CHECKING:
    from qaa_serve.training.loop import TrainResult

DESCRIPTION = """\
Train an adapter on JSON lines and save it as a directory that qaa-serve serves as it is.

Rows of the data, one JSON object a line, in one of three forms; the loss is on the answer only:
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"prompt": "...", "completion": "..."}
  {"instruction": "...", "input": "...", "output": "..."}
"""

EXAMPLE = """\
example:
  qaa-serve train --model models/base --data support.jsonl --output adapters/support --epochs 3
"""

#: Packages that only the extra `train` brings.
_EXTRA = ("accelerate", "peft", "transformers")

#: Arguments that belong to methods and not to the training as such.
_METHOD_OPTIONS = ("ansatz", "layers", "alpha", "heads", "theta_lr", "rank")


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
    main.add_argument("--data", required=True, type=Path, metavar="FILE", help="training rows, JSON lines")
    main.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the adapter goes")
    main.add_argument("--overwrite", action="store_true", help="replace the adapter that is at --output")
    main.add_argument(
        "--eval-data",
        type=Path,
        metavar="FILE",
        help="rows to evaluate on, before training and after every epoch",
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
    method.add_argument("--rank", type=int, metavar="N", help="lora: rank of the update (default: 8)")

    course = parser.add_argument_group("the course of training")
    course.add_argument("--epochs", type=float, default=3.0, metavar="X", help="passes over the data (default: 3)")
    course.add_argument("--max-steps", type=int, metavar="N", help="optimiser steps, in place of --epochs")
    course.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="peak learning rate of AdamW (default: 0.005 for qaa, 0.001 for lora)",
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


def run(args: argparse.Namespace) -> int:
    """Train as the arguments say.

    Returns:
        The exit status: 0; 2 for bad input, with the reason on stderr; 130 after Ctrl-C.
    """
    try:
        print(_summary(_train(args), args.model))
    except (TrainingError, AdapterError) as error:
        print(f"qaa-serve train: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(
            f"qaa-serve train: {error.name} is not installed; training needs the extra: "
            'pip install "qaa-serve[train]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"qaa-serve train: interrupted; nothing was written to {args.output}", file=sys.stderr)
        return 130
    return 0


def _train(args: argparse.Namespace) -> TrainResult:
    from transformers.utils import logging

    from qaa_serve.training.loop import TrainOptions, train

    logging.disable_progress_bar()
    given: dict[str, Any] = {
        name: getattr(args, name) for name in TrainOptions.__dataclass_fields__ if name in args
    }
    given["target_modules"] = tuple(args.target_modules)
    given["method_options"] = {
        name: getattr(args, name) for name in _METHOD_OPTIONS if getattr(args, name) is not None
    }
    return train(TrainOptions(**given))


def _summary(result: TrainResult, model: str) -> str:
    from qaa_serve.training.card import percent

    output = result.output
    lines = [
        *result.notes,
        f"trained {result.trainable:,} parameters ({percent(result)} of the base) on {result.rows:,} rows: "
        f"{result.steps:,} steps in {result.seconds:.0f} s",
        f"loss {result.first_loss:.3f} -> {result.train_loss:.3f}",
    ]
    if result.eval_loss is not None:
        lines.append(f"evaluation loss {result.base_eval_loss:.3f} (base) -> {result.eval_loss:.3f}")
    lines += [
        f"saved in {output}",
        f"serve it with: qaa-serve {model} --adapters {output.absolute().parent}",
        f'and ask for "model": "{output.name}"',
    ]
    return "\n".join(lines)


def main() -> int:
    """``python -m qaa_serve.training.cli``."""
    parser = argparse.ArgumentParser(prog="qaa-serve train")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
