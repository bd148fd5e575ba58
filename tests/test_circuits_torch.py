"""What only the torch backend has: fused circuits, which the server keeps for each adapter; gradcheck."""

from __future__ import annotations

import pytest
import torch
from circuits_support import (
    TOLERANCE,
    assert_close,
    fresh_generator,
    judge,
    random_theta,
    random_x,
    width_for,
)

from qaa_serve.circuits import ANSATZ_NAMES, Ansatz
from qaa_serve.circuits.torch_batched import embed, expectation_values, fuse, run

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


def test_select_with_repeats_equals_separate_runs(ansatz: Ansatz, generator: torch.Generator) -> None:
    theta = random_theta(generator, 3, ansatz)
    psi = embed(random_x(generator, 5, 13), Ansatz("ry_ring", 4, 1))
    order = torch.tensor([2, 0, 2, 2, 1])
    together = run(psi.unsqueeze(0), fuse(theta, ansatz).select(order))
    apart = [run(psi.unsqueeze(0), fuse(theta[k : k + 1], ansatz))[0] for k in order]
    assert_close(together, torch.stack(apart), DOUBLE)


def test_each_circuit_may_have_states_of_its_own(ansatz: Ansatz, generator: torch.Generator) -> None:
    theta = random_theta(generator, 3, ansatz)
    x = random_x(generator, 6, 13)
    z = run(embed(x, ansatz).reshape(3, 2, 16), fuse(theta, ansatz))
    index = torch.tensor([[0], [0], [1], [1], [2], [2]])
    assert_close(z.reshape(6, 1, 4), judge(x, theta, ansatz, index), DOUBLE)


def test_fused_matrices_are_orthogonal_and_phases_have_length_one(
    ansatz: Ansatz, generator: torch.Generator
) -> None:
    fused = fuse(random_theta(generator, 2, ansatz), ansatz)
    for matrix in (*fused.high, *fused.low):
        one = torch.eye(matrix.shape[-1], dtype=torch.float64).expand(2, -1, -1)
        assert_close(matrix @ matrix.mT, one, DOUBLE)
    for phase in fused.phase:
        if phase is not None:
            assert_close(phase.square().sum(1), torch.ones(2, 16), DOUBLE)


def test_a_real_circuit_stores_no_phases(generator: torch.Generator) -> None:
    form = Ansatz("ry_ring", 4, 3)
    assert fuse(random_theta(generator, 1, form), form).phase == (None, None, None)
    mixed = Ansatz("ryrz_ring_ry", 4, 2)
    assert fuse(random_theta(generator, 1, mixed), mixed).phase[0] is None


@pytest.mark.parametrize(("groups", "tokens"), [(0, 3), (2, 0), (0, 0)])
def test_running_nothing_gives_nothing(
    ansatz: Ansatz, groups: int, tokens: int, generator: torch.Generator
) -> None:
    fused = fuse(random_theta(generator, groups, ansatz, torch.float32), ansatz)
    assert run(torch.zeros(1, tokens, 16), fused).shape == (groups, tokens, 4)
