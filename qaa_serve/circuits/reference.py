"""The circuit read gate by gate, in complex128: slow, short, and what every other backend must agree with."""

from __future__ import annotations

import torch

from qaa_serve.circuits.ansatz import Ansatz, Cnots, Rotation, checked_index


def missing(device: torch.device) -> str | None:
    """Why it cannot run on such a device."""
    return None if device.type == "cpu" else "it computes on a CPU"


def expectation_values(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None = None
) -> torch.Tensor:
    """Pauli-Z expectation values of a batch of circuits, by the definition.

    psi = pad(x, 2**n) / ||x||,  z_k = <psi| U(theta)^dagger Z_k U(theta) |psi>;  x = 0 gives z = 0. ``Ansatz`` has
    the options: a constant in psi, z times the length of x, products of two Z.

    Args:
        x: (tokens, width), real; width at most 2**n.
        theta: (circuits, rows, n) angles.
        ansatz: the form all the circuits share.
        index: (tokens, readouts) integers: which circuit each readout of a token uses, -1 for none (z = 0).
            None stands for every circuit on every token.

    Returns:
        (tokens, readouts, ansatz.columns) float64. Differentiable in x and theta.

    Raises:
        ValueError: if x is wider than the state, or theta's shape is not the ansatz's.
        IndexError: if index names a circuit that is not there.
    """
    index = checked_index(x, theta, ansatz, index)
    z = torch.zeros(*index.shape, ansatz.columns, dtype=torch.float64)
    for circuit in range(theta.shape[0]):
        token, readout = (index == circuit).nonzero(as_tuple=True)
        if len(token):
            z = z.index_put((token, readout), _one_circuit(x[token], theta[circuit], ansatz))
    return z


def _one_circuit(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """One circuit on some tokens: (tokens, width), (rows, n) -> (tokens, ansatz.columns)."""
    n = ansatz.qubits
    x, theta = x.double(), theta.double()
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    psi = x / torch.where(norm > 0, norm, 1)
    if ansatz.constant:
        psi = torch.cat([psi, torch.ones_like(norm)], dim=1)
        psi = psi / torch.linalg.vector_norm(psi, dim=1, keepdim=True)
    psi = torch.nn.functional.pad(psi, (0, 2**n - psi.shape[1]))
    psi = psi.T.reshape(*(2,) * n, -1).to(torch.complex128)  # axis k is wire k, the last one the token
    for gate in ansatz.gates():
        if isinstance(gate, Rotation):
            for wire in range(n):
                angle = theta[gate.row, wire] / 2
                matrix = _ry(angle) if gate.axis == "Y" else _rz(angle)
                psi = torch.tensordot(matrix, psi, dims=([1], [wire])).movedim(0, wire)
        else:
            psi = _apply_cnots(psi, gate)
    probabilities = psi.abs() ** 2
    z = []
    for wires in ansatz.observables:
        signed = probabilities
        for wire in wires:  # the wires' signs are multiplied; each takes its axis along
            signed = signed * torch.tensor([1.0, -1.0]).reshape(2, *(1,) * (n - wire))
        z.append(signed.reshape(-1, len(x)).sum(0))
    result = torch.stack(z, dim=1)
    return result * norm / x.shape[1] ** 0.5 if ansatz.length else result


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
