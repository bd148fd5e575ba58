"""The steps of an ansatz, run one by one, give what its gates give."""

from __future__ import annotations

import math

import pytest
import torch
from circuits_support import fresh_generator, random_theta, random_x

from qaa_serve.circuits import ANSATZ_NAMES, Ansatz, get_backend
from qaa_serve.circuits.schedule import Step, index_masks, readout_signs, schedule, sources


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
    assert steps.all_steps[-1].turns is not None
    state = (x[0] / x[0].norm()).to(torch.complex128)
    for step in steps.all_steps:
        if step.phases is not None:
            state = phased(state, theta[0, step.phases])
        if step.cnots is not None:
            state = state[sources(step.cnots, qubits)]
        if step.turns is not None:
            state = turned(state, theta[0, step.turns])
    expected = get_backend("reference")(x, theta, ansatz, None)[0, 0]
    probabilities = state.abs().square()
    z = probabilities @ signs_of(steps.masks, qubits)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(readout_signs(ansatz).double(), signs_of(steps.masks, qubits))
    if steps.closing is not None:  # in place of the masks
        probabilities = probabilities[sources(steps.closing, qubits)]
    z = probabilities @ signs_of(index_masks(ansatz), qubits)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-9)


def signs_of(masks: tuple[int, ...], qubits: int) -> torch.Tensor:
    """(2**n, columns) float64, by the definition."""
    signs = [[(-1.0) ** (j & mask).bit_count() for mask in masks] for j in range(2**qubits)]
    return torch.tensor(signs, dtype=torch.float64)


def test_the_first_layer_is_a_step_of_all_steps() -> None:
    steps = schedule(Ansatz("ryrz_ring_ry", 3, 2))
    assert steps.first == 0
    assert steps.all_steps == (Step(turns=0), *steps.steps)
    phases_first = schedule(Ansatz("strongly_entangling", 3, 2))
    assert phases_first.first is None
    assert phases_first.all_steps == phases_first.steps
