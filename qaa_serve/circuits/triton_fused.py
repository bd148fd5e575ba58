"""The whole circuit in one Triton kernel: x is read once, z is written, nothing between them leaves the chip.

One program runs one token on one circuit; a program without a circuit writes its zeros and ends. The grid depends
only on shapes, and nothing is read back, so that a call can be captured in a CUDA graph. The state lies in the
registers of a program, as real and imaginary part, the latter from the first phases on. A circuit becomes steps:

- RY on every qubit. The state is split by the last bit of the amplitudes' index, turned, and joined so that this
  bit becomes the first: after n turns each bit has had its turn and is in its place again. A turn is (a - t b,
  t a + b) with t = tan(angle / 2), half the work of one with cosine and sine. The cosines that it leaves out are a
  factor of the whole state, and the readout divides by the state's length.
- RZ on every qubit is a diagonal of phases: the product of one for the high half of the bits and one for the low
  half, of 2**(n/2) numbers each.
- CNOTs permute the amplitudes: a gather by an index that shifts and exclusive ors make from the place.

The readout makes all 2**n Walsh-Hadamard sums of the squares, each of which is the expectation value of a product
of Pauli-Z; that of the empty product is the sum of the squares. What stands behind the last RY is not run: CNOTs
turn a product of Pauli-Z into another one, and phases it does not see.

A tangent stays within [-1, 1] since angles are reduced to [-pi/2, pi/2] when a circuit is put in. What is taken
off is RY(pi), a Pauli-Y up to a phase, and a Pauli can move to the end of the circuit: on its way it changes signs
of angles, and there signs of readouts.

The tests compile it for Hopper and Ampere (docs/performance.md) and interpret it on a CPU. It never ran on a GPU.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from typing import Any, TypeAlias

import torch

from qaa_serve.circuits.ansatz import Ansatz, Cnots, Rotation, check_width

#: 16 warps hold the state of 14 qubits in their registers, of more they do not.
MOST_QUBITS = 14

#: A layer of RY makes the state up to sqrt(2)**n times too long. Before that passes sqrt(2)**80 the state is
#: multiplied by the cosines that were left out.
_MOST_GROWTH = 80


def missing(device: torch.device) -> str | None:
    """Why it cannot run on such a device, and what to do about it."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU; only for tests, TRITON_INTERPRET=1 runs it slowly on a CPU"
    return None


@dataclass(frozen=True)
class Plan:
    """What the kernel does for an ansatz.

    Attributes:
        steps: of four numbers each, as the kernel takes them in STEPS; offsets count a table's floats.
        masks: for each column the wires whose Pauli-Z are multiplied, as bits of an amplitude's index; then zeros
            up to a power of two, one at least.
        floats: a circuit's table has. First the columns' signs, 0 for a circuit that is not there yet.
    """

    steps: tuple[tuple[int, int, bool, int], ...]
    masks: tuple[int, ...]
    floats: int


@lru_cache(maxsize=256)
def plan(ansatz: Ansatz) -> Plan:
    """The steps of an ansatz up to its last RY, and the readout that takes the rest into account."""
    from qaa_serve.circuits import triton_kernel as kernel

    n = ansatz.qubits
    acting, behind = _parted(ansatz)
    steps: list[tuple[int, int, bool, int]] = []
    floats, turned, is_complex = ansatz.columns, 0, False
    for gate in acting:
        if isinstance(gate, Cnots):
            steps += [(kernel.SHIFT.value, mask, is_complex, shift) for mask, shift in _exclusive_ors(gate, n)]
            steps.append((kernel.GATHER.value, 0, is_complex, 0))
        elif gate.axis == "Z":
            steps.append((kernel.PHASE.value, floats, is_complex, 0))
            is_complex = True
            floats += 2 * (2 ** (n // 2) + 2 ** (n - n // 2))
        else:
            turned += 1
            rescaled = _is_rescaled(turned, n)
            steps.append((kernel.RY.value, floats, is_complex, floats + n if rescaled else 0))
            floats += n + rescaled
    masks = [sum(1 << (n - 1 - wire) for wire in wires) for wires in ansatz.observables]
    for gate in reversed(behind):
        if isinstance(gate, Cnots):
            for control, target in reversed(gate.pairs):  # Z on the target becomes Z on both
                masks = [m ^ ((m >> (n - 1 - target) & 1) << (n - 1 - control)) for m in masks]
    masks += [0] * (2 ** len(masks).bit_length() - len(masks))
    return Plan(tuple(steps), tuple(masks), floats)


def _is_rescaled(turned: int, n: int) -> bool:
    """Whether the state is multiplied by the cosines left out since the last time, after so many layers of RY."""
    return turned % (_MOST_GROWTH // n) == 0


_Gates: TypeAlias = list[Rotation | Cnots]


def _parted(ansatz: Ansatz) -> tuple[_Gates, _Gates]:
    """The gates up to the last RY, and those behind it."""
    gates = list(ansatz.gates())
    last = max(i for i, gate in enumerate(gates) if isinstance(gate, Rotation) and gate.axis == "Y")
    return gates[: last + 1], gates[last + 1 :]


def _exclusive_ors(gate: Cnots, n: int) -> tuple[tuple[int, int], ...]:
    """(mask, shift) of the steps i ^= (i & mask) << shift that lead from j to g, with (CNOTs psi)[j] = psi[g].

    They undo the gates on j, last first. Neighbours that shift alike are one step, unless one reads what another
    has changed. A negative shift is one to the right.
    """
    found: list[tuple[int, int]] = []
    for control, target in reversed(gate.pairs):
        bit, shift = 1 << (n - 1 - control), control - target
        if found and found[-1][1] == shift and not bit & (found[-1][0] | _shifted(*found[-1])):
            found[-1] = found[-1][0] | bit, shift
        else:
            found.append((bit, shift))
    return tuple(found)


def _shifted(mask: int, shift: int) -> int:
    return mask << shift if shift > 0 else mask >> -shift


def make_tables(theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """What the kernel reads of circuits: signs of the columns, then what each step needs; computed in float64.

    Args:
        theta: (circuits, rows, n), on any device.
        ansatz: the form they share.

    Returns:
        (circuits, floats) float32 on the CPU.

    Raises:
        ValueError: if theta's shape is not the ansatz's.
    """
    if theta.shape[1:] != ansatz.theta_shape:
        raise ValueError(f"theta has shape {tuple(theta.shape)}; (circuits, *{ansatz.theta_shape}) is needed")
    n = ansatz.qubits
    angles = theta.detach().to("cpu", torch.float64)
    # The Pauli that stands before the rest of the circuit: X and Z on each qubit; both are a Y.
    has_x = torch.zeros(len(theta), n, dtype=torch.bool)
    has_z = has_x.clone()
    left_out = torch.ones(len(theta), 1, dtype=torch.float64)
    parts, turned = [], 0
    for gate in _parted(ansatz)[0]:
        if isinstance(gate, Cnots):
            for control, target in gate.pairs:
                has_x[:, target] ^= has_x[:, control]
                has_z[:, control] ^= has_z[:, target]
        elif gate.axis == "Z":
            parts += _phases(torch.where(has_x, -1, 1) * angles[:, gate.row])
        else:
            turn = torch.where(has_x ^ has_z, -1, 1) * angles[:, gate.row]
            half_turns = torch.round(turn / math.pi)
            turn = turn - half_turns * math.pi
            has_x = has_x ^ (half_turns % 2 == 1)
            has_z = has_z ^ (half_turns % 2 == 1)
            parts.append(torch.tan(turn / 2).flip(-1))  # the kernel begins with the last bit, the last wire
            left_out = left_out * torch.cos(turn / 2).prod(-1, keepdim=True)
            turned += 1
            if _is_rescaled(turned, n):
                parts.append(left_out)
                left_out = torch.ones_like(left_out)
    masks = torch.tensor(plan(ansatz).masks[: ansatz.columns])
    flips = has_x.long() @ (masks >> torch.arange(n - 1, -1, -1).unsqueeze(-1) & 1)  # (circuits, columns)
    return torch.cat([1 - 2 * (flips % 2), *parts], dim=-1).float()


def _phases(angles: torch.Tensor) -> list[torch.Tensor]:
    """RZ on every qubit: (circuits, n) -> cosines and sines of the high half of the bits, then of the low half."""
    parts = []
    half = angles.shape[-1] // 2
    for some in (angles[:, :half], angles[:, half:]):
        wires = some.shape[-1]
        bits = torch.arange(2**wires).unsqueeze(-1) >> torch.arange(wires - 1, -1, -1) & 1
        total = some @ (bits - 0.5).to(some.dtype).T  # RZ(t) = diag(exp(-i t / 2), exp(i t / 2))
        parts += [torch.cos(total), torch.sin(total)]
    return parts


def launch_options(qubits: int) -> dict[str, Any]:
    """Triton's options for a launch, chosen by the figures in docs/performance.md.

    4 to 16 amplitudes a thread, 32 from n = 13 on: more warps exchange more, fewer run out of registers. Those are
    limited so that 6, 3 and 2 programs fit on a multiprocessor.
    """
    warps = 1 if qubits < 8 else 2 ** (qubits // 2 - 3)
    return {"num_warps": warps, "maxnreg": {11: 80, 12: 80, 13: 128}.get(qubits), "enable_fp_fusion": True}


@lru_cache(maxsize=1024)
def constants(ansatz: Ansatz, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel's compile-time arguments, for an x of that dtype."""
    form = plan(ansatz)
    return {
        "QUBITS": ansatz.qubits,
        "COLUMNS": ansatz.columns,
        "PADDED": len(form.masks),
        "FLOATS": form.floats,
        "STEPS": tuple(chain.from_iterable(form.steps)),
        "TINY": torch.finfo(torch.promote_types(dtype, torch.float32)).tiny,
        "CONSTANT": ansatz.constant,
        "LENGTH": ansatz.length,
    }


def _check_size(ansatz: Ansatz) -> None:
    if ansatz.qubits > MOST_QUBITS:
        raise ValueError(
            f"the triton backend takes at most {MOST_QUBITS} qubits, not {ansatz.qubits}; choose another one"
        )


class TritonCircuits:
    """Circuits for serving; see ``backends.Circuits``.

    Raises:
        ValueError: for more qubits than ``MOST_QUBITS``.
    """

    def __init__(self, ansatz: Ansatz, count: int, device: torch.device):
        _check_size(ansatz)
        from qaa_serve.circuits import triton_kernel

        self._kernel = triton_kernel.circuit_kernel
        self._ansatz = ansatz
        self._tables = torch.zeros(count, plan(ansatz).floats, device=device)
        self._masks = torch.tensor(plan(ansatz).masks, dtype=torch.int32, device=device)

    def put(self, first: int, theta: torch.Tensor) -> None:
        """Set the angles (c, rows, n) of some circuits."""
        self._tables[first : first + len(theta)] = make_tables(theta, self._ansatz).to(self._tables.device)

    def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """See ``backends.Circuits``. One launch, which waits for nothing.

        Raises:
            ValueError: if x is wider than the state.
        """
        check_width(x, self._ansatz)
        tokens, readouts = index.shape
        z = torch.empty(tokens, readouts, self._ansatz.columns, device=x.device)
        if not index.numel():
            return z
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            self._kernel[(tokens * readouts,)](
                x,
                *x.stride(),
                x.shape[1],
                index,
                *index.stride(),
                readouts,
                self._tables,
                self._masks,
                z,
                **constants(self._ansatz, x.dtype),
                **launch_options(self._ansatz.qubits),
            )
        return z

    @property
    def nbytes(self) -> int:
        """Bytes of the circuits' tables."""
        return self._tables.nbytes

    @classmethod
    def compile(cls, ansatz: Ansatz, width: int, readouts: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compile the kernel as ``run`` launches it, seconds where Triton's cache does not have it.

        It never ran on a GPU.

        Raises:
            ValueError: for more qubits than ``MOST_QUBITS``.
        """
        _check_size(ansatz)
        from qaa_serve.circuits import triton_kernel

        with torch.cuda.device_of(torch.empty(0, device=device)):  # type: ignore[no-untyped-call]
            triton_kernel.circuit_kernel.warmup(
                dtype,  # in place of a pointer to such numbers
                width,
                1,
                width,
                torch.int32,
                readouts,
                1,
                readouts,
                torch.float32,
                torch.int32,
                torch.float32,
                grid=(1,),
                **constants(ansatz, dtype),
                **launch_options(ansatz.qubits),
            )
