"""What only the torch backend has: layers of fused gates, which the server keeps for each adapter; gradcheck."""

from __future__ import annotations

import pytest
import torch
from circuits_support import (
    TOLERANCE,
    assert_close,
    fresh_generator,
    random_theta,
    random_x,
    width_for,
)

from qaa_serve.circuits import ANSATZ_NAMES, Ansatz
from qaa_serve.circuits.embedding import embed
from qaa_serve.circuits.torch_batched import expectation_values, fuse

DOUBLE, SINGLE = TOLERANCE[torch.float64], TOLERANCE[torch.float32]


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


@pytest.fixture(params=ANSATZ_NAMES)
def ansatz(request: pytest.FixtureRequest) -> Ansatz:
    return Ansatz(request.param, 4, 2)


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [1, 2, 3])
def test_gradcheck(qubits: int, name: str, generator: torch.Generator) -> None:
    form = Ansatz(name, qubits, 2)
    x = random_x(generator, 2, width_for(qubits)).requires_grad_()
    theta = random_theta(generator, 2, form).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, theta: expectation_values(x, theta, form), (x, theta))


@pytest.mark.parametrize("index", [[[0, 1], [-1, 2], [1, -1]], [[0], [0], [2]]], ids=["apart", "grouped"])
def test_gradcheck_of_mixed_batches(index: list[list[int]], generator: torch.Generator) -> None:
    form, rows = Ansatz("ryrz_ring_ry", 2, 1), torch.tensor(index)
    x = random_x(generator, 3, 3).requires_grad_()
    theta = random_theta(generator, 3, form).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, theta: expectation_values(x, theta, form, rows), (x, theta))


# ---------------------------------------------------------------------------------------------- embedding


def test_embedding_pads_and_normalises(generator: torch.Generator) -> None:
    x = random_x(generator, 3, 5)
    psi = embed(x, Ansatz("ry_ring", 3, 1))
    assert_close(psi[:, :5], x / x.norm(dim=-1, keepdim=True), DOUBLE)
    assert (psi[:, 5:] == 0).all()


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_embedding_of_any_finite_float32_has_norm_one(size: float, generator: torch.Generator) -> None:
    x = random_x(generator, 3, 5, torch.float32).sign() * size
    assert_close(embed(x, Ansatz("ry_ring", 3, 1)).norm(dim=-1), torch.ones(3), SINGLE)


def test_embedding_keeps_a_zero_row_zero() -> None:
    assert (embed(torch.zeros(2, 5), Ansatz("ry_ring", 3, 1)) == 0).all()


# ------------------------------------------------------------------------------------------- fused circuits


def test_fused_matrices_are_orthogonal_and_phases_have_length_one(
    ansatz: Ansatz, generator: torch.Generator
) -> None:
    for circuit in fuse(random_theta(generator, 2, ansatz), ansatz):
        for layer in circuit:
            for matrix in (layer.high, layer.low):
                assert_close(matrix @ matrix.mT, torch.eye(len(matrix), dtype=torch.float64), DOUBLE)
            if layer.phase is not None:
                assert_close(layer.phase.abs(), torch.ones(16, 1), DOUBLE)


def test_a_layer_and_its_inverse_leave_a_state_as_it_was(ansatz: Ansatz, generator: torch.Generator) -> None:
    (circuit,) = fuse(random_theta(generator, 1, ansatz), ansatz)
    real, parts = random_x(generator, 16, 3), random_x(generator, 16, 6)
    for layer in circuit:
        psi = real if layer.plan.is_real else parts
        through = layer.rotate(layer.permute(psi.clone()))
        assert_close(layer.unpermute(layer.unrotate(through)), psi, 10 * DOUBLE)


def test_a_real_circuit_stores_no_phases(generator: torch.Generator) -> None:
    form = Ansatz("ry_ring", 4, 3)
    (circuit,) = fuse(random_theta(generator, 1, form), form)
    assert [layer.phase for layer in circuit] == [None, None, None]
    mixed = Ansatz("ryrz_ring_ry", 4, 2)
    assert fuse(random_theta(generator, 1, mixed), mixed)[0][0].phase is None


def test_no_angles_are_no_circuits(ansatz: Ansatz, generator: torch.Generator) -> None:
    assert fuse(random_theta(generator, 0, ansatz), ansatz) == []
