"""The steps of an ansatz, run one by one, give what its gates give."""

from __future__ import annotations

import math

import pytest
import torch
from circuits_support import fresh_generator, random_theta, random_x

from qaa_serve.circuits import ANSATZ_NAMES, Ansatz, get_backend
from qaa_serve.circuits.schedule import schedule, sources


def turned(state: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RY on every qubit."""
    for wire, angle in enumerate(angles.tolist()):
        c, s = math.cos(angle / 2), math.sin(angle / 2)
        block = state.view(2**wire, 2, -1)
        state = torch.stack([c * block[:, 0] - s * block[:, 1], s * block[:, 0] + c * block[:, 1]], 1).flatten()
    return state


def phased(state: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RZ on every qubit."""
    for wire, angle in enumerate(angles.tolist()):
        phase = torch.tensor([-angle / 2, angle / 2], dtype=torch.float64)
        state = (state.view(2**wire, 2, -1) * torch.polar(torch.ones_like(phase), phase)[:, None]).flatten()
    return state


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize(("qubits", "layers", "readouts"), [(1, 1, 0), (2, 3, 3), (4, 2, 10), (5, 5, 0)])
def test_the_steps_are_the_gates(name: str, qubits: int, layers: int, readouts: int) -> None:
    generator = fresh_generator()
    ansatz = Ansatz(name, qubits, layers, readouts)
    theta, x = random_theta(generator, 1, ansatz), random_x(generator, 1, 2**qubits)
    steps = schedule(ansatz)
    state = (x[0] / x[0].norm()).to(torch.complex128)
    if steps.first is not None:
        state = turned(state, theta[0, steps.first])
    for step in steps.steps:
        if step.phases is not None:
            state = phased(state, theta[0, step.phases])
        if step.cnots is not None:
            state = state[sources(step.cnots, qubits)]
        if step.turns is not None:
            state = turned(state, theta[0, step.turns])
    signs = [[(-1) ** (j & mask).bit_count() for j in range(2**qubits)] for mask in steps.masks]
    z = torch.tensor(signs, dtype=torch.float64) @ state.abs().square()
    expected = get_backend("reference")(x, theta, ansatz, None)[0, 0]
    torch.testing.assert_close(z, expected.double(), rtol=0, atol=1e-9)
