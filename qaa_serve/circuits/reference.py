"""The circuit read gate by gate, in complex128: slow, short, and what every other backend must agree with."""

from __future__ import annotations

import torch

from qaa_serve.circuits.ansatz import Ansatz, Cnots, Rotation


def expectation_values(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None = None
) -> torch.Tensor:
    """Pauli-Z expectation values of a batch of circuits, by the definition.

    psi = pad(x, 2**n) / ||x||,  z_k = <psi| U(theta)^dagger Z_k U(theta) |psi>;  x = 0 gives z = 0.

    Args:
        x: (tokens, width), real; width at most 2**n.
        theta: (circuits, rows, n) angles.
        ansatz: the form all the circuits share.
        index: (tokens, readouts) integers: which circuit each readout of a token uses, -1 for none (z = 0).
            None stands for every circuit on every token.

    Returns:
        (tokens, readouts, n) float64. Differentiable in x and theta.

    Raises:
        ValueError: if x is wider than the state, or theta's shape is not the ansatz's.
    """
    if x.shape[1] > 2**ansatz.qubits:
        raise ValueError(f"x is {x.shape[1]} wide; {ansatz.qubits} qubits hold at most {2**ansatz.qubits} numbers")
    if theta.shape[1:] != ansatz.theta_shape:
        raise ValueError(f"theta has shape {tuple(theta.shape)}; (circuits, *{ansatz.theta_shape}) is needed")
    if index is None:
        index = torch.arange(theta.shape[0]).expand(x.shape[0], -1)
    z = [
        [
            _one_circuit(x[token], theta[circuit], ansatz) if circuit >= 0 else x.new_zeros(ansatz.qubits).double()
            for circuit in circuits
        ]
        for token, circuits in enumerate(index.tolist())
    ]
    if not z or not z[0]:
        return torch.zeros(*index.shape, ansatz.qubits, dtype=torch.float64)
    return torch.stack([torch.stack(row) for row in z])


def _one_circuit(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    n = ansatz.qubits
    x, theta = x.double(), theta.double()
    norm = torch.linalg.vector_norm(x)
    if norm == 0:
        return torch.zeros(n, dtype=torch.float64)
    psi = torch.nn.functional.pad(x / norm, (0, 2**n - x.shape[0])).to(torch.complex128)
    psi = psi.reshape((2,) * n)  # axis k is wire k
    for gate in ansatz.gates():
        if isinstance(gate, Rotation):
            for wire in range(n):
                angle = theta[gate.row, wire] / 2
                matrix = _ry(angle) if gate.axis == "Y" else _rz(angle)
                psi = torch.tensordot(matrix, psi, dims=([1], [wire])).movedim(0, wire)
        else:
            psi = _apply_cnots(psi, gate)
    probabilities = psi.abs() ** 2
    return torch.stack(
        [probabilities.select(wire, 0).sum() - probabilities.select(wire, 1).sum() for wire in range(n)]
    )


def _ry(half_angle: torch.Tensor) -> torch.Tensor:
    c, s = torch.cos(half_angle), torch.sin(half_angle)
    return torch.stack([torch.stack([c, -s]), torch.stack([s, c])]).to(torch.complex128)


def _rz(half_angle: torch.Tensor) -> torch.Tensor:
    return torch.diag(torch.exp(torch.stack([-1j * half_angle, 1j * half_angle])))


def _apply_cnots(psi: torch.Tensor, gate: Cnots) -> torch.Tensor:
    for control, target in gate.pairs:
        off, on = psi.select(control, 0), psi.select(control, 1)
        # select() removed the control's axis, so the wires behind it moved up by one.
        on = on.flip(target - (target > control))
        psi = torch.stack([off, on], dim=control)
    return psi
