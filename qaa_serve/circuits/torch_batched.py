"""Batched circuits in plain torch, on any device, differentiable: the backend of CPU serving.

Training runs the same schedule through ``adjoint``, which keeps less for the backward pass.

Three identities turn a circuit of many small gates into a few large operations (``_schedule``):

- The RY gates of half of the qubits are one real 2**(n/2) x 2**(n/2) matrix, their Kronecker product.
- The RZ gates of a layer are one diagonal of phases; a CNOT ring permutes amplitudes. A diagonal moves
  through a permutation, so that every stretch between two RY layers is one gather and one diagonal.
- Pauli-Z sees neither phases nor where the amplitudes lie: what stands behind the last RY is a row order of
  the table of signs.

The state stays real up to the first diagonal and is then kept as real and imaginary part, since RY is real.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import pad

from qaa_serve.circuits.ansatz import Ansatz, Cnots, check_width
from qaa_serve.circuits.schedule import sources


@dataclass(frozen=True)
class _Stretch:
    """What lies between two RY layers: psi[j] <- phase[j] * psi[gather[j]], phase from rows of theta."""

    gather: torch.Tensor | None  # (2**n,) int64; None: as it is
    ungather: torch.Tensor | None  # the inverse permutation
    phases: tuple[tuple[int, torch.Tensor], ...]  # (row of theta, signs (2**n, n))
    ry_row: int  # the RY layer that follows


@dataclass(frozen=True)
class _Schedule:
    stretches: tuple[_Stretch, ...]
    readout: torch.Tensor  # (2**n, columns) signs


@lru_cache(maxsize=256)
def _schedule(ansatz: Ansatz, device: torch.device) -> _Schedule:
    n = ansatz.qubits
    basis = torch.arange(2**n)
    signs = 1.0 - 2.0 * ((basis[:, None] >> torch.arange(n - 1, -1, -1)) & 1)  # (2**n, n)
    stretches: list[_Stretch] = []
    gather = basis
    phases: list[tuple[int, torch.Tensor]] = []
    for gate in ansatz.gates():
        if isinstance(gate, Cnots):
            step = sources(gate, n)
            gather = gather[step]
            phases = [(row, table[step]) for row, table in phases]
        elif gate.axis == "Z":
            phases.append((gate.row, signs))
        else:
            moves = not torch.equal(gather, basis)
            there, back = (gather.to(device), gather.argsort().to(device)) if moves else (None, None)
            tables = tuple((row, table.float().to(device)) for row, table in phases)
            stretches.append(_Stretch(there, back, tables, gate.row))
            gather, phases = basis, []
    readout = torch.empty(2**n, ansatz.columns, dtype=signs.dtype)
    readout[gather] = torch.stack([signs[:, wires].prod(-1) for wires in ansatz.observables], dim=-1)
    return _Schedule(tuple(stretches), readout.float().to(device))


@dataclass(frozen=True)
class FusedCircuits:
    """Matrices and phases of ``circuits`` circuits of one ansatz, made once from their angles.

    Attributes:
        ansatz: the form they share.
        high: for each RY layer (circuits, 2**h, 2**h): wires 0..h-1, with h = n // 2.
        low: for each RY layer (circuits, 2**(n-h), 2**(n-h)): the other wires.
        phase: for each stretch with RZ gates (circuits, 2, 2**n): cosine and sine; else None.
    """

    ansatz: Ansatz
    high: tuple[torch.Tensor, ...]
    low: tuple[torch.Tensor, ...]
    phase: tuple[torch.Tensor | None, ...]

    def tensors(self) -> list[torch.Tensor]:
        """All tensors, each with the circuits on its first axis, in a fixed order."""
        return [t for t in (*self.high, *self.low, *self.phase) if t is not None]

    def select(self, circuits: torch.Tensor) -> FusedCircuits:
        """The circuits of those numbers (int64, 1-D), repeats allowed."""
        return FusedCircuits(
            self.ansatz,
            tuple(t.index_select(0, circuits) for t in self.high),
            tuple(t.index_select(0, circuits) for t in self.low),
            tuple(t if t is None else t.index_select(0, circuits) for t in self.phase),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors())


def fuse(theta: torch.Tensor, ansatz: Ansatz) -> FusedCircuits:
    """Build the fused form of circuits from their angles. Differentiable in theta.

    Args:
        theta: (circuits, rows, n), float32 or float64.
        ansatz: the form they share.

    Raises:
        ValueError: if theta's shape is not the ansatz's.
    """
    if theta.shape[1:] != ansatz.theta_shape:
        raise ValueError(f"theta has shape {tuple(theta.shape)}; (circuits, *{ansatz.theta_shape}) is needed")
    schedule = _schedule(ansatz, theta.device)
    half = ansatz.qubits // 2
    angles = theta[:, [stretch.ry_row for stretch in schedule.stretches]] / 2  # (circuits, RY layers, n)
    high = _kron_ry(angles[..., :half]).unbind(1)
    low = _kron_ry(angles[..., half:]).unbind(1)
    phase: list[torch.Tensor | None] = []
    for stretch in schedule.stretches:
        if stretch.phases:
            # RZ(t) = diag(exp(-i t / 2), exp(i t / 2)): the angle's sign is minus that of Pauli-Z.
            turns = [theta[:, row] @ table.to(theta.dtype).T for row, table in stretch.phases]
            total = torch.stack(turns).sum(0) / -2
            phase.append(torch.stack([torch.cos(total), torch.sin(total)], dim=1))
        else:
            phase.append(None)
    return FusedCircuits(ansatz, high, low, tuple(phase))


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
    basis = torch.arange(2**m)
    bits = ((basis[:, None] >> torch.arange(m - 1, -1, -1)) & 1).bool()
    minuses = (~bits[:, None] & bits[None, :]).sum(-1)  # -sin: the row's bit is 0, the column's is 1
    return (basis[:, None] ^ basis).to(device), bits.to(device), (1.0 - 2.0 * (minuses % 2)).float().to(device)


def embed(x: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """Amplitude embedding: (tokens, width) -> (tokens, 2**n) of norm 1; without a constant a zero row stays zero.

    Computed in float32, or float64 for a float64 x. Rows are divided by their largest magnitude first, so
    that squares neither overflow nor vanish.

    Raises:
        ValueError: if ``x`` is wider than the state.
    """
    check_width(x, ansatz)
    x, peak = _scaled(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    psi = x / torch.where(peak > 0, norm, 1)
    if ansatz.constant:
        share = torch.full_like(peak, math.sqrt(0.5)).masked_fill(peak == 0, 1)
        psi = torch.cat([psi * math.sqrt(0.5), share], dim=-1)
    return pad(psi, (0, 2**ansatz.qubits - psi.shape[-1]))


def lengths(x: torch.Tensor) -> torch.Tensor:
    """||x|| / sqrt(width), what ``Ansatz.length`` multiplies z by: (tokens, width) -> (tokens,), as ``embed``."""
    x, peak = _scaled(x)
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm * peak.squeeze(-1) / math.sqrt(x.shape[-1])


def _scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x over its rows' largest magnitudes, and those: (tokens, width), (tokens, 1); zero rows stay zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    peak = x.detach().abs().amax(dim=-1, keepdim=True)
    return x / torch.where(peak > 0, peak, 1), peak


def run(psi: torch.Tensor, circuits: FusedCircuits) -> torch.Tensor:
    """Run G circuits, each on T states of its own.

    Args:
        psi: (G or 1, T, 2**n) real states; one group is shared by all the circuits.
        circuits: G circuits.

    Returns:
        (G, T, columns) expectation values of the ansatz's observables, without the factor of ``Ansatz.length``.
    """
    schedule = _schedule(circuits.ansatz, psi.device)
    groups, tokens = circuits.low[0].shape[0], psi.shape[1]
    dim = psi.shape[2]
    parts = psi.unsqueeze(0)  # (1 or 2, G or 1, T, 2**n): real part, then imaginary part
    for stretch, high, low, phase in zip(
        schedule.stretches, circuits.high, circuits.low, circuits.phase, strict=True
    ):
        if stretch.gather is not None:
            parts = parts.index_select(-1, stretch.gather)
        if phase is not None:
            parts = _multiply_phase(parts, phase)
        # rows: tokens x high wires; sizes are spelled out since -1 means nothing in an empty batch
        block = parts.reshape(*parts.shape[:2], tokens * high.shape[-1], low.shape[-1])
        block = block @ low.transpose(1, 2)
        if high.shape[-1] > 1:
            block = block.reshape(*block.shape[:2], tokens, high.shape[-1], low.shape[-1])
            block = high.unsqueeze(1) @ block
        parts = block.reshape(len(block), groups, tokens, dim)
    return parts.square().sum(0) @ schedule.readout.to(psi.dtype)


def _multiply_phase(parts: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    c, s = phase[:, 0].unsqueeze(1), phase[:, 1].unsqueeze(1)  # (G, 1, 2**n)
    if len(parts) == 1:
        return torch.stack([parts[0] * c, parts[0] * s])
    re, im = parts
    return torch.stack([re * c - im * s, re * s + im * c])


class TorchCircuits:
    """Circuits for serving; see ``backends.Circuits``."""

    def __init__(self, ansatz: Ansatz, count: int, device: torch.device):
        self._ansatz = ansatz
        self._device = device
        self._fused: list[FusedCircuits | None] = [None] * count

    def put(self, first: int, theta: torch.Tensor) -> None:
        """Set the angles (c, rows, n) of some circuits."""
        theta = theta.to(self._device, torch.float32)
        for number, angles in enumerate(theta, first):
            self._fused[number] = fuse(angles.unsqueeze(0), self._ansatz)

    def run(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """See ``backends.Circuits``. On a GPU this waits for the device, to learn which circuits are used."""
        psi = embed(x, self._ansatz).float()
        z = psi.new_zeros(*index.shape, self._ansatz.columns)
        for circuit in torch.unique(index).tolist():
            if circuit >= 0 and (fused := self._fused[circuit]) is not None:
                token, readout = (index == circuit).nonzero(as_tuple=True)
                z[token, readout] = run(psi[token].unsqueeze(0), fused)[0]
        return z * lengths(x).float()[:, None, None] if self._ansatz.length else z

    @property
    def nbytes(self) -> int:
        """Bytes of the circuits' tables."""
        return sum(fused.nbytes for fused in self._fused if fused is not None)

    @classmethod
    def compile(cls, *_: object) -> None:
        """Nothing is compiled."""


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
        (tokens, readouts, columns) in float32 (float64 if x is). Differentiable in x and theta.
    """
    z = _expectation_values(x, theta, ansatz, index)
    return z * lengths(x)[:, None, None] if ansatz.length else z


def _expectation_values(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None
) -> torch.Tensor:
    psi = embed(x, ansatz)
    fused = fuse(theta.to(psi.dtype), ansatz)
    if index is None:
        return run(psi.unsqueeze(0), fused).transpose(0, 1)
    z = psi.new_zeros(*index.shape, ansatz.columns)
    used, counts = torch.unique(index[index >= 0], return_counts=True)
    if 2 * len(used) > int(counts.sum()):  # hardly two rows share a circuit: one batch, a circuit a row
        token, readout = (index >= 0).nonzero(as_tuple=True)
        rows = run(psi[token].unsqueeze(1), fused.select(index[token, readout]))
        return z.index_put((token, readout), rows.squeeze(1))
    for circuit in used:
        token, readout = (index == circuit).nonzero(as_tuple=True)
        rows = run(psi[token].unsqueeze(0), fused.select(circuit.unsqueeze(0)))
        z = z.index_put((token, readout), rows.squeeze(0))
    return z
