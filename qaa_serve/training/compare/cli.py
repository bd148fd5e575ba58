"""``qaa-serve compare``."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from qaa_serve.training import options
from qaa_serve.training.compare.settings import AGAIN, WHAT, Settings
from qaa_serve.training.errors import TrainingError
from qaa_serve.training.fields import add_fields
from qaa_serve.training.methods import COMPARED, METHODS

if TYPE_CHECKING:
    from qaa_serve.training.compare.study import Material

DESCRIPTION = """\
Train several ways on the same rows, under the same budget and with several seeds, and write a report: quality on a
test set, trained parameters, memory, time, loss curves, and what each of them writes.

Finished trainings are kept: the same command again goes on where it was stopped.
"""

EXAMPLE = """\
example:
  qaa-serve compare --model models/base --data train.jsonl --eval-data test.jsonl --output report \\
      --methods qaa,lora,sora,prefix,full --seeds 3 --epochs 3

a config file (--config) gives each method its own options, lists of them to choose from by validation loss, and
several variants of one method:
  common: {epochs: 3, batch_size: 16}
  methods:
    qaa: {lr: [0.003, 0.01], layers: [2, 4]}
    lora: {lr: [0.0003, 0.001]}
    lora r=4: {method: lora, rank: 4, lr: [0.0003, 0.001]}
"""

#: Packages, besides those of training, that only the extra `compare` brings.
_EXTRA = ("jinja2", "matplotlib", "rouge_score", "sacrebleu", "yaml", "peft", "transformers", "accelerate")

#: Options of a training that the command line has for all: those that make no method look better than another.
_COMMON = sorted(options.names(shared=True) - {"lr"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``qaa-serve compare``."""
    parser.description = DESCRIPTION
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_fields(parser, Settings, only=("model", "data", "eval_data", "output"))
    main = next(group for group in parser._action_groups if group.title == WHAT)
    main.add_argument(
        "--methods",
        type=_names,
        default=(),
        metavar="NAME,NAME",
        help=f"methods, or variants of the config (default: the config's, else {','.join(COMPARED)}); there are "
        + ", ".join(METHODS),
    )
    main.add_argument(
        "--seeds",
        type=_seeds,
        metavar="N",
        help="number of trainings a variant, or a list of seeds such as 3,7 (default: 3)",
    )
    main.add_argument("--config", type=Path, metavar="FILE", help="YAML or TOML, see below")
    main.add_argument(
        "--validation",
        type=_validation,
        metavar="X",
        help="part of the training prompts, or a file of rows, to choose options and stop early by (default: 0.1 "
        "where a grid or early stopping needs it, else none)",
    )
    main.add_argument(
        "--no-controls",
        action="store_true",
        default=None,
        help="leave out the two rows that stand beside QAA: its angles frozen at random, and a bias alone",
    )
    add_fields(parser, Settings)
    again = next(group for group in parser._action_groups if group.title == AGAIN)
    again.add_argument("--dry-run", action="store_true", help="say what would be trained, and stop")
    add_fields(parser, options.TrainOptions, only=_COMMON)


def run(args: argparse.Namespace) -> int:
    """Compare as the arguments say.

    Returns:
        The exit status: 0; 1 if a training or evaluation failed, which the report says; 2 for bad input, with the
        reason on stderr; 130 after Ctrl-C, 143 after SIGTERM.
    """
    missing = _missing(args)
    if missing:
        print(f"qaa-serve compare: {missing}", file=sys.stderr)
        return 2
    try:
        with _terminated_as_interrupted():
            return _compare(args)
    except TrainingError as error:
        print(f"qaa-serve compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(
            f"qaa-serve compare: interrupted; what is finished is kept in {args.output}: the same command goes on "
            "from there",
            file=sys.stderr,
        )
        return 143 if interrupt.args == ("SIGTERM",) else 130


def _missing(args: argparse.Namespace) -> str | None:
    for extra, names in (("compare", _EXTRA), ("bertscore", ("bert_score",) if "bertscore_model" in args else ())):
        for name in names:
            try:
                import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    raise
                needed = f"compare,{extra}" if extra != "compare" else extra
                return f'{name} is not installed; comparing needs the extra: pip install "qaa-serve[{needed}]"'
    return None


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the training under way in good order too, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("SIGTERM")

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: nobody sends signals here
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _compare(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from qaa_serve.training.compare.display import Display
    from qaa_serve.training.compare.peft_results import write_peft_results
    from qaa_serve.training.compare.plan import make_plan, read_config
    from qaa_serve.training.compare.report import quality_lines, write_report
    from qaa_serve.training.compare.study import Study, prepare

    logging.disable_progress_bar()
    given = vars(args)
    plan = make_plan(
        read_config(args.config) if args.config else {},
        methods=args.methods,
        seeds=args.seeds,
        validation=args.validation,
        controls=None if args.no_controls is None else False,
        common={name: given[name] for name in _COMMON if name in given},
    )
    settings = Settings(
        plan=plan,
        command=[
            "qaa-serve",
            "compare",
            *(each for each in getattr(args, "command_line", ()) if each != "--retry-failed"),
        ],
        **{name: given[name] for name in Settings.__dataclass_fields__ if name in given},
    )
    material = prepare(settings)
    for note in material.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.dry_run:
        print(_planned(settings, material))
        return 0
    finals = len(plan.variants) * len(plan.seeds)
    points = sum(len(variant.points) - 1 for variant in plan.variants)
    with Display(points + 2 * finals + 1) as display:
        results = Study(settings, material).execute(display)
    reports = write_report(results, settings.output)
    write_peft_results(results, settings.output)
    failed = [failure for variant in results["variants"] for failure in variant["failures"]]
    for failure in failed:
        log = settings.output / failure["log"]
        print(f"failed: {failure['name']}: {failure['reason']} (log: {log})", file=sys.stderr)
    if results["base"]["reason"]:
        print(f"failed: the base: {results['base']['reason']}", file=sys.stderr)
    if failed:
        print("the same command with --retry-failed trains these again", file=sys.stderr)
    print(quality_lines(results))
    print(f"report: {reports[1]} (also {reports[0].name}, results.json, figures/, peft/)")
    return 1 if failed or results["base"]["reason"] else 0


def _planned(settings: Settings, material: Material) -> str:
    from qaa_serve.training.compare.plan import check_options, options_text
    from qaa_serve.training.compare.study import Study, planned_parameters
    from qaa_serve.training.trainer import planned_steps

    plan, rows = settings.plan, len(material.train)
    study = Study(settings, material)
    lines = [
        f"{rows:,} rows to train on, {len(material.validation or ()):,} to validate on, "
        f"{len(material.test_set['prompts']):,} prompts to test on; seeds {', '.join(map(str, plan.seeds))}"
    ]
    total = 0
    for variant in plan.variants:
        lines.append(f"{variant.name} ({variant.method})")
        for point, run in zip(variant.points, study.point_runs(variant), strict=True):
            steps = planned_steps(check_options(variant.name, variant.method, point), rows)
            parameters = planned_parameters(settings.model, variant, point)
            size = "?" if parameters is None else f"{parameters:,}"
            own = {key: value for key, value in point.items() if key not in plan.common}
            text = options_text(own)
            done = " (finished already)" if run.result() else ""
            lines.append(f"  {text}: {steps:,} steps, {size} parameters{done}")
        trainings = len(variant.points) - 1 + len(plan.seeds)
        total += trainings
        chosen = f" of which {len(variant.points)} to choose by" if len(variant.points) > 1 else ""
        lines.append(f"  {trainings} trainings{chosen}")
    return "\n".join([*lines, f"{total} trainings in all, {len(plan.variants) * len(plan.seeds) + 1} evaluations"])


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _seeds(text: str) -> int | list[int]:
    try:
        if "," in text:
            return [int(part) for part in text.split(",") if part.strip()]
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number or numbers with commas are needed, found {text!r}") from None


def _validation(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command itself; returns the exit status."""
    parser = argparse.ArgumentParser(prog="qaa-serve compare")
    add_arguments(parser)
    arguments = sys.argv[1:] if arguments is None else arguments
    return run(parser.parse_args(arguments, argparse.Namespace(command_line=tuple(arguments))))


if __name__ == "__main__":
    sys.exit(main())
