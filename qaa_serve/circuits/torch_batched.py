"""Circuits in plain torch, on any device, in float32 or float64, differentiable: the backend that runs everywhere.

Three identities turn the small gates of a schedule into a few large operations:

- The RY gates of half of the qubits are one real 2**(n/2) x 2**(n/2) matrix, their Kronecker product.
- The RZ gates of a step are one diagonal of phases; CNOTs permute amplitudes. A diagonal moves through a
  permutation, so that all that lies between two RY layers is one gather and one diagonal.
- The readout is one product of the probabilities with a table of signs.

A state is (2**n, columns): a column a token, and from the first RZ on two, real and imaginary part side by side. A
permutation moves whole rows, a phase multiplies one, and all columns pass a real matrix together. The state stays
real up to the first diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from qaa_serve.circuits.ansatz import Ansatz, check_theta, checked_index
from qaa_serve.circuits.embedding import embed, lengths
from qaa_serve.circuits.schedule import readout_signs, schedule, sources, z_signs

#: Amplitudes of the tokens computed together, by device: few enough for a CPU's caches (a state of 2**17 takes
#: 1 MiB, and half or twice as many are slower), enough to fill a GPU. They bound the memory in use meanwhile.
BLOCK = {"cpu": 2**17}
_BLOCK_ELSEWHERE = 2**23


@dataclass(frozen=True)
class LayerPlan:
    """The steps that make up one layer: psi[j] <- phase[j] * psi[gather[j]], then RY on every qubit.

    Attributes:
        gather: (2**n,) int64; None: as it is.
        ungather: the inverse permutation.
        phases: rows of theta with what their angles count for, (2**n, n) signs.
        turns: the row of theta that RY turns by.
        is_real: whether the state is, before.
    """

    gather: torch.Tensor | None
    ungather: torch.Tensor | None
    phases: tuple[tuple[int, torch.Tensor], ...]
    turns: int
    is_real: bool


@lru_cache(maxsize=256)
def plan_layers(ansatz: Ansatz, device: torch.device) -> tuple[tuple[LayerPlan, ...], torch.Tensor]:
    """The layers of a schedule, and the signs of its readout, (2**n, columns)."""
    n = ansatz.qubits
    basis, signs = torch.arange(2**n), z_signs(n)
    layers: list[LayerPlan] = []
    gather, phases, is_real = basis, list[tuple[int, torch.Tensor]](), True
    for step in schedule(ansatz).all_steps:
        if step.phases is not None:
            phases.append((step.phases, signs))
        if step.cnots is not None:
            moved = sources(step.cnots, n)
            gather, phases = gather[moved], [(row, table[moved]) for row, table in phases]
        if step.turns is not None:
            there, back = (None, None) if gather is basis else (gather.to(device), gather.argsort().to(device))
            tables = tuple((row, table.to(device)) for row, table in phases)
            layers.append(LayerPlan(there, back, tables, step.turns, is_real))
            gather, phases, is_real = basis, [], is_real and not phases
    return tuple(layers), readout_signs(ansatz).to(device)


@dataclass(frozen=True)
class Layer:
    """A layer with the angles of one circuit.

    Attributes:
        plan: what the circuits of a form share.
        high: (2**h, 2**h) RY on wires 0 to h - 1, with h = n // 2.
        low: (2**(n-h), 2**(n-h)) RY on the others.
        phase: (2**n, 1) complex; None where there is no RZ.
    """

    plan: LayerPlan
    high: torch.Tensor
    low: torch.Tensor
    phase: torch.Tensor | None

    def permute(self, psi: torch.Tensor) -> torch.Tensor:
        """What lies before the RY gates. A complex state that is not permuted is changed in place."""
        if self.plan.gather is not None:
            psi = psi.index_select(0, self.plan.gather)
        if self.phase is None:
            return psi
        if self.plan.is_real:
            return torch.view_as_real(psi * self.phase).flatten(1)
        as_complex(psi).mul_(self.phase)
        return psi

    def unpermute(self, lam: torch.Tensor) -> torch.Tensor:
        """The inverse of ``permute``, in place too; to a state that was real only the real part matters."""
        if self.phase is not None:
            turned = as_complex(lam).mul_(self.phase.conj())
            lam = turned.real.contiguous() if self.plan.is_real else lam
        return lam if self.plan.ungather is None else lam.index_select(0, self.plan.ungather)

    def rotate(self, psi: torch.Tensor) -> torch.Tensor:
        """The RY gates."""
        return self._rotate(psi, self.high, self.low)

    def unrotate(self, lam: torch.Tensor) -> torch.Tensor:
        """The inverse of ``rotate``."""
        return self._rotate(lam, self.high.T, self.low.T)

    def _rotate(self, psi: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        block = torch.bmm(low.expand(len(high), -1, -1), self.by_wires(psi))
        return (high @ block.flatten(1)).reshape(psi.shape)

    def by_wires(self, psi: torch.Tensor) -> torch.Tensor:
        """(2**n, columns) -> (2**h, 2**(n-h), columns)."""
        return psi.reshape(len(self.high), len(self.low), -1)

    @property
    def nbytes(self) -> int:
        """Bytes of what the circuit does not share."""
        return sum(t.nbytes for t in (self.high, self.low, self.phase) if t is not None)


def as_complex(psi: torch.Tensor) -> torch.Tensor:
    """(2**n, 2 * tokens), contiguous -> (2**n, tokens), a view."""
    return torch.view_as_complex(psi.reshape(len(psi), -1, 2))


def fuse(theta: torch.Tensor, ansatz: Ansatz) -> list[list[Layer]]:
    """The layers of circuits, made once from their angles. Differentiable in theta.

    Args:
        theta: (circuits, rows, n), float32 or float64.
        ansatz: the form they share.

    Raises:
        ValueError: if theta's shape is not the ansatz's.
    """
    check_theta(theta, ansatz)
    plans, _ = plan_layers(ansatz, theta.device)
    half = ansatz.qubits // 2
    angles = theta[:, [plan.turns for plan in plans]] / 2  # (circuits, layers, n)
    matrices = zip(_kron_ry(angles[..., :half]).unbind(1), _kron_ry(angles[..., half:]).unbind(1), strict=True)
    circuits: list[list[Layer]] = [[] for _ in theta]
    for plan, (high, low) in zip(plans, matrices, strict=True):
        phase: torch.Tensor | None = None
        if plan.phases:
            # RZ(t) = diag(exp(-i t / 2), exp(i t / 2)): the angle's sign is minus that of Pauli-Z.
            turns = [theta[:, row] @ table.to(theta.dtype).T for row, table in plan.phases]
            total = torch.stack(turns).sum(0) / -2
            phase = torch.complex(torch.cos(total), torch.sin(total)).unsqueeze(-1)
        for number, circuit in enumerate(circuits):
            circuit.append(Layer(plan, high[number], low[number], None if phase is None else phase[number]))
    return circuits


def _kron_ry(half_angles: torch.Tensor) -> torch.Tensor:
    """Kronecker product of RY(2a) over the last axis: (..., m) -> (..., 2**m, 2**m).

    RY(2a) = [[cos a, -sin a], [sin a, cos a]]: up to its sign an entry depends only on the bits in which row and
    column differ, so that 2**m products make the whole matrix.
    """
    differ, bits, sign = _kron_tables(half_angles.shape[-1], half_angles.device)
    cos, sin = torch.cos(half_angles).unsqueeze(-2), torch.sin(half_angles).unsqueeze(-2)
    products = torch.where(bits, sin, cos).prod(-1)  # (..., 2**m)
    return products[..., differ] * sign.to(products.dtype)


@lru_cache(maxsize=64)
def _kron_tables(m: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """row ^ column (2**m, 2**m); the bits of a number (2**m, m); the sign of an entry (2**m, 2**m)."""
    basis, bits = torch.arange(2**m), z_signs(m) < 0
    minuses = (~bits[:, None] & bits[None, :]).sum(-1)  # -sin: the row's bit is 0, the column's is 1
    return (basis[:, None] ^ basis).to(device), bits.to(device), (1.0 - 2.0 * (minuses % 2)).float().to(device)


def columns_of(x: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """x embedded, a column a token: (tokens, width) -> (2**n, tokens)."""
    return embed(x, ansatz).T.contiguous()


def blocks(tokens: int, ansatz: Ansatz, device: torch.device) -> Iterator[slice]:
    """The tokens that are computed together."""
    step = max(1, BLOCK.get(device.type, _BLOCK_ELSEWHERE) >> ansatz.qubits)
    return (slice(start, start + step) for start in range(0, tokens, step))


def run(psi: torch.Tensor, circuit: list[Layer], signs: torch.Tensor) -> torch.Tensor:
    """Expectation values of one circuit, without the factor of ``Ansatz.length``.

    Args:
        psi: (2**n, tokens) real states, one at least.
        circuit: its layers.
        signs: (2**n, columns) of the readout.

    Returns:
        (tokens, columns) of psi's dtype.
    """
    tokens = psi.shape[1]
    for layer in circuit:
        psi = layer.rotate(layer.permute(psi))
    sums = signs.to(psi.dtype).T @ psi.square()  # (columns of the readout, columns of the state)
    return sums.reshape(len(sums), tokens, -1).sum(-1).T


class TorchCircuits:
    """Circuits for serving; see ``backends.Circuits``."""

    def __init__(self, ansatz: Ansatz, count: int, device: torch.device):
        self._ansatz = ansatz
        self._device = device
        self._circuits: list[list[Layer] | None] = [None] * count

    def put(self, first: int, theta: torch.Tensor) -> None:
        """Set the angles (c, rows, n) of some circuits."""
        for number, angles in enumerate(theta.to(self._device, torch.float32), first):
            self._circuits[number] = fuse(angles[None], self._ansatz)[0]

    def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """See ``backends.Circuits``. On a GPU this waits for the device, to learn which circuits are used."""
        _, signs = plan_layers(self._ansatz, x.device)
        z = torch.zeros(*index.shape, self._ansatz.columns, device=x.device)
        psi = embed(x, self._ansatz).float()
        for number in torch.unique(index).tolist():
            if number >= 0 and (circuit := self._circuits[number]) is not None:
                token, readout = (index == number).nonzero(as_tuple=True)
                for block in blocks(len(token), self._ansatz, x.device):
                    columns = psi[token[block]].T.contiguous()
                    z[token[block], readout[block]] = run(columns, circuit, signs)
        return z * lengths(x).float()[:, None, None] if self._ansatz.length else z

    @property
    def nbytes(self) -> int:
        """Bytes of the circuits' tables."""
        return sum(layer.nbytes for circuit in self._circuits for layer in circuit or ())


def missing(device: torch.device) -> str | None:
    """Why it cannot run on such a device: it always can."""
    return None


def expectation_values(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None = None
) -> torch.Tensor:
    """Pauli-Z expectation values of a batch of circuits; the same function as ``reference``.

    Args:
        x: (tokens, width), any real floating dtype; width at most 2**n.
        theta: (circuits, rows, n).
        ansatz: the form all the circuits share.
        index: (tokens, readouts) int64, -1 for none; None: every circuit on every token.

    Returns:
        (tokens, readouts, columns) in float32 (float64 if x is). Differentiable in x and theta, any number of
        times.

    Raises:
        ValueError: if x is wider than the state, or theta's shape is not the ansatz's.
        IndexError: if index names a circuit that is not there.
    """
    index = checked_index(x, theta, ansatz, index)
    psi, (_, signs) = columns_of(x, ansatz), plan_layers(ansatz, x.device)
    z = psi.new_zeros(*index.shape, ansatz.columns)
    for number, circuit in enumerate(fuse(theta.to(psi.dtype), ansatz)):
        token, readout = (index == number).nonzero(as_tuple=True)
        if len(token):
            z = z.index_put((token, readout), run(psi[:, token], circuit, signs))
    return z * lengths(x)[:, None, None] if ansatz.length else z
