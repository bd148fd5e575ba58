"""The backends by name, and which of them a machine can run. Nothing heavy is imported before one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, Protocol, TypeAlias

import torch

from qaa_serve.circuits.ansatz import Ansatz, checked_index

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

    @classmethod
    def compile(cls, ansatz: Ansatz, width: int, readouts: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compile what a run on x (tokens, width) of that dtype would compile, so that no request waits for it.

        From any thread, beside runs in another one.
        """


class Backend(NamedTuple):
    """Where a backend is and what it is for.

    Its module has ``missing(device) -> str | None``, why it cannot run on such a device and what to do about it;
    and a class of ``Circuits`` where it is for serving, ``expectation_values`` where that can do more, or both.
    """

    module: str
    circuits: str | None
    purpose: str


BACKENDS = {
    "reference": Backend("reference", None, "complex128, gate by gate, CPU; for checking"),
    "torch": Backend("torch_batched", "TorchCircuits", "float32, fused gates, CPU or GPU, differentiable"),
    "triton": Backend("triton_fused", "TritonCircuits", "float32, one kernel, GPU"),
    "cuquantum": Backend("custatevec", "CuStateVecCircuits", "complex64 on cuStateVec, GPU"),
    "cpu": Backend("cpu_fused", "CompiledCircuits", "float32, compiled for this CPU by numba"),
}

#: What `auto` tries on a kind of device, first to last.
_PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuquantum", "triton", "torch")}


def get_backend(name: str) -> ExpectationValues:
    """The function ``expectation_values(x, theta, ansatz, index)`` of a backend; see ``reference``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    module = _module(name)
    if hasattr(module, "expectation_values"):
        function: ExpectationValues = module.expectation_values
        return function
    make = circuits_of(name)

    def expectation_values(
        x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        return evaluate(make, x, theta, ansatz, index)

    return expectation_values


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


def evaluate(
    make: type[Circuits], x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None
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


def choose_backend(name: str, device: torch.device) -> tuple[str, str]:
    """The backend that a name stands for on such a device, and why.

    Args:
        name: of a backend; or "auto": on a GPU cuQuantum, else Triton; on a CPU the compiled one, else torch.
        device: where x will be.

    Raises:
        ValueError: for an unknown name, and for a named backend that cannot run here, with the remedy.
    """
    if name != "auto":
        circuits_of(name)
        if reason := missing(name, device):
            raise ValueError(f"the circuit backend {name!r} cannot run here: {reason}. Or choose 'auto'")
        return name, "as asked"
    passed_over: list[str] = []
    for candidate in _PREFERENCE.get(device.type, ("torch",)):
        if (reason := missing(candidate, device)) is None:
            return candidate, "; ".join([f"first that can run on {device.type}", *passed_over])
        passed_over.append(f"not {candidate}: {reason}")
    raise AssertionError("torch runs everywhere")


def _module(name: str) -> ModuleType:
    if name not in BACKENDS:
        known = "; ".join(f"{key} ({backend.purpose})" for key, backend in BACKENDS.items())
        raise ValueError(f"unknown circuit backend {name!r}; known are: {known}")
    return import_module(f"{__package__}.{BACKENDS[name].module}")
