"""``qaa-serve inspect``."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaa_serve.adapters import AdapterError
from qaa_serve.inspection.errors import InspectionError

if TYPE_CHECKING:
    from rich.console import Console

    from qaa_serve.inspection.hardware import HardwareCheck, HardwareResult
    from qaa_serve.inspection.report import Report

DESCRIPTION = """\
Say what an adapter is: its base, modules, circuits and sizes, and how large its updates are, layer by layer.
Whether it can be served is judged as qaa-serve judges it, with the same message where it cannot.
"""

EXAMPLE = """\
examples:
  qaa-serve inspect adapters/support
  qaa-serve inspect adapters/support --plot norms.png --draw circuit.png --module layers.3.self_attn.q_proj
  qaa-serve inspect adapters/support --qasm circuit.qasm
  qaa-serve inspect adapters/support --check support.jsonl --shots 1000
  qaa-serve inspect adapters/support --check support.jsonl --noise depolarizing=0.001 --noise readout=0.01 \\
      --module q_proj --tokens 4

exit status: 0; 1 if the adapter cannot be served; 2 if what was asked for cannot be done; 130 after Ctrl-C.
"""

#: Packages that the extra `inspect` brings, and those that reading a base model needs.
_EXTRAS = {"matplotlib": "inspect", "pennylane": "inspect", "transformers": "train", "jinja2": "train"}

#: Options that mean something with --check only.
_CHECK_OPTIONS = ("device", "shots", "noise", "rows", "tokens", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``qaa-serve inspect``."""
    parser.description = DESCRIPTION
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("adapter", type=Path, metavar="DIR", help="the adapter's directory, QAA or LoRA")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="base model, a directory or a name on the Hugging Face hub (default: the one the adapter names)",
    )
    parser.add_argument(
        "--with-vllm",
        action="store_true",
        help="ask vLLM's own check of LoRA adapters too, which takes the seconds that importing vLLM takes",
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the base model"
    )

    pictures = parser.add_argument_group("pictures and circuits")
    pictures.add_argument("--plot", type=Path, metavar="FILE", help="plot the norms by layer (.png, .svg or .pdf)")
    pictures.add_argument(
        "--draw", type=Path, metavar="FILE", help="draw a circuit with its trained angles (.png, .svg or .pdf)"
    )
    pictures.add_argument(
        "--qasm",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the same circuit, without the embedding, as OpenQASM 2.0; - or nothing: print it alone",
    )
    pictures.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="a module by its name or the end of it; may be given again. --draw and --qasm take the first module "
        "that it means (default: the adapter's first), --check all of them (default: all)",
    )
    pictures.add_argument(
        "--head", type=int, metavar="N", help="--draw, --qasm: which of the module's circuits, from 0 (default: 0)"
    )

    check = parser.add_argument_group(
        "imperfect hardware",
        "Run the circuits on a PennyLane device, on the activations of real rows, and compare z and the loss with "
        "the exact ones.",
    )
    check.add_argument("--check", type=Path, metavar="FILE", help="rows as qaa-serve train takes them, JSON lines")
    check.add_argument(
        "--device",
        metavar="NAME",
        help="PennyLane's name, such as lightning.qubit (default: default.qubit, with noise default.mixed)",
    )
    check.add_argument("--shots", type=int, metavar="N", help="measurements a circuit (default: exact)")
    check.add_argument(
        "--noise",
        action="append",
        metavar="NAME=P",
        help="after every gate, on its wires, with probability P: depolarizing, bit_flip, phase_flip, "
        "amplitude_damping, phase_damping; or readout, at the measurement. May be given again",
    )
    check.add_argument("--rows", type=int, metavar="N", help="rows, from the first on (default: 4)")
    check.add_argument(
        "--tokens",
        metavar="N",
        help="positions of each row, drawn at random, whose z come from the device, or all (default: 16)",
    )
    check.add_argument("--seed", type=int, metavar="N", help="of the positions and the shots (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Inspect as the arguments say.

    Returns:
        The exit status: 0; 1 for an adapter that cannot be served, 2 for what cannot be done, with the reason on
        stderr; 130 after Ctrl-C.
    """
    try:
        _inspect(args)
    except AdapterError as error:
        print(f"qaa-serve inspect: {args.adapter} is not valid: {error}", file=sys.stderr)
        return 1
    except InspectionError as error:
        print(f"qaa-serve inspect: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        print(
            f'qaa-serve inspect: {package} is not installed: pip install "qaa-serve[{_EXTRAS[package]}]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("qaa-serve inspect: interrupted", file=sys.stderr)
        return 130
    return 0


def _inspect(args: argparse.Namespace) -> None:
    from rich.console import Console

    from qaa_serve.inspection.report import inspect_adapter

    _check_usage(args)
    try:
        report = inspect_adapter(
            args.adapter, args.base, trust_remote_code=args.trust_remote_code, with_vllm=args.with_vllm
        )
    except AdapterError as error:
        _print_refused(args, error)
        raise
    messages = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    # What can fail at once fails before the long check.
    files = _make_files(args, report)
    result = None if args.check is None else _run_check(args, report, messages)
    _print(args, report, result)
    for write in files:
        messages.print(f"wrote {write()}")


def _check_usage(args: argparse.Namespace) -> None:
    """Say what cannot be meant before anything is read."""
    from qaa_serve.inspection.circuit import check_image
    from qaa_serve.inspection.outputs import check_writable

    for name in _CHECK_OPTIONS:
        if args.check is None and getattr(args, name) is not None:
            raise InspectionError(f"--{name} says how --check runs; name a file of rows with --check")
    if args.draw is None and args.qasm is None:
        if args.head is not None:
            raise InspectionError("--head chooses a circuit for --draw or --qasm; give one of them")
        if args.module and args.check is None:
            raise InspectionError("--module chooses for --draw, --qasm or --check; give one of them")
    if args.qasm == "-" and (args.json or args.check is not None):
        raise InspectionError("--qasm prints on stdout, and so does the report: give it a file (--qasm FILE)")
    outputs = []
    for path in (args.plot, args.draw):
        if path is not None:
            check_image(path)
            outputs.append(path)
    if args.qasm not in (None, "-"):
        outputs.append(Path(args.qasm))
    for path in outputs:
        check_writable(path)
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise InspectionError("two outputs have the same name; give each its own")


def _make_files(args: argparse.Namespace, report: Report) -> list[Callable[[], Path]]:
    """Make what is to be written; each of the functions writes one file and gives its name."""
    from qaa_serve.inspection.outputs import write_whole

    files: list[tuple[Path, bytes]] = []
    if args.plot is not None:
        from qaa_serve.inspection.plot import plot_norms

        files.append((args.plot, plot_norms(report, args.plot.suffix)))
    if args.draw is not None or args.qasm is not None:
        from qaa_serve.inspection.circuit import choose_circuit, draw, to_qasm

        adapter = _qaa_of(report, "--draw" if args.draw is not None else "--qasm")
        circuit = choose_circuit(adapter, report.revision.revision, args.module, args.head or 0)
        if args.draw is not None:
            files.append((args.draw, draw(circuit, args.draw.suffix)))
        if args.qasm is not None:
            files.append((Path(args.qasm), to_qasm(circuit).encode()))

    def writer(path: Path, content: bytes) -> Callable[[], Path]:
        def write() -> Path:
            write_whole(path, content)
            return path

        return write

    if args.qasm == "-":
        sys.stdout.write(files.pop()[1].decode())
    return [writer(path, content) for path, content in files]


def _qaa_of(report: Report, option: str) -> Any:
    if report.adapter is None:
        raise InspectionError(
            f"{option} needs a QAA adapter; {report.revision.name} is a LoRA adapter, without circuits"
        )
    return report.adapter


def _print_refused(args: argparse.Namespace, error: AdapterError) -> None:
    """What can be told all the same; files that were asked for are not written."""
    if args.qasm == "-":
        return
    from qaa_serve.inspection.report import describe_refused

    report = describe_refused(args.adapter, error)
    if args.json:
        print(json.dumps(report.to_json(), indent=2, allow_nan=False))
        return
    from qaa_serve.inspection.show import show_refused

    show_refused(_console(), report)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=115)


def _print(args: argparse.Namespace, report: Report, result: HardwareResult | None) -> None:
    if args.qasm == "-":
        return
    if args.json:
        facts = report.to_json()
        if result is not None:
            facts["check"] = result.to_json()
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    from qaa_serve.inspection.show import show_check, show_report

    console = _console()
    show_report(console, report)
    if result is not None:
        show_check(console, result)


def _run_check(args: argparse.Namespace, report: Report, messages: Console) -> HardwareResult:
    check = _prepare_check(args, report)
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    messages.print(f"{check.cost()}; about {_duration(check.seconds())}")
    bar = Progress(
        TextColumn("circuits"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("of which left"),
        TimeRemainingColumn(),
        console=messages,
        transient=True,
        disable=not messages.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=check.circuits)
        return check.run(lambda done: bar.advance(task, done))


def _prepare_check(args: argparse.Namespace, report: Report) -> HardwareCheck:
    from qaa_serve.inspection.circuit import choose_modules
    from qaa_serve.inspection.hardware import HardwareCheck, HardwareOptions

    adapter = _qaa_of(report, "--check")
    if report.base.fits is None:
        raise InspectionError(f"--check runs the base model, which cannot be read: {report.base.problem}")
    given: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("device", "shots", "rows", "seed")
        if getattr(args, name) is not None
    }
    if args.tokens is not None:
        given["tokens"] = None if args.tokens == "all" else _whole_number(args.tokens, "--tokens", "or all")
    for name in ("shots", "rows", "tokens"):
        if given.get(name) is not None and given[name] < 1:
            raise InspectionError(f"--{name} {given[name]}: a whole number from 1 on is needed")
    if args.noise:
        given["noise"] = dict(map(_noise, args.noise))
        if len(given["noise"]) < len(args.noise):
            raise InspectionError("--noise: the same name twice; give each its probability once")
    if given.get("seed", 0) < 0:
        raise InspectionError(f"--seed {given['seed']}: a whole number from 0 on is needed")
    modules = choose_modules(adapter, args.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HardwareCheck(
            adapter,
            report.base.resolved,
            args.check,
            modules,
            HardwareOptions(**given),
            trust_remote_code=args.trust_remote_code,
        )


def _whole_number(text: str, option: str, besides: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InspectionError(f"{option} {text}: a whole number {besides} is needed") from error


def _noise(text: str) -> tuple[str, float]:
    from qaa_serve.inspection.hardware import NOISES

    name, equals, number = text.partition("=")
    name = name.strip().lower().replace("-", "_")
    if name not in NOISES:
        raise InspectionError(f"--noise {text}: unknown noise {name!r}; known are {', '.join(NOISES)}")
    try:
        probability = float(number)
    except ValueError:
        probability = -1.0
    if not equals or not 0 <= probability <= 1:
        raise InspectionError(f"--noise {text}: a probability from 0 to 1 is needed, such as {name}=0.001")
    return name, probability


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``qaa-serve inspect``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="qaa-serve inspect")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
