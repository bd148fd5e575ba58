"""What the circuit tests share: random inputs, tolerances, the backends, and PennyLane as the judge."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import pennylane as qml
import pytest
import torch
import triton_interpreter
from custatevec_interpreter import interpreted

from qaa_serve.circuits import MAX_QUBITS, Ansatz, get_backend
from qaa_serve.circuits.backends import ExpectationValues
from qaa_serve.circuits.cpu.serving import CompiledCircuits

#: Fresh at each run; a failing test prints it, and QAA_TEST_SEED=<it> runs the same inputs again.
SEED = int(os.environ.get("QAA_TEST_SEED") or random.SystemRandom().randrange(2**31))

#: Largest error of a z, which lies in [-1, 1], and of a gradient of a sum of z that is scaled to about 1, by
#: the precision a backend computes in. Errors seen over thousands of circuits: 5e-7 and 2e-15. A wrong gate
#: moves z by 5e-3 and more, even at 13 qubits: test_circuits_tolerance.py shows it.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-13}

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fresh_generator() -> torch.Generator:
    """Random numbers that differ from run to run; pytest shows the printed seed of a failing test."""
    print(f"QAA_TEST_SEED={SEED}")
    return torch.Generator().manual_seed(SEED)


# ---------------------------------------------------------------------------------------------- backends


@dataclass(frozen=True)
class Traits:
    """What the suite may ask of a backend.

    Attributes:
        device: where its inputs lie; a missing one skips the tests.
        always_double: computes in float64 whatever it is given.
        double: computes in float64 when x is float64.
        differentiable: has gradients with respect to x and theta.
        needs: a module without which it cannot run here.
        around: gives what must be in place while it runs.
        most_qubits: it takes.
        most_tokens: with a circuit that it is tried with, where it is interpreted token by token.
    """

    device: str = "cuda"
    always_double: bool = False
    double: bool = False
    differentiable: bool = False
    needs: str | None = None
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    most_qubits: int = MAX_QUBITS
    most_tokens: int | None = None


@lru_cache
def compiled() -> AbstractContextManager[object]:
    """Have the compiled backend compiled, by one of pytest's workers and not by two at once."""
    for dtype in (torch.float32, torch.bfloat16):
        CompiledCircuits.compile(dtype)
    return nullcontext()


#: A new backend gets a line here, and with it the whole suite.
TRAITS = {
    "reference": Traits(device="cpu", always_double=True, double=True, differentiable=True),
    "torch": Traits(device="cpu", double=True, differentiable=True),
    "cpu": Traits(device="cpu", around=compiled),
    "triton": Traits(needs="triton", most_qubits=14)
    if torch.cuda.is_available()
    else Traits(device="cpu", needs="triton", most_qubits=14, most_tokens=64),
    "cuquantum": Traits(needs="cuquantum.bindings.custatevec")
    if torch.cuda.is_available()
    else Traits(device="cpu", around=interpreted),
}


@dataclass(frozen=True)
class Backend:
    """A backend under test; takes CPU tensors and gives CPU tensors back, whatever its device."""

    name: str
    traits: Traits
    function: ExpectationValues

    def __call__(
        self, x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        if ansatz.qubits > self.traits.most_qubits:
            pytest.skip(f"backend {self.name!r} takes at most {self.traits.most_qubits} qubits")
        tokens = len(x) if index is None else int((index >= 0).any(-1).sum())
        if self.traits.most_tokens is not None and tokens > self.traits.most_tokens:
            pytest.skip(f"backend {self.name!r} runs every token by itself, and is interpreted")
        device = self.traits.device
        moved = None if index is None else index.to(device)
        with self.traits.around():
            return self.function(x.to(device), theta.to(device), ansatz, moved).cpu()

    def precision(self, x: torch.Tensor) -> torch.dtype:
        """The dtype in which it computes, and returns, for such an x."""
        double = self.traits.always_double or (self.traits.double and x.dtype == torch.float64)
        return torch.float64 if double else torch.float32

    def tolerance(self, x: torch.Tensor) -> float:
        return TOLERANCE[self.precision(x)]


def open_backend(name: str) -> Backend:
    """The backend of that name; skips with the reason where this machine cannot run it."""
    traits = TRAITS[name]
    if traits.device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"backend {name!r} needs an NVIDIA GPU")
    if traits.needs is not None:
        try:
            import_module(traits.needs)
        except ImportError as error:
            pytest.skip(f"backend {name!r} needs {traits.needs}: {error}")
    if name == "triton" and traits.device == "cpu":
        return Backend(name, traits, triton_interpreter.expectation_values)
    return Backend(name, traits, get_backend(name))


# ------------------------------------------------------------------------------------------------ inputs


#: The options of a circuit beside its gates, alone and together.
OPTIONS: dict[str, dict[str, object]] = {
    "constant": {"constant": True},
    "length": {"length": True},
    "fewer": {"readouts": 2},
    "pairs": {"readouts": 8},
    "all": {"constant": True, "length": True, "readouts": 10},
}


def width_for(qubits: int) -> int:
    """A width that needs so many qubits and, where there is one, is not a power of two."""
    return 2 if qubits == 1 else 2 ** (qubits - 1) + 2 ** (qubits - 1) // 3 + 1


def random_x(
    generator: torch.Generator, tokens: int, width: int, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)


def random_theta(
    generator: torch.Generator, circuits: int, ansatz: Ansatz, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Angles from -pi to pi."""
    unit = torch.rand(circuits, *ansatz.theta_shape, generator=generator, dtype=torch.float64)
    return ((2 * unit - 1) * torch.pi).to(dtype)


POPULARITIES = ("distinct", "uniform", "zipf", "identical", "skewed")


def popularity_index(
    pattern: str, tokens: int, circuits: int, generator: torch.Generator, readouts: int = 1
) -> torch.Tensor:
    """(tokens, readouts) circuit numbers: which request of a mixed batch uses which adapter."""
    count = tokens * readouts
    if pattern == "distinct":
        flat = torch.randperm(max(count, circuits), generator=generator)[:count] % circuits
    elif pattern == "identical":
        flat = torch.full((count,), int(torch.randint(circuits, (), generator=generator)))
    elif pattern == "skewed":  # one adapter has nearly all, some requests go to the base
        flat = torch.zeros(count, dtype=torch.int64)
        flat[::5] = torch.randint(-1, circuits, (len(flat[::5]),), generator=generator)
    else:
        rank = torch.arange(1, circuits + 1, dtype=torch.float64)
        weight = rank**-1.5 if pattern == "zipf" else torch.ones_like(rank)
        flat = torch.multinomial(weight, count, replacement=True, generator=generator)
    return flat.reshape(tokens, readouts)


# --------------------------------------------------------------------------------------------- PennyLane

Operation = tuple[Callable[..., object], tuple[object, ...]]


def operations(ansatz: Ansatz, theta: torch.Tensor) -> list[Operation]:
    """The circuit as PennyLane's operators with their arguments, written from DESIGN, not from our code."""
    n, wires = ansatz.qubits, range(ansatz.qubits)
    if ansatz.name == "strongly_entangling":
        weights = theta.reshape(ansatz.layers, 3, n).transpose(1, 2)
        return [(qml.StronglyEntanglingLayers, (weights, list(wires)))]
    rows = iter(theta)
    gates: list[Operation] = []
    for _ in range(ansatz.layers):
        gates += [(qml.RY, (angle, k)) for k, angle in enumerate(next(rows))]
        if ansatz.name == "ryrz_ring_ry":
            gates += [(qml.RZ, (angle, k)) for k, angle in enumerate(next(rows))]
        gates += [(qml.CNOT, ([k, (k + 1) % n],)) for k in wires if n > 1]
    if ansatz.name == "ryrz_ring_ry":
        gates += [(qml.RY, (angle, k)) for k, angle in enumerate(next(rows))]
    assert next(rows, None) is None
    return gates


def pennylane_z(
    x: torch.Tensor, gates: Sequence[Operation], qubits: int, observables: Sequence[object] | None = None
) -> torch.Tensor:
    """(tokens, width) float64 -> (tokens, readouts), by PennyLane's default.qubit and its AmplitudeEmbedding."""
    observables = observables or [qml.PauliZ(k) for k in range(qubits)]

    @qml.qnode(_device(qubits), interface="torch", diff_method="backprop")
    def circuit() -> list[object]:
        qml.AmplitudeEmbedding(x, wires=range(qubits), pad_with=0.0, normalize=True)
        for operator, arguments in gates:
            operator(*arguments)
        return [qml.expval(observable) for observable in observables]

    return torch.stack([z.reshape(len(x)) for z in circuit()], dim=-1)


@lru_cache
def _device(qubits: int) -> object:
    return qml.device("default.qubit", wires=qubits)


def pauli_strings(n: int, readouts: int) -> list[object]:
    """Z on each wire, then on pairs in lexical order, written from the docs."""
    singles = [qml.PauliZ(k) for k in range(n)]
    pairs = [qml.PauliZ(i) @ qml.PauliZ(j) for i in range(n) for j in range(i + 1, n)]
    return (singles + pairs)[: readouts or n]


def with_options(x: torch.Tensor, angles: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """One circuit, its options written from the docs: a constant beside x, z times the length of x."""
    norm = x.norm(dim=-1, keepdim=True)
    if ansatz.constant:
        embedded = torch.cat([x / torch.where(norm > 0, norm, 1), torch.ones_like(norm)], dim=-1)
    else:
        embedded = x
    readouts = pauli_strings(ansatz.qubits, ansatz.readouts)
    z = pennylane_z(embedded, operations(ansatz, angles), ansatz.qubits, readouts)
    return z * norm / x.shape[-1] ** 0.5 if ansatz.length else z


def judge(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None = None) -> torch.Tensor:
    """What a backend must return, in float64: PennyLane where x is not zero, 0 elsewhere and at index -1."""
    x, theta = x.double(), theta.double()
    if x.requires_grad or theta.requires_grad:
        return _judge(x, theta, ansatz, index)
    return _once(_judge, x, theta, ansatz, index)


def _once(
    function: Callable[..., Any], x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None
) -> Any:
    """What a function makes of these inputs, kept: every backend is asked the same questions, and PennyLane takes
    longest to answer them.
    """
    key = function, ansatz, *(None if t is None else (t.shape, t.numpy().tobytes()) for t in (x, theta, index))
    if key not in _found:
        _found[key] = function(x, theta, ansatz, index)
    return _found[key]


_found: dict[object, Any] = {}


def _judge(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None) -> torch.Tensor:
    nonzero = (x.detach().abs().amax(dim=-1) > 0) | ansatz.constant
    columns = [torch.zeros(len(x), ansatz.columns, dtype=torch.float64)]  # what index -1 picks: the last
    for angles in theta:
        z = torch.zeros(len(x), ansatz.columns, dtype=torch.float64)
        if nonzero.any():
            values = with_options(x[nonzero], angles, ansatz)
            z = z.index_put((nonzero.nonzero().squeeze(1),), values)
        columns.insert(-1, z)
    table = torch.stack(columns, dim=1)  # (tokens, circuits + 1, n)
    if index is None:
        return table[:, :-1]
    return table[torch.arange(len(x)).unsqueeze(1), index]


# ------------------------------------------------------------------------------------------- comparisons


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference at most ``tolerance``; a NaN never passes."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)


def assert_gradients_close(
    function: Callable[..., torch.Tensor],
    x: torch.Tensor,
    theta: torch.Tensor,
    ansatz: Ansatz,
    index: torch.Tensor | None = None,
) -> None:
    """z and both gradients as PennyLane has them. Gradients come in the dtype of x and theta, so it rules."""
    found = gradients(function, x, theta, ansatz, index)
    expected = _once(_judge_gradients, x.double(), theta.double(), ansatz, index)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, TOLERANCE[x.dtype])


def _judge_gradients(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return gradients(_judge, x, theta, ansatz, index)


def gradients(
    function: Callable[..., torch.Tensor],
    x: torch.Tensor,
    theta: torch.Tensor,
    ansatz: Ansatz,
    index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, and a fixed weighted sum's gradients with respect to x and theta.

    The gradient of x is multiplied by ||x||, so that its size does not depend on that of x, and the weights
    sum up to at most 1 over the readouts of a token and over the tokens.
    """
    x, theta = x.detach().clone().requires_grad_(), theta.detach().clone().requires_grad_()
    z = function(x, theta, ansatz, index)
    weights = torch.cos(torch.arange(z.numel(), dtype=torch.float64)).reshape(z.shape) / max(z[0].numel(), 1)
    dx, dtheta = torch.autograd.grad((z.double() * weights).sum(), (x, theta))
    norm = torch.linalg.vector_norm(x.detach().double(), dim=-1, keepdim=True)
    return z.detach(), dx.double() * norm, dtheta.double() / len(x)
