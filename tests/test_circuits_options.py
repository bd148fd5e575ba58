"""What a circuit embeds and reads out beside the default: backends and training's gradients against PennyLane."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuits_support import (
    OPTIONS,
    TOLERANCE,
    TRAITS,
    Backend,
    assert_close,
    assert_gradients_close,
    fresh_generator,
    judge,
    open_backend,
    popularity_index,
    random_theta,
    random_x,
)

from qaa_serve.circuits import ANSATZ_NAMES, Ansatz, adjoint, qubits_for

QUBITS = 4


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


@pytest.fixture(params=TRAITS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return open_backend(request.param)


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OPTIONS[request.param]


@pytest.fixture(params=ANSATZ_NAMES)
def ansatz(request: pytest.FixtureRequest, options: dict[str, Any]) -> Ansatz:
    return Ansatz(request.param, QUBITS, 2, **options)


@pytest.mark.parametrize(("width", "dtype"), [(9, torch.float64), (15, torch.bfloat16)])
def test_agrees_with_pennylane(
    backend: Backend, ansatz: Ansatz, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = random_x(generator, 6, width, dtype)
    x[2] = 0
    x[3] *= 3e-20
    x[4] *= 1e3
    theta = random_theta(generator, 3, ansatz, backend.precision(x))
    found, expected = backend(x, theta, ansatz), judge(x, theta, ansatz)
    size = x.double().norm(dim=-1)[:, None, None].clamp(min=1) if ansatz.length else 1
    assert found.dtype == backend.precision(x)
    assert_close(found / size, expected / size, backend.tolerance(x))


def test_mixed_batch(backend: Backend, ansatz: Ansatz, generator: torch.Generator) -> None:
    x = random_x(generator, 6, 13, torch.float32)
    theta = random_theta(generator, 4, ansatz, torch.float32)
    index = popularity_index("distinct", 6, 4, generator, readouts=2)
    index[1:3] = torch.tensor([[-1, 0], [-1, -1]])
    assert_close(backend(x, theta, ansatz, index), judge(x, theta, ansatz, index), 4 * backend.tolerance(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients(backend: Backend, ansatz: Ansatz, dtype: torch.dtype, generator: torch.Generator) -> None:
    if not backend.traits.differentiable:
        pytest.skip(f"backend {backend.name!r} has no gradients")
    x = torch.nn.functional.normalize(random_x(generator, 5, 13, dtype)) * 13**0.5  # a length of 1
    assert_gradients_close(backend, x, random_theta(generator, 2, ansatz, dtype), ansatz)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_training(ansatz: Ansatz, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.nn.functional.normalize(random_x(generator, 5, 13, dtype)) * 13**0.5

    def function(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: None = None) -> torch.Tensor:
        return adjoint.expectation_values(x, theta, ansatz)

    assert_gradients_close(function, x, random_theta(generator, 2, ansatz, dtype), ansatz)


def test_gradients_of_training_by_finite_differences(ansatz: Ansatz, generator: torch.Generator) -> None:
    x = random_x(generator, 3, 13).requires_grad_()
    theta = random_theta(generator, 2, ansatz).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, theta: adjoint.expectation_values(x, theta, ansatz), (x, theta))


def test_zero_rows_have_no_gradient_in_x(ansatz: Ansatz, generator: torch.Generator) -> None:
    x = random_x(generator, 3, 13)
    x[1] = 0
    x.requires_grad_()
    z = adjoint.expectation_values(x, random_theta(generator, 2, ansatz), ansatz)
    (dx,) = torch.autograd.grad(z.sum(), x)
    assert torch.isfinite(dx).all()
    assert (dx[1] == 0).all()
    assert (dx[0] != 0).any()


def test_constant_sees_the_sign_of_x_and_length_its_size(generator: torch.Generator) -> None:
    """What the options are for; without them z is the same for x, -x and 2 x."""
    theta = random_theta(generator, 1, Ansatz("ryrz_ring_ry", QUBITS, 2))
    x = random_x(generator, 1, 13)
    for options, sign_seen, size_seen in (
        ({}, False, False),
        ({"constant": True}, True, False),
        ({"length": True}, False, True),
    ):
        form = Ansatz("ryrz_ring_ry", QUBITS, 2, **options)
        z = [adjoint.expectation_values(factor * x, theta, form) for factor in (1, -1, 2)]
        assert (not torch.allclose(z[0], z[1], atol=TOLERANCE[torch.float64])) is sign_seen
        assert (not torch.allclose(z[0], z[2], atol=TOLERANCE[torch.float64])) is size_seen


def test_readouts_are_single_qubits_and_then_pairs() -> None:
    assert Ansatz("ry_ring", 3, 1).observables == ((0,), (1,), (2,))
    assert Ansatz("ry_ring", 3, 1, readouts=2).observables == ((0,), (1,))
    assert Ansatz("ry_ring", 3, 1, readouts=6).observables == ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2))
    for readouts in (-2, 7):
        with pytest.raises(ValueError, match=f"3 qubits have 1 to 6 readouts, not {readouts}"):
            Ansatz("ry_ring", 3, 1, readouts=readouts)


def test_a_constant_takes_one_amplitude(backend: Backend) -> None:
    assert [qubits_for(width, constant=True) for width in (2, 3, 4, 15, 16, 128)] == [2, 2, 3, 4, 5, 8]
    form = Ansatz("ry_ring", 3, 1, constant=True)
    backend(torch.ones(1, 7), torch.zeros(1, *form.theta_shape), form)
    with pytest.raises(ValueError, match="x is 8 wide; 3 qubits hold at most 7 numbers beside the constant"):
        backend(torch.ones(1, 8), torch.zeros(1, *form.theta_shape), form)
    with pytest.raises(ValueError, match="widths from 2 to 65535 can"):
        qubits_for(2**16, constant=True)
