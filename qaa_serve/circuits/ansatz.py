"""The parameterised circuits: what is embedded, which gates act on which angles, what is read out.

Wire 0 is the most significant bit of a basis state's index, as in PennyLane.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations, islice
from typing import Literal, TypeAlias

import torch

#: A state of more qubits than this no longer fits the backends' tables; 2**16 is wider than any layer in use.
MAX_QUBITS = 16

#: For ``Ansatz.readouts``: every expectation value that there is.
ALL_READOUTS = -1


@dataclass(frozen=True)
class Rotation:
    """RY or RZ on every qubit; qubit ``k`` turns by ``theta[row, k]``."""

    axis: Literal["Y", "Z"]
    row: int


@dataclass(frozen=True)
class Cnots:
    """CNOT gates, (control, target), acting from left to right."""

    pairs: tuple[tuple[int, int], ...]


Gate: TypeAlias = Rotation | Cnots


def qubits_for(width: int, constant: bool = False) -> int:
    """Number of qubits whose amplitudes hold a vector of ``width`` numbers: ceil(log2(width)).

    Args:
        width: of the layer's input.
        constant: whether a constant is embedded behind it, see ``Ansatz``; it takes one more amplitude.

    Raises:
        ValueError: if ``width`` is below 2 (no qubit) or needs more than ``MAX_QUBITS``.
    """
    most = 2**MAX_QUBITS - constant
    if not 2 <= width <= most:
        raise ValueError(f"a layer input of width {width} cannot be embedded: widths from 2 to {most} can")
    return (width + constant - 1).bit_length()


@dataclass(frozen=True)
class Ansatz:
    """A circuit's form; the angles are kept apart.

    Attributes:
        name: of the arrangement of gates.
        qubits: n.
        layers: of gates.
        readouts: number of expectation values: Z_0 ... Z_{n-1}, then Z_i Z_j, i < j, in lexical order. 0: n;
            ALL_READOUTS: n (n + 1) / 2, whatever n is.
        constant: psi = (x / ||x||, 1) / sqrt(2) in place of x / ||x||: z then has terms that are linear in x,
            whose sign a quadratic form alone cannot see. For x = 0, psi = (0, 1).
        length: z is multiplied by ||x|| / sqrt(width of x), which an embedding of norm 1 does not keep.

    Raises:
        ValueError: for an unknown name, or sizes out of range.
    """

    name: str
    qubits: int
    layers: int
    readouts: int = 0
    constant: bool = False
    length: bool = False

    def __post_init__(self) -> None:
        if self.name not in ANSATZ_NAMES:
            raise ValueError(f"unknown ansatz {self.name!r}; known are: {', '.join(ANSATZ_NAMES)}")
        if not 1 <= self.qubits <= MAX_QUBITS:
            raise ValueError(f"an ansatz takes 1 to {MAX_QUBITS} qubits, not {self.qubits}")
        if self.layers < 1:
            raise ValueError(f"an ansatz takes at least one layer, not {self.layers}")
        if not ALL_READOUTS <= self.readouts <= self._most_readouts:
            raise ValueError(f"{self.qubits} qubits have 1 to {self._most_readouts} readouts, not {self.readouts}")

    @cached_property
    def rows(self) -> int:
        """Number of rows of theta, one for each layer of rotations."""
        return sum(isinstance(gate, Rotation) for gate in self.gates())

    @property
    def theta_shape(self) -> tuple[int, int]:
        """Shape of one circuit's angles: (rows, qubits)."""
        return self.rows, self.qubits

    @property
    def columns(self) -> int:
        """Number of expectation values."""
        return self._most_readouts if self.readouts == ALL_READOUTS else self.readouts or self.qubits

    @property
    def _most_readouts(self) -> int:
        return self.qubits * (self.qubits + 1) // 2

    @property
    def observables(self) -> tuple[tuple[int, ...], ...]:
        """The wires of each readout: those whose Pauli-Z are multiplied."""
        wires = range(self.qubits)
        return tuple(islice(chain(((k,) for k in wires), combinations(wires, 2)), self.columns))

    def gates(self) -> Iterator[Gate]:
        """The gates in the order in which they act; theta's rows are counted in that order."""
        return _GATES[self.name](self.qubits, self.layers)


def check_width(x: torch.Tensor, ansatz: Ansatz) -> None:
    """Refuse an x, (tokens, width), that the state cannot hold.

    Raises:
        ValueError: names both sizes.
    """
    most = 2**ansatz.qubits - ansatz.constant
    if x.shape[-1] > most:
        beside = " beside the constant" if ansatz.constant else ""
        raise ValueError(f"x is {x.shape[-1]} wide; {ansatz.qubits} qubits hold at most {most} numbers{beside}")


def check_theta(theta: torch.Tensor, ansatz: Ansatz) -> None:
    """Refuse angles that are not (circuits, rows, n).

    Raises:
        ValueError: names both shapes.
    """
    if theta.shape[1:] != ansatz.theta_shape:
        raise ValueError(f"theta has shape {tuple(theta.shape)}; (circuits, *{ansatz.theta_shape}) is needed")


def checked_index(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None
) -> torch.Tensor:
    """The arguments of ``expectation_values``, checked; the index, every circuit for every token where it is None.

    Raises:
        ValueError: if x is wider than the state, or theta's shape is not the ansatz's.
        IndexError: if index names a circuit that is not there.
    """
    check_width(x, ansatz)
    check_theta(theta, ansatz)
    count = theta.shape[0]
    if index is None:
        return torch.arange(count, device=x.device).expand(x.shape[0], -1)
    if index.numel() and int(index.max()) >= count:
        raise IndexError(f"index names circuit {int(index.max())}; there are {count}, counted from 0")
    return index


def _ring(qubits: int, reach: int = 1) -> Iterator[Cnots]:
    """CNOTs from each qubit k to k + reach, around the end; nothing to entangle on one qubit."""
    if qubits > 1:
        yield Cnots(tuple((k, (k + reach) % qubits) for k in range(qubits)))


def _ry_ring(qubits: int, layers: int) -> Iterator[Gate]:
    for layer in range(layers):
        yield Rotation("Y", layer)
        yield from _ring(qubits)


def _ryrz_ring_ry(qubits: int, layers: int) -> Iterator[Gate]:
    for layer in range(layers):
        yield Rotation("Y", 2 * layer)
        yield Rotation("Z", 2 * layer + 1)
        yield from _ring(qubits)
    # Without a closing RY the last RZ would only change phases, which Pauli-Z does not see.
    yield Rotation("Y", 2 * layers)


def _strongly_entangling(qubits: int, layers: int) -> Iterator[Gate]:
    """PennyLane's StronglyEntanglingLayers: Rot(phi, theta, omega) on each qubit, then a ring whose reach
    grows by one a layer (arXiv:1804.00633)."""
    for layer in range(layers):
        yield Rotation("Z", 3 * layer)
        yield Rotation("Y", 3 * layer + 1)
        yield Rotation("Z", 3 * layer + 2)
        yield from _ring(qubits, reach=layer % max(qubits - 1, 1) + 1)


_GATES = {
    "ryrz_ring_ry": _ryrz_ring_ry,
    "ry_ring": _ry_ring,
    "strongly_entangling": _strongly_entangling,
}

#: The names an adapter's config may give; the first is the default.
ANSATZ_NAMES = tuple(_GATES)
