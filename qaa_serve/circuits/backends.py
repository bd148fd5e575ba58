"""The backends by name, and which of them a machine can run. Nothing heavy is imported before one is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from qaa_serve.circuits.ansatz import ANSATZ_NAMES, MAX_QUBITS, Ansatz, checked_index, qubits_for

ExpectationValues: TypeAlias = Callable[[torch.Tensor, torch.Tensor, Ansatz, torch.Tensor | None], torch.Tensor]


class Circuits(Protocol):
    """Room for some circuits of one form, in whatever layout a backend runs them from; what serving uses.

    Each is empty, and gives z = 0, until it has angles.
    """

    def __init__(self, ansatz: Ansatz, count: int, device: torch.device): ...

    def put(self, first: int, theta: torch.Tensor) -> None:
        """Set the angles (c, rows, n) of the circuits first, ..., first + c - 1."""

    def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Expectation values, as ``reference`` has them, of tensors on the circuits' device; no gradients.

        Args:
            x: (tokens, width) of any floating dtype, any strides.
            index: (tokens, readouts) int32: which circuit each readout of a token uses, -1 for none. It is not
                checked: a number that is not there may read anything.

        Returns:
            (tokens, readouts, ansatz.columns) float32; exact zeros at index -1.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of the circuits' tables."""


class Training(Protocol):
    """A module that runs every circuit on every token and has the gradients; what training uses."""

    def prepare(self) -> None:
        """Compile what it needs, or read what was compiled before; else the first call does."""

    def forward(self, x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
        """z, (tokens, circuits, columns), of x (tokens, width) and theta (circuits, rows, n)."""

    def backward(
        self, x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, dz: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dL/dx and dL/dtheta, of the shapes and dtypes of x and theta, from dz = dL/dz."""


class Backend(NamedTuple):
    """Where a backend is and what it is for.

    Attributes:
        module: has ``missing(device) -> str | None``, why it cannot run on such a device and what to do about it;
            and ``expectation_values`` where that can do more than its circuits.
        circuits: its class of ``Circuits``, where it is for serving.
        purpose: for people.
        training: the module that is its ``Training``, where it has one; ``MOST_QUBITS`` there, if not all.
    """

    module: str
    circuits: str | None
    purpose: str
    training: str | None = None


BACKENDS = {
    "reference": Backend("reference", None, "complex128, gate by gate, CPU; for checking"),
    "torch": Backend(
        "torch_batched", "TorchCircuits", "float32, fused gates, CPU or GPU, differentiable", "torch_adjoint"
    ),
    "triton": Backend("triton.host", "TritonCircuits", "float32, one kernel, GPU", "triton.training"),
    "cuquantum": Backend("custatevec", "CuStateVecCircuits", "complex64 on cuStateVec, GPU"),
    "cpu": Backend("cpu.serving", "CompiledCircuits", "float32, compiled for this CPU by numba", "cpu.training"),
}

#: What `auto` tries on a kind of device, first to last; torch, which runs everywhere, only for want of others.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuquantum")}

#: Tokens of the batches that backends are timed on, as in decoding and in prefill, and how long that may take.
_TIMED_TOKENS, _TIMED_S = (16, 512), 1.0


def get_backend(name: str) -> ExpectationValues:
    """The function ``expectation_values(x, theta, ansatz, index)`` of a backend; see ``reference``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    module = _module(name)
    if hasattr(module, "expectation_values"):
        function: ExpectationValues = module.expectation_values
        return function
    return partial(_evaluate, circuits_of(name))


def circuits_of(name: str) -> type[Circuits]:
    """A backend's class of circuits.

    Raises:
        ValueError: for an unknown name, or a backend that is not for serving.
    """
    module, circuits = _module(name), BACKENDS[name].circuits
    if circuits is None:
        raise ValueError(
            f"the circuit backend {name!r} is for checking, not for serving: choose another, or 'auto'"
        )
    found: type[Circuits] = getattr(module, circuits)
    return found


def training_backend(device: torch.device, dtype: torch.dtype, qubits: int) -> Training:
    """What trains circuits of so many qubits on x of that dtype there.

    Kernels, where the device has some: they compute in float32, and torch.compile cannot look into them. Else
    torch.
    """
    kernels = () if dtype == torch.float64 or torch.compiler.is_compiling() else _PREFERENCE.get(device.type, ())
    for name in (*kernels, "torch"):
        if (path := BACKENDS[name].training) is not None and missing(name, device) is None:
            module: Any = import_module(f"{__package__}.{path}")
            if qubits <= getattr(module, "MOST_QUBITS", MAX_QUBITS):
                break
    training: Training = module
    return training


def _evaluate(
    make: type[Circuits], x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None = None
) -> torch.Tensor:
    """``reference``'s function by way of circuits that are made for this call.

    Raises:
        ValueError: if x is wider than the state, or theta's shape is not the ansatz's.
        IndexError: if index names a circuit that is not there.
    """
    index = checked_index(x, theta, ansatz, index)
    circuits = make(ansatz, len(theta), x.device)
    circuits.put(0, theta)
    return circuits.run(x, index.to(torch.int32))


@lru_cache
def missing(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on such a device, and what to do about it; None if it can.

    Raises:
        ValueError: for an unknown name.
    """
    reason: str | None = _module(name).missing(device)
    return reason


class Choice(NamedTuple):
    """A backend that was chosen.

    Attributes:
        name: the backend's.
        reason: for people.
        seconds: what each that was timed took for the shapes; empty where nothing had to be compared.
    """

    name: str
    reason: str
    seconds: dict[str, float]


def choose_backend(name: str, device: torch.device, shapes: Sequence[tuple[int, int]] = ()) -> Choice:
    """The backend that a name stands for on such a device.

    Args:
        name: of a backend; or "auto": of those that can run here the one that is fastest on the shapes.
        device: where x will be.
        shapes: (width of x, circuits a token) of the layers.

    Raises:
        ValueError: for an unknown name, and for a named backend that cannot run here, with the remedy.
    """
    if name != "auto":
        circuits_of(name)
        if reason := _unfit(name, device, shapes):
            raise ValueError(f"the circuit backend {name!r} cannot run here: {reason}. Or choose 'auto'")
        return Choice(name, "as asked", {})
    unfit = {other: _unfit(other, device, shapes) for other in _PREFERENCE.get(device.type, ())}
    fit = [other for other, reason in unfit.items() if reason is None]
    passed_over = [f"not {other}: {reason}" for other, reason in unfit.items() if reason is not None]
    if len(fit) > 1 and shapes:
        seconds = {other: time_backend(other, device, shapes, _TIMED_S / len(fit)) for other in fit}
        figures = ", ".join(f"{other} {taken * 1e6:.0f}" for other, taken in seconds.items())
        reason = f"fastest on this model's layers, microseconds for all shapes: {figures}"
        return Choice(min(seconds, key=seconds.__getitem__), "; ".join([reason, *passed_over]), seconds)
    reason = f"first that can run on {device.type}"
    return Choice((fit or ["torch"])[0], "; ".join([reason, *passed_over]), {})


def _unfit(name: str, device: torch.device, shapes: Sequence[tuple[int, int]]) -> str | None:
    """Why a backend cannot run on such a device in such layers; None if it can."""
    if (reason := missing(name, device)) is not None:
        return reason
    widest = max((width for width, _ in shapes), default=2)
    most: int = getattr(_module(name), "MOST_QUBITS", MAX_QUBITS)
    if qubits_for(widest) > most:
        return f"a layer {widest} wide needs {qubits_for(widest)} qubits, and it takes {most}"
    return None


def time_backend(name: str, device: torch.device, shapes: Sequence[tuple[int, int]], limit_s: float) -> float:
    """Seconds that a backend takes for one run on each shape and size of batch, each the fastest of some.

    Args:
        name: of the backend.
        device: where it runs.
        shapes: (width of x, circuits a token) of the layers.
        limit_s: what may be spent beside each run's first two.
    """
    generator = torch.Generator().manual_seed(0)
    runs = [(width, circuits, tokens) for width, circuits in shapes for tokens in _TIMED_TOKENS]
    total = 0.0
    for width, count, tokens in runs:
        ansatz = Ansatz(ANSATZ_NAMES[0], qubits_for(width), 2)
        circuits = circuits_of(name)(ansatz, count, device)
        circuits.put(0, torch.rand(count, *ansatz.theta_shape, generator=generator))
        x = torch.randn(tokens, width, generator=generator).to(device, torch.bfloat16)
        index = torch.arange(count, dtype=torch.int32, device=device).expand(tokens, -1)
        taken: list[float] = []
        end = time.perf_counter() + limit_s / len(runs)
        while len(taken) < 2 or time.perf_counter() < end:
            begun = time.perf_counter()
            circuits.run(x, index)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - begun)
        total += min(taken[1:])  # the first one compiles
    if hasattr(module := _module(name), "release"):
        module.release(device)  # what it keeps for the next run is room for vLLM's KV cache, if it is not taken
    return total


def _module(name: str) -> ModuleType:
    if name not in BACKENDS:
        known = "; ".join(f"{key} ({backend.purpose})" for key, backend in BACKENDS.items())
        raise ValueError(f"unknown circuit backend {name!r}; known are: {known}")
    return import_module(f"{__package__}.{BACKENDS[name].module}")
