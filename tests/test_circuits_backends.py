"""One suite over all backends: values and gradients against PennyLane, and inputs that break kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from circuits_support import (
    FLOATS,
    POPULARITIES,
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
    width_for,
)

from qaa_serve.circuits import ANSATZ_NAMES, BACKENDS, MAX_QUBITS, Ansatz, get_backend


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return open_backend(request.param)


@pytest.fixture
def differentiable(backend: Backend) -> Backend:
    if not backend.traits.differentiable:
        pytest.skip(f"backend {backend.name!r} has no gradients")
    return backend


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin hand out NaN, so that memory read before it is written shows up in z."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_poisoned_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty(3).isnan().all()


def test_every_backend_is_under_test() -> None:
    assert set(TRAITS) == set(BACKENDS), "give each backend a line in circuits_support.TRAITS"


def test_unknown_backend_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown circuit backend 'tortch'.*reference.*torch"):
        get_backend("tortch")


# ------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", range(1, 14))
def test_values_and_gradients_agree_with_pennylane(
    backend: Backend, qubits: int, name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    ansatz = Ansatz(name, qubits, 2)
    x = random_x(generator, 2, width_for(qubits), dtype)
    theta = random_theta(generator, 1, ansatz, dtype)
    assert_close(backend(x, theta, ansatz), judge(x, theta, ansatz), backend.tolerance(x))
    if backend.traits.differentiable:
        assert_gradients_close(backend, x, theta, ansatz)


@pytest.mark.parametrize("layers", [1, 3, 4])
@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [1, 2, 3, 5])
def test_every_depth_agrees_with_pennylane(
    backend: Backend, qubits: int, name: str, layers: int, generator: torch.Generator
) -> None:
    ansatz = Ansatz(name, qubits, layers)
    x = random_x(generator, 2, width_for(qubits), torch.float32)
    theta = random_theta(generator, 1, ansatz, torch.float32)
    assert_close(backend(x, theta, ansatz), judge(x, theta, ansatz), backend.tolerance(x))
    if backend.traits.differentiable:
        assert_gradients_close(backend, x, theta, ansatz)


@pytest.mark.parametrize("width", [2, 3, 4, 5, 7, 8, 9, 17, 31, 32, 33, 100, 640])
def test_any_width_is_padded_at_the_end(backend: Backend, width: int, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", (width - 1).bit_length(), 1)
    x = random_x(generator, 2, width, torch.float32)
    theta = random_theta(generator, 1, ansatz, torch.float32)
    assert_close(backend(x, theta, ansatz), judge(x, theta, ansatz), backend.tolerance(x))


def test_a_state_may_be_larger_than_the_width_needs(backend: Backend, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 5, 2)
    x = random_x(generator, 3, 3, torch.float32)
    theta = random_theta(generator, 1, ansatz, torch.float32)
    assert_close(backend(x, theta, ansatz), judge(x, theta, ansatz), backend.tolerance(x))


@pytest.mark.parametrize("tokens", [0, 1, 3, 64, 257])
@pytest.mark.parametrize("indexed", [False, True])
def test_any_number_of_tokens(backend: Backend, tokens: int, indexed: bool, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 1)
    x = random_x(generator, tokens, 6, torch.float32)
    theta = random_theta(generator, 2, ansatz, torch.float32)
    index = torch.randint(-1, 2, (tokens, 1), generator=generator) if indexed else None
    z = backend(x, theta, ansatz, index)
    assert z.shape == (tokens, 1 if indexed else 2, 3)
    if tokens:
        assert_close(z, judge(x, theta, ansatz, index), backend.tolerance(x))


def test_few_rows_of_many_have_a_circuit(backend: Backend, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 1)
    x = random_x(generator, 300, 6, torch.float32)
    theta = random_theta(generator, 2, ansatz, torch.float32)
    index = torch.full((300, 1), -1)
    index[[0, 140, 270, 299], 0] = torch.tensor([1, 0, 1, 0])
    z = backend(x, theta, ansatz, index)
    assert_close(z, judge(x, theta, ansatz, index), backend.tolerance(x))


# ---------------------------------------------------------------------------------- sizes of x, dtypes


@pytest.mark.parametrize("power", [-100, -67, 67, 100])
def test_z_does_not_see_the_length_of_x(backend: Backend, power: int, generator: torch.Generator) -> None:
    """2**67 is 1e20: squares of such numbers overflow or vanish in float32; x itself is scaled exactly."""
    ansatz = Ansatz("ryrz_ring_ry", 5, 2)
    x = random_x(generator, 3, 20, torch.float32)
    theta = random_theta(generator, 1, ansatz, torch.float32)
    assert_close(backend(x * 2.0**power, theta, ansatz), judge(x, theta, ansatz), backend.tolerance(x))


@pytest.mark.parametrize("power", [-67, 67])
def test_gradients_stand_any_length_of_x(differentiable: Backend, power: int, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x = random_x(generator, 3, 13, torch.float32) * 2.0**power
    theta = random_theta(generator, 1, ansatz, torch.float32)
    assert_gradients_close(differentiable, x, theta, ansatz)


def test_z_does_not_see_the_sign_of_x(backend: Backend, generator: torch.Generator) -> None:
    ansatz = Ansatz("strongly_entangling", 4, 2)
    x = random_x(generator, 3, 13, torch.float32)
    theta = random_theta(generator, 1, ansatz, torch.float32)
    assert_close(backend(-x, theta, ansatz), backend(x, theta, ansatz), backend.tolerance(x))


@pytest.mark.parametrize("indexed", [False, True])
def test_a_zero_row_gives_exact_zeros_and_leaves_its_neighbours_alone(
    backend: Backend, indexed: bool, generator: torch.Generator
) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x = random_x(generator, 5, 13, torch.float32)
    x[1] = x[4] = 0
    theta = random_theta(generator, 2, ansatz, torch.float32)
    index = torch.tensor([[0], [1], [1], [0], [-1]]) if indexed else None
    z = backend(x, theta, ansatz, index)
    assert (z[[1, 4]] == 0).all()
    assert_close(z, judge(x, theta, ansatz, index), backend.tolerance(x))


def test_a_zero_row_has_finite_gradients(differentiable: Backend, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 2)
    x = random_x(generator, 3, 7, torch.float32)
    x[1] = 0
    x.requires_grad_()
    theta = random_theta(generator, 1, ansatz, torch.float32).requires_grad_()
    dx, dtheta = torch.autograd.grad(differentiable(x, theta, ansatz).sum(), (x, theta))
    assert dx.isfinite().all()
    assert (dx[1] == 0).all()
    assert dtheta.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_float_is_taken_and_computed_in_float32_or_better(
    backend: Backend, dtype: torch.dtype, generator: torch.Generator
) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 6, 2)
    x = random_x(generator, 4, 40, dtype)
    theta = random_theta(generator, 2, ansatz, torch.float32)
    z = backend(x, theta, ansatz)
    assert z.dtype == backend.precision(x)
    assert_close(z, judge(x, theta, ansatz), backend.tolerance(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_x_gets_its_gradient_in_its_own_dtype(
    differentiable: Backend, dtype: torch.dtype, generator: torch.Generator
) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 2)
    x = random_x(generator, 4, 7, dtype).requires_grad_()
    theta = random_theta(generator, 1, ansatz, torch.float32)
    (dx,) = torch.autograd.grad(differentiable(x, theta, ansatz).sum(), x)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(judge(exact, theta, ansatz).sum(), exact)
    assert dx.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(dx.double(), expected, rtol=rounding, atol=1e-5)


def test_fp16_numbers_at_the_ends_of_their_range(backend: Backend, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 5, 1)
    x = random_x(generator, 2, 32)
    theta = random_theta(generator, 1, ansatz, torch.float32)
    x = torch.stack([x[0].sign() * torch.finfo(torch.float16).max, x[1] * 1e-6]).half()
    assert_close(backend(x, theta, ansatz), judge(x, theta, ansatz), backend.tolerance(x))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
def test_inputs_need_not_be_contiguous(backend: Backend, layout: str, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    theta = random_theta(generator, 4, ansatz, torch.float32)[1::2]
    index = torch.randint(-1, 2, (4, 3), generator=generator)[:, ::2]
    x = {
        "transposed": random_x(generator, 13, 4, torch.float32).T,
        "sliced": random_x(generator, 8, 26, torch.float32)[::2, ::2],
        "expanded": random_x(generator, 1, 13, torch.float32).expand(4, -1),
        "offset": random_x(generator, 5, 15, torch.float32)[1:, 1:14],  # as q,k,v slices of a packed layer
    }[layout]
    assert not x.is_contiguous()
    assert not theta.is_contiguous()
    assert not index.is_contiguous()
    assert_close(backend(x, theta, ansatz, index), judge(x, theta, ansatz, index), backend.tolerance(x))


# ------------------------------------------------------------------------------------- mixed circuits


@pytest.mark.parametrize("pattern", POPULARITIES)
@pytest.mark.parametrize("name", ANSATZ_NAMES)
def test_mixed_batches_agree_with_pennylane(
    backend: Backend, name: str, pattern: str, generator: torch.Generator
) -> None:
    ansatz = Ansatz(name, 3, 2)
    x = random_x(generator, 6, 7, torch.float32)
    theta = random_theta(generator, 12, ansatz, torch.float32)  # enough for all readouts to differ
    index = popularity_index(pattern, 6, 12, generator, readouts=2)
    index[3] = -1
    assert_close(backend(x, theta, ansatz, index), judge(x, theta, ansatz, index), backend.tolerance(x))


@pytest.mark.parametrize("pattern", POPULARITIES)
def test_gradients_of_mixed_batches_agree_with_pennylane(
    differentiable: Backend, pattern: str, generator: torch.Generator
) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 2)
    x = random_x(generator, 4, 7, torch.float32)
    theta = random_theta(generator, 8, ansatz, torch.float32)
    index = popularity_index(pattern, 4, 8, generator, readouts=2)
    index[2, 0] = -1
    assert_gradients_close(differentiable, x, theta, ansatz, index)


def test_rows_without_a_circuit_get_exact_zeros(backend: Backend, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x = random_x(generator, 5, 13, torch.float32)
    theta = random_theta(generator, 2, ansatz, torch.float32)
    index = torch.tensor([[0, -1], [-1, -1], [1, 1], [-1, 0], [-1, -1]])
    assert (backend(x, theta, ansatz, index)[index < 0] == 0).all()
    assert (backend(x, theta, ansatz, torch.full((5, 1), -1)) == 0).all()


def test_no_readouts_and_no_circuits_give_empty_results(backend: Backend, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 2)
    x = random_x(generator, 4, 7, torch.float32)
    theta = random_theta(generator, 2, ansatz, torch.float32)
    assert backend(x, theta, ansatz, torch.zeros(4, 0, dtype=torch.int64)).shape == (4, 0, 3)
    assert backend(x, theta[:0], ansatz).shape == (4, 0, 3)


def test_several_circuits_over_one_x_equal_one_at_a_time(backend: Backend, generator: torch.Generator) -> None:
    """How the heads of one adapter run, and q, k and v, which share their input."""
    ansatz = Ansatz("ryrz_ring_ry", 5, 2)
    x = random_x(generator, 4, 20, torch.float32)
    theta = random_theta(generator, 3, ansatz, torch.float32)
    alone = torch.cat([backend(x, theta[k : k + 1], ansatz) for k in range(3)], dim=1)
    assert_close(backend(x, theta, ansatz), alone, backend.tolerance(x))
    every = torch.arange(3).expand(4, -1)
    assert_close(backend(x, theta, ansatz, every), alone, backend.tolerance(x))


def test_a_row_does_not_depend_on_its_batch(backend: Backend, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 5, 2)
    x = random_x(generator, 9, 20, torch.float32)
    theta = random_theta(generator, 3, ansatz, torch.float32)
    index = popularity_index("zipf", 9, 3, generator)
    together = backend(x, theta, ansatz, index)
    for row in range(9):
        alone = backend(x[row : row + 1], theta, ansatz, index[row : row + 1])
        assert_close(together[row : row + 1], alone, backend.tolerance(x))


def test_a_large_mixed_batch_agrees_with_the_reference(backend: Backend, generator: torch.Generator) -> None:
    if backend.name == "reference":
        pytest.skip("would be compared with itself")
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x = random_x(generator, 257, 14, torch.bfloat16)
    theta = random_theta(generator, 40, ansatz, torch.float32)
    index = popularity_index("zipf", 257, 40, generator)
    expected = get_backend("reference")(x, theta, ansatz, index)
    assert_close(backend(x, theta, ansatz, index), expected, backend.tolerance(x))


# ------------------------------------------------------------------------------------ manners of a function


def test_inputs_are_left_as_they_were(backend: Backend, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x = random_x(generator, 4, 16, torch.float32)
    theta = random_theta(generator, 2, ansatz, torch.float32)
    index = torch.tensor([[0], [1], [-1], [1]])
    before = x.clone(), theta.clone(), index.clone()
    backend(x, theta, ansatz, index)
    assert all(torch.equal(*pair) for pair in zip((x, theta, index), before, strict=True))


def test_angles_can_be_trained_on_an_x_that_needs_no_gradient(
    differentiable: Backend, generator: torch.Generator
) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x = random_x(generator, 4, 16, torch.float32)
    theta = random_theta(generator, 1, ansatz, torch.float32).requires_grad_()
    differentiable(x, theta, ansatz).sum().backward()
    assert theta.grad is not None
    assert (theta.grad.abs().amax(dim=-1) > 1e-4).all(), "a row of angles has no gradient"


def test_an_x_wider_than_the_state_is_an_error(backend: Backend, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 1)
    theta = random_theta(generator, 1, ansatz, torch.float32)
    with pytest.raises(ValueError, match=r"x is 9 wide; 3 qubits hold at most 8"):
        backend(random_x(generator, 2, 9, torch.float32), theta, ansatz)


@pytest.mark.parametrize("shape", [(1, 4, 3), (1, 2, 3), (1, 3, 2), (1, 3, 4)])
def test_angles_of_another_shape_are_an_error(
    backend: Backend, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    with pytest.raises(ValueError, match=r"theta has shape .* is needed"):
        backend(random_x(generator, 2, 8, torch.float32), torch.zeros(shape), Ansatz("ryrz_ring_ry", 3, 1))


def test_a_circuit_number_that_does_not_exist_is_an_error(backend: Backend, generator: torch.Generator) -> None:
    if backend.traits.device != "cpu":
        pytest.skip("an index out of range kills a CUDA context: callers check it")
    ansatz = Ansatz("ryrz_ring_ry", 3, 1)
    x = random_x(generator, 2, 8, torch.float32)
    with pytest.raises(IndexError):
        backend(x, random_theta(generator, 2, ansatz), ansatz, torch.tensor([[0], [2]]))


def test_the_widest_state_runs(backend: Backend, generator: torch.Generator) -> None:
    """Sums over 65,536 float32 numbers: four times the tolerance."""
    ansatz = Ansatz("ry_ring", MAX_QUBITS, 1)
    x = random_x(generator, 1, 2**MAX_QUBITS, torch.float32)
    theta = random_theta(generator, 1, ansatz, torch.float32)
    assert_close(backend(x, theta, ansatz), judge(x, theta, ansatz), 4 * backend.tolerance(x))
