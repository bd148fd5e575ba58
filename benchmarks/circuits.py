"""The circuit backends, PennyLane's simulators, and what the hardware would allow, in one process.

    python benchmarks/circuits.py [--qubits 8 9 10 12] [--tokens 1 64 256] [--json FILE] [--plot FILE.png]

One circuit of the default ansatz, 2 layers, on each token; x is float32 and 2**n wide. With `identical` adapters
all tokens have the same angles, with `distinct` each has its own (up to 256 different ones). Angles are put in
before. PennyLane's default.qubit computes in float64, its lightning devices in complex64.

What disagrees with the reference is not timed, and the exit status is then 1. The others take turns, one
measurement each; a measurement is as many calls in a row as take about 2 ms, on a GPU with one wait at its end.
Printed are medians: a call, a call's share for one token, the floor and how many times as long the call took, and
how many times as fast as default.qubit it was. A CPU computes with one thread.

The floor is the longer of two times, neither of which these gates can do without:
- memory: x read and z written once, over the bandwidth. On a CPU a small x is in a cache already when it is timed.
- arithmetic: the gates' additions and multiplications (`operations`) over the peak. RY costs 2 a qubit and real
  number, RZ on all qubits 2 an amplitude of a real state and 6 of a complex one, CNOTs nothing.
On a CPU both rates are measured first: float32 matrix product and copy of one thread. On a GPU they are data sheet
numbers, those of an H200 unless --peak-tflops and --peak-tbs say otherwise: not measured there.

The plot has the time for a token and circuit by n, with identical adapters and the most tokens: a line for each
backend, the floor dashed.

    python benchmarks/circuits.py --against CHECKOUT --backends cpu torch adjoint [--json FILE]

compares this checkout with another one of the same project, on the same batches and with this file's measurements.
Each has a process of its own; they take turns, and who begins changes. Printed is the median of the ratios of two
neighbouring measurements, ours over theirs, and their quartiles: below 1 this checkout is the faster one.
Neighbours see the same machine, and on a CPU a thread's own time is taken, so that a ratio means something
where a time alone does not. `adjoint` is training: one circuit on all tokens, forward and backward.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch

from qaa_serve.circuits import ANSATZ_NAMES, BACKENDS, Ansatz, Circuits, adjoint, circuits_of, get_backend
from qaa_serve.circuits.ansatz import Cnots, Rotation
from qaa_serve.circuits.backends import missing

LAYERS = 2
TOLERANCE = 2e-6
MOST_ADAPTERS = 256
PENNYLANE = ("default.qubit", "lightning.qubit", "lightning.gpu")
PATTERNS = ("identical", "distinct")
TRAINING = "adjoint"

#: Tokens of a batch that are compared with the reference, at most.
_CHECKED = 16

#: Seconds that one measurement of something fast takes, and calls in it at most.
_MEASUREMENT = 2e-3
_MOST_CALLS = 200


# ------------------------------------------------------------------------------------------------ what is run


@dataclass(frozen=True)
class Case:
    """A batch: x (tokens, 2**n), theta (circuits, rows, n), index (tokens, 1) int32."""

    adapters: str
    ansatz: Ansatz
    x: torch.Tensor
    theta: torch.Tensor
    index: torch.Tensor


#: Makes ready for a batch; what it returns evaluates it: (tokens, n).
Contender: TypeAlias = Callable[[Case], Callable[[], torch.Tensor]]


def make_case(
    qubits: int, tokens: int, adapters: str, device: torch.device, ansatz_name: str = ANSATZ_NAMES[0]
) -> Case:
    ansatz = Ansatz(ansatz_name, qubits, LAYERS)
    circuits = 1 if adapters == "identical" else min(tokens, MOST_ADAPTERS)
    x = torch.randn(tokens, 2**qubits, device=device)
    theta = math.pi * (2 * torch.rand(circuits, *ansatz.theta_shape) - 1)
    index = torch.arange(tokens, dtype=torch.int32, device=device).unsqueeze(1) % circuits
    return Case(adapters, ansatz, x, theta, index)


def of_backend(make: type[Circuits], case: Case) -> Callable[[], torch.Tensor]:
    """A backend as serving uses it: circuits made once, and run by index."""
    circuits = make(case.ansatz, len(case.theta), case.x.device)
    circuits.put(0, case.theta)
    return lambda: circuits.run(case.x, case.index)[:, 0]


def of_training(case: Case) -> Callable[[], torch.Tensor]:
    """Forward and backward of one circuit on all tokens."""
    x, theta = case.x.clone().requires_grad_(), case.theta[:1].to(case.x.device).requires_grad_()
    dz = torch.ones(len(x), 1, case.ansatz.columns, device=x.device)

    def forward_and_backward() -> torch.Tensor:
        z = adjoint.expectation_values(x, theta, case.ansatz)
        torch.autograd.grad(z, (x, theta), dz)
        return z.detach()[:, 0]

    return forward_and_backward


def of_pennylane(device: str, case: Case) -> Callable[[], torch.Tensor]:
    """A PennyLane device; default.qubit computes where its inputs are, the others take them from the CPU."""
    where = case.x.device if device == "default.qubit" else torch.device("cpu")
    circuit = pennylane_circuit(case.ansatz.qubits, device)
    x, angles = case.x.to(where), case.theta.to(where)
    theta = angles[0] if len(angles) == 1 else angles[case.index[:, 0].to(where)]
    return lambda: circuit(x, theta)


def pennylane_circuit(
    qubits: int, device: str = "default.qubit"
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The default ansatz on a PennyLane device, broadcast over tokens.

    Of (tokens, 2**n) and (rows, n), or (tokens, rows, n), it makes (tokens, n).
    """
    import numpy as np
    import pennylane as qml

    wires = range(qubits)
    if device == "default.qubit":
        simulator, differentiation = qml.device(device, wires=qubits), "backprop"
    else:
        simulator, differentiation = qml.device(device, wires=qubits, c_dtype=np.complex64), None

    def gates(psi: torch.Tensor, theta: torch.Tensor) -> list[object]:
        qml.StatePrep(psi, wires=wires)
        for layer in range(LAYERS):
            for k in wires:
                qml.RY(theta[..., 2 * layer, k], wires=k)
            for k in wires:
                qml.RZ(theta[..., 2 * layer + 1, k], wires=k)
            for k in wires:
                qml.CNOT([k, (k + 1) % qubits])
        for k in wires:
            qml.RY(theta[..., 2 * LAYERS, k], wires=k)
        return [qml.expval(qml.PauliZ(k)) for k in wires]

    circuit = qml.QNode(gates, simulator, interface="torch", diff_method=differentiation)

    def evaluate(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        psi = torch.nn.functional.normalize(x.double())
        return torch.stack(circuit(psi, theta.double()), dim=-1)

    return evaluate


def contenders(names: Sequence[str], device: torch.device) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those of the names that can run on the device, and why the others cannot."""
    found: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name in names:
        if name == TRAINING:
            found[name] = of_training
            continue
        reason = _pennylane_missing(name, device) if name in PENNYLANE else missing(name, device)
        if reason is not None:
            absent[name] = reason
        elif name in PENNYLANE:
            found[name] = partial(of_pennylane, name)
        else:
            found[name] = partial(of_backend, circuits_of(name))
    return found, absent


def _pennylane_missing(name: str, device: torch.device) -> str | None:
    if name == "lightning.gpu" and device.type != "cuda":
        return "it computes on an NVIDIA GPU"
    try:
        pennylane_circuit(2, name)
    except Exception as error:  # each device has its own ways to say that it cannot
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


# ------------------------------------------------------------------------------------------------- the floor


@dataclass(frozen=True)
class Peak:
    """What the hardware can do at most, and who says so."""

    operations: float  # a second, a fused multiplication and addition being two
    bandwidth: float  # bytes a second
    source: str


#: NVIDIA's data sheet of the H200 SXM: float32 without tensor cores, HBM3e.
H200 = Peak(67e12, 4.8e12, "data sheet of an H200 SXM, not measured")


def measured_peak() -> Peak:
    """The rates of torch's float32 matrix product and copy, with torch's number of threads: the best of some."""
    size, numbers = 1024, 2**24
    a, b = torch.randn(2, size, size)
    product = min(seconds(lambda: a @ b) for _ in range(10))
    source, target = torch.ones(2, numbers)
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(10))
    threads = torch.get_num_threads()
    return Peak(2 * size**3 / product, 8 * numbers / copy, f"measured in this run, {threads} thread(s)")


def operations(ansatz: Ansatz) -> int:
    """Additions and multiplications of one circuit on one state, counted as its cheapest form here has them.

    RY is (a - t b, t a + b), RZ on all qubits one phase an amplitude, CNOTs move amplitudes only. The state is
    real before the first RZ. A closing RY takes one product and one addition for two amplitudes, <X> in place of
    the gate; what else is behind the last RY is not seen. Then come squares, and sums and differences of halves.
    """
    gates = list(ansatz.gates())
    turns = [i for i, gate in enumerate(gates) if isinstance(gate, Rotation) and gate.axis == "Y"]
    per_amplitude, parts = 0, 1
    for i, gate in enumerate(gates[: turns[-1] + 1]):
        if isinstance(gate, Cnots):
            continue
        if gate.axis == "Z":
            per_amplitude += 2 if parts == 1 else 6
            parts = 2
        else:
            closing = i == len(gates) - 1
            per_amplitude += (1 if closing else 2) * ansatz.qubits * parts
    squares, sums = 2 * parts - 1, 2
    return (per_amplitude + squares + sums) << ansatz.qubits


def floor(case: Case, peak: Peak) -> tuple[float, str]:
    """Seconds that the batch takes at least, and what takes them."""
    tokens, width = case.x.shape
    memory = 4 * tokens * (width + case.ansatz.columns) / peak.bandwidth
    arithmetic = tokens * operations(case.ansatz) / peak.operations
    return max((memory, "memory"), (arithmetic, "arithmetic"))


# ---------------------------------------------------------------------------------------------- measurements


def seconds(function: Callable[[], object]) -> float:
    """Of one call, without the clearing up: garbage and memory given back may be another's, whose turn it was."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        result = function()
        taken = time.perf_counter() - start
        del result
        return taken
    finally:
        if collects:
            gc.enable()


def seconds_a_call(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Of so many calls in a row, on a GPU until the last one has ended."""

    def all_calls() -> None:
        for _ in range(calls):
            function()
        synchronize(device)

    synchronize(device)
    return seconds(all_calls) / calls


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calls_for(function: Callable[[], object], device: torch.device) -> int:
    """How many calls in a row make one measurement."""
    once = seconds_a_call(function, 1, device)
    return max(1, min(_MOST_CALLS, round(_MEASUREMENT / once)))


def largest_error(z: torch.Tensor, case: Case) -> float:
    """The largest difference between z (tokens, n) and the reference, over some of the tokens."""
    tokens = len(case.x)
    chosen = torch.linspace(0, tokens - 1, min(tokens, _CHECKED)).long()
    x, index = case.x.cpu()[chosen], case.index.cpu()[chosen]
    used, renumbered = torch.unique(index, return_inverse=True)
    expected = get_backend("reference")(x, case.theta[used], case.ansatz, renumbered)[:, 0]
    return (z.cpu()[chosen].double() - expected).abs().max().item()


def measure(
    case: Case, runners: Mapping[str, Contender], peak: Peak, runs: int, limit: float
) -> list[dict[str, Any]]:
    """A row for each contender: its median time in `runs` turns, or in at least 3 once `limit` seconds are over.

    A row has `problem` in place of times where the result was wrong or an error was raised.
    """
    device = case.x.device
    least, bound = floor(case, peak)
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, tuple[Callable[[], torch.Tensor], int]] = {}
    for name, prepare in runners.items():
        if name == TRAINING and case.adapters != "identical":
            continue  # training has one circuit a layer
        row = rows[name] = {
            "qubits": case.ansatz.qubits,
            "tokens": len(case.x),
            "adapters": case.adapters,
            "backend": name,
        }
        try:
            run = prepare(case)
            row["error"] = largest_error(run(), case)
            if not row["error"] <= TOLERANCE:
                row["problem"] = f"off by {row['error']:.1e}"
                continue
            ready[name] = run, calls_for(run, device)
        except Exception as error:  # of one contender; the others go on
            row["problem"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    times: dict[str, list[float]] = {name: [] for name in ready}
    begun = time.perf_counter()
    for turn in range(runs):
        if turn >= 3 and time.perf_counter() - begun > limit:
            break
        for name, (run, calls) in ready.items():
            times[name].append(seconds_a_call(run, calls, device))
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, value in median.items():
        rows[name] |= {
            "us": 1e6 * value,
            "us_a_token": 1e6 * value / len(case.x),
            "ratio": median["default.qubit"] / value if "default.qubit" in median else None,
            "floor_us": 1e6 * least,
            "bound": bound,
            "times_floor": value / least,
        }
    return list(rows.values())


def describe(row: Mapping[str, Any]) -> str:
    """A line of what was measured."""
    what = f"n = {row['qubits']:2}  tokens {row['tokens']:4}  {row['adapters']:9}  {row['backend']:15}"
    if "problem" in row:
        return f"{what}  NOT TIMED: {row['problem']}"
    ratio = "" if row["ratio"] is None else f"  {row['ratio']:6.1f} times as fast as default.qubit"
    return (
        f"{what} {row['us']:11.1f} us {row['us_a_token']:10.2f} us a token  "
        f"floor {row['floor_us']:8.3g} us ({row['bound']}), {row['times_floor']:8.3g} times that{ratio}"
    )


# ------------------------------------------------------------------------------------------ another checkout


class Side:
    """A process that measures what one checkout has; see ``answer_requests``, its other end."""

    def __init__(self, checkout: Path):
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--side"],
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: object) -> dict[str, Any]:
        """What it answers; ends the program if it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of one checkout ended on {request}: see its message above")
        found: dict[str, Any] = json.loads(answer)
        return found


def answer_requests() -> None:
    """Prepare a batch for a contender, or measure the one that was prepared last; line by line, until the end."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may come between the lines
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "backend" in request:
            device = torch.device(request["device"])
            torch.manual_seed(0)
            case = make_case(request["qubits"], request["tokens"], request["adapters"], device, request["ansatz"])
            found, absent = contenders([request["backend"]], device)
            if absent:
                raise SystemExit(f"{request['backend']} cannot run: {absent[request['backend']]}")
            run = found[request["backend"]](case)
            error = largest_error(run(), case)
            print(json.dumps({"error": error, "calls": calls_for(run, device)}), file=answers, flush=True)
        else:
            begun = time.thread_time()
            elapsed = seconds_a_call(run, request["calls"], device)
            # On a CPU this thread's own time, which nothing else that runs there takes from it.
            own = (time.thread_time() - begun) / request["calls"] if device.type == "cpu" else elapsed
            print(json.dumps({"seconds": own}), file=answers, flush=True)


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios of this checkout's times to another one's, batch by batch."""
    ours, theirs = Side(Path(__file__).resolve().parents[1]), Side(args.against.resolve())
    rows: list[dict[str, Any]] = []
    for backend in args.backends:
        for what in batches(args):
            if backend == TRAINING and what["adapters"] != "identical":
                continue
            row: dict[str, Any] = {**what, "backend": backend, "ansatz": args.ansatz}
            ready = [side.ask(**row, device=args.device) for side in (ours, theirs)]
            row["error"] = max(each["error"] for each in ready)
            calls = max(each["calls"] for each in ready)  # as many on both sides
            line = "n = {qubits:2}  tokens {tokens:4}  {adapters:9}  {backend:10}".format(**row)
            if row["error"] <= TOLERANCE:
                ratios = []
                for turn in range(args.runs):
                    order = (ours, theirs) if turn % 2 else (theirs, ours)
                    taken = {side: side.ask(calls=calls)["seconds"] for side in order}
                    ratios.append(taken[ours] / taken[theirs])
                row["quartiles"] = statistics.quantiles(ratios, n=4)
                low, median, high = row["quartiles"]
                print(f"{line}  {median:5.2f} of the other's time ({low:.2f} to {high:.2f})", flush=True)
            else:
                row["problem"] = f"off by {row['error']:.1e}"
                print(f"{line}  NOT TIMED: {row['problem']}", flush=True)
            rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------ main


def batches(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Qubits, tokens and adapters of each batch."""
    return [
        {"qubits": qubits, "tokens": tokens, "adapters": adapters}
        for qubits in args.qubits
        for tokens in args.tokens
        for adapters in args.adapters
        if not (adapters == "distinct" and tokens == 1 and "identical" in args.adapters)  # the same batch
    ]


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def versions(*distributions: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def plot(rows: Sequence[Mapping[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(row["tokens"] for row in rows)
    shown = [row for row in rows if row["tokens"] == most and row["adapters"] == "identical" and "us" in row]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in dict.fromkeys(row["backend"] for row in shown):
        points = [(row["qubits"], row["us_a_token"]) for row in shown if row["backend"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    least = sorted({(row["qubits"], row["floor_us"] / most) for row in shown})
    axes.plot(*zip(*least, strict=True), color="black", linestyle="--", label="floor")
    axes.set_yscale("log")
    axes.set_xticks([qubits for qubits, _ in least])
    axes.set_xlabel("qubits")
    axes.set_ylabel(f"microseconds for a token and circuit, {most} tokens")
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    serving = [name for name, backend in BACKENDS.items() if backend.circuits is not None]
    add("--qubits", type=int, nargs="+", default=[8, 9, 10, 12])
    add("--tokens", type=int, nargs="+", default=[1, 64, 256])
    add("--adapters", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    add("--backends", nargs="+", default=[*serving, *PENNYLANE], help="default: all that can run here")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--runs", type=int, default=15, help="measurements of each")
    add("--limit", type=float, default=10, help="seconds a batch, after which at least 3 measurements are enough")
    add("--peak-tflops", type=float, help="float32 operations a second for the floor, in 10**12")
    add("--peak-tbs", type=float, help="bytes a second for the floor, in 10**12")
    add("--against", type=Path, metavar="CHECKOUT", help="compare with this one instead, see above")
    add("--ansatz", choices=ANSATZ_NAMES, default=ANSATZ_NAMES[0], help="with --against")
    add("--side", action="store_true", help=argparse.SUPPRESS)  # a process of --against
    add("--json", help="write the figures there too")
    add("--plot", help="draw them there")
    args = parser.parse_args()
    if (args.peak_tflops is None) != (args.peak_tbs is None):
        parser.error("--peak-tflops and --peak-tbs go together")
    if args.against is None and args.ansatz != ANSATZ_NAMES[0]:
        parser.error("--ansatz goes with --against: what is PennyLane's here is the default one")
    return args


def main() -> None:
    args = arguments()
    if args.side:
        answer_requests()
        return
    device = torch.device(args.device)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # PennyLane's lightning, which is not loaded yet, reads it
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about: dict[str, Any] = {
        "hardware": hardware(device),
        "versions": versions(
            "torch", "numba", "triton", "cuquantum-python-cu13", "pennylane", "pennylane-lightning"
        ),
        "command": shlex.join(["python", "benchmarks/circuits.py", *sys.argv[1:]]),
    }
    if args.against is not None:
        print(json.dumps(about, indent=2), flush=True)
        finish(about, compare(args), args.json)
    if args.peak_tflops is not None:
        peak = Peak(1e12 * args.peak_tflops, 1e12 * args.peak_tbs, "as given")
    else:
        peak = H200 if device.type == "cuda" else measured_peak()
    found, absent = contenders(args.backends, device)
    about |= {
        "peak": {"gflops": peak.operations / 1e9, "gbytes_a_second": peak.bandwidth / 1e9, "source": peak.source},
        "not_run": absent,
    }
    print(json.dumps(about, indent=2), flush=True)
    rows: list[dict[str, Any]] = []
    for what in batches(args):
        for row in measure(make_case(**what, device=device), found, peak, args.runs, args.limit):
            rows.append(row)
            print(describe(row), flush=True)
    if args.plot:
        plot(rows, args.plot)
    finish(about, rows, args.json)


def finish(about: dict[str, Any], rows: list[dict[str, Any]], path: str | None) -> NoReturn:
    """Write the figures, if that is wanted, and end: with status 1 if something was not timed."""
    if path:
        with open(path, "w") as file:
            json.dump(about | {"results": rows}, file, indent=2)
            file.write("\n")
    sys.exit(any("problem" in row for row in rows))


if __name__ == "__main__":
    main()
