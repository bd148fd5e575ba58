"""Training by Triton: gradients as the reference has them, sums that do not depend on chance, and launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import triton_interpreter
from circuits_support import (
    OPTIONS,
    TOLERANCE,
    assert_close,
    fresh_generator,
    random_theta,
    random_x,
    width_for,
)

from qaa_serve.circuits import ANSATZ_NAMES, Ansatz, backends, get_backend, torch_adjoint
from qaa_serve.circuits.triton import host, training

pytest.importorskip("triton", reason="the triton backend needs triton")

SINGLE = torch.float32
Passes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


# -------------------------------------------------------------------------------------- what runs elsewhere


def both_passes(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, dz: torch.Tensor, programs: int | None = None
) -> Passes:
    """z, dL/dx and dL/dtheta; each head's tokens are shared over so many programs; None: as on a Hopper."""
    warps, registers, resident = training._SHAPES.get(ansatz.qubits, (1, None, 16))
    few = {ansatz.qubits: (warps, registers, programs * len(theta) if programs else resident)}
    multiprocessors = mock.patch.object(host, "multiprocessors", return_value=1 if programs else 132)
    with multiprocessors, mock.patch.dict(training._SHAPES, few):
        return training.forward(x, theta, ansatz), *training.backward(x, theta, ansatz, dz)


def tables(theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """The tables that a launch makes, (heads, floats)."""
    form, record, _ = training._make_record(theta, ansatz)
    begin, floats = form.layout.tables_at, host.plan_table(ansatz).floats
    return record.view(torch.float32)[begin : begin + len(theta) * floats].reshape(len(theta), floats)


# ----------------------------------------------------------------------------------------- what is expected


def weights_for(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> torch.Tensor:
    """dL/dz, (tokens, heads, columns): of both signs, at most 1 in sum over a token."""
    shape = len(x), len(theta), ansatz.columns
    return torch.cos(torch.arange(math.prod(shape))).reshape(shape) / (shape[1] * shape[2])


def expected(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, dz: torch.Tensor) -> Passes:
    """As ``both_passes``, by autograd through the reference in complex128."""
    x, theta = x.detach().double().requires_grad_(), theta.detach().double().requires_grad_()
    z = get_backend("reference")(x, theta, ansatz, None)
    gradients = torch.autograd.grad((z * dz).sum(), (x, theta), materialize_grads=True)
    return z.detach(), *gradients


def assert_as_expected(found: Passes, x: torch.Tensor, right: Passes, factor: float = 1) -> None:
    """Errors within the tolerance; of gradients where x has length 1, and of the mean over tokens."""
    length = x.double().norm(dim=1, keepdim=True)
    for ours, theirs, scale in zip(found, right, (1, length, 1 / len(x)), strict=True):
        assert_close(ours.double() * scale, theirs * scale, factor * TOLERANCE[SINGLE])


def check(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, *options: int) -> None:
    dz = weights_for(x, theta, ansatz)
    found = triton_interpreter.call(both_passes, x, theta, ansatz, dz, *options)
    assert_as_expected(found, x, expected(x, theta, ansatz, dz))


# --------------------------------------------------------------------------------------------- with numbers


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [1, 2, 3, 5, 8])
def test_every_size_has_the_references_gradients(qubits: int, name: str, generator: torch.Generator) -> None:
    ansatz = Ansatz(name, qubits, 2)
    check(random_x(generator, 2, width_for(qubits), SINGLE), random_theta(generator, 1, ansatz, SINGLE), ansatz)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ANSATZ_NAMES)
def test_every_option_has_the_references_gradients(name: str, options: str, generator: torch.Generator) -> None:
    """Three heads, an odd depth, and three tokens for two programs."""
    ansatz = Ansatz(name, 4, 3, **OPTIONS[options])  # type: ignore[arg-type]
    check(random_x(generator, 3, 13, SINGLE), random_theta(generator, 3, ansatz, SINGLE), ansatz, 2)


@pytest.mark.parametrize("name", ["ry_ring", "strongly_entangling"])
def test_deep_circuits_neither_overflow_nor_lose_precision(name: str, generator: torch.Generator) -> None:
    """Angles of a quarter turn make the states grow most, forward and backward."""
    ansatz = Ansatz(name, 7, 14)
    x, theta = random_x(generator, 1, 100, SINGLE), random_theta(generator, 2, ansatz, SINGLE)
    theta[0] = math.pi / 2 * theta[0].sign()
    dz = weights_for(x, theta, ansatz)
    found = triton_interpreter.call(both_passes, x, theta, ansatz, dz)
    assert_as_expected(found, x, expected(x, theta, ansatz, dz), factor=2)


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [1, 4, 7])
def test_tables_are_those_of_serving(qubits: int, name: str, generator: torch.Generator) -> None:
    ansatz = Ansatz(name, qubits, 12, readouts=qubits * (qubits + 1) // 2)
    theta = 10 * random_theta(generator, 3, ansatz, SINGLE)
    theta[1] = (theta[1] / math.pi).round() * math.pi  # nothing but Paulis, up to phases
    made = triton_interpreter.call(tables, theta, ansatz)
    torch.testing.assert_close(made, host.make_tables(theta, ansatz), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_come_in_the_dtypes_of_x_and_theta(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Of inputs that are not contiguous."""
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x = random_x(generator, 13, 3, dtype).T
    theta = random_theta(generator, 4, ansatz)[::2]
    dz = weights_for(x, theta, ansatz).transpose(0, 2).contiguous().transpose(0, 2)
    z, dx, dtheta = triton_interpreter.call(both_passes, x, theta, ansatz, dz)
    assert z.dtype == SINGLE
    assert dx.dtype == dtype
    assert dtheta.dtype == torch.float64
    right = expected(x, theta, ansatz, dz)
    torch.testing.assert_close(dx, right[1].to(dtype), rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert_close(dtheta / len(x), right[2] / len(x), TOLERANCE[SINGLE])


def test_the_same_inputs_have_the_same_gradients_to_the_bit(generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 5, 2)
    x, theta = random_x(generator, 7, 20, SINGLE), random_theta(generator, 2, ansatz, SINGLE)
    dz = weights_for(x, theta, ansatz)
    first, second = (triton_interpreter.call(both_passes, x, theta, ansatz, dz, 3) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("options", ["fewer", "constant", "length"])
def test_a_zero_row_has_no_gradient_and_one_that_is_no_number_spoils_no_others(
    options: str, generator: torch.Generator
) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 2, **OPTIONS[options])  # type: ignore[arg-type]
    x, theta = random_x(generator, 4, 7, SINGLE), random_theta(generator, 1, ansatz, SINGLE)
    dz = weights_for(x, theta, ansatz)
    _, right, _ = expected(x, theta, ansatz, dz)
    x[1], x[2, 3] = 0, math.nan
    _, found, _ = triton_interpreter.call(both_passes, x, theta, ansatz, dz, 2)
    assert (found[1] == 0).all()
    assert_close(found[[0, 3]], right[[0, 3]], 5 * TOLERANCE[SINGLE])


@pytest.mark.parametrize("size", [1e-44, 1e-38, 3e38])
def test_numbers_at_the_ends_of_float32_have_finite_gradients_of_angles(
    size: float, generator: torch.Generator
) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 2)
    x = random_x(generator, 2, 7, SINGLE).sign() * size
    theta = random_theta(generator, 1, ansatz, SINGLE)
    dz = weights_for(x, theta, ansatz)
    _, _, found = triton_interpreter.call(both_passes, x, theta, ansatz, dz)
    if size > 1e-40:  # else x is too coarse a number
        assert_close(found / 2, expected(x, theta, ansatz, dz)[2] / 2, TOLERANCE[SINGLE])
    assert found.isfinite().all()


@pytest.mark.parametrize(("tokens", "heads"), [(0, 2), (3, 0)])
def test_nothing_gives_nothing(tokens: int, heads: int) -> None:
    ansatz = Ansatz("ry_ring", 3, 1)
    x, theta = torch.zeros(tokens, 8), torch.zeros(heads, *ansatz.theta_shape)
    z, dx, dtheta = both_passes(x, theta, ansatz, torch.zeros(tokens, heads, 3))
    assert z.shape == (tokens, heads, 3)
    assert (dx.shape, dtheta.shape) == (x.shape, theta.shape)
    assert not dx.any()
    assert not dtheta.any()


# --------------------------------------------------------------------------------------------- without numbers


def test_the_backward_pass_is_one_launch_that_depends_on_shapes_alone() -> None:
    """Tensors without memory: whatever looked at a number of theirs, or waited for it, would raise."""
    meta, grids = torch.device("meta"), []

    class Launches:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: grids.append(grid)

    form = training.form_for(Ansatz("strongly_entangling", 12, 2), 2, meta)
    x, dz = torch.empty(1000, 4000, dtype=torch.bfloat16, device=meta), torch.empty(1000, 2, 12, device=meta)
    dx, sums = training.launch_gradients(Launches(), x, form, form.record, dz)
    assert dx.shape == (2, 1000, 4000)
    assert grids == [(len(sums), 2)]
    assert len(sums) * 2 >= 132, "every multiprocessor has a program"
    assert form.add_up(sums).shape == (2, 6, 12)


def test_it_trains_on_a_gpu_what_a_program_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda name, device: None if name in ("torch", "triton") else "no")
    gpu, most = torch.device("cuda"), training.MOST_QUBITS
    assert backends.training_backend(gpu, SINGLE, most) is training
    assert backends.training_backend(gpu, torch.bfloat16, most) is training
    assert backends.training_backend(gpu, SINGLE, most + 1) is torch_adjoint
    assert backends.training_backend(gpu, torch.float64, most) is torch_adjoint


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [4, 8, 10, 11, 12, 13])
def test_a_gpu_has_the_references_gradients(
    qubits: int, name: str, options: str, generator: torch.Generator
) -> None:
    ansatz = Ansatz(name, qubits, 2, **OPTIONS[options])  # type: ignore[arg-type]
    x = random_x(generator, 3, width_for(qubits), SINGLE)
    theta = random_theta(generator, 2, ansatz, SINGLE)
    dz = weights_for(x, theta, ansatz)
    found = both_passes(x.cuda(), theta.cuda(), ansatz, dz.cuda(), 1)
    assert_as_expected(tuple(each.cpu() for each in found), x, expected(x, theta, ansatz, dz))
    again = both_passes(x.cuda(), theta.cuda(), ansatz, dz.cuda(), 1)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
