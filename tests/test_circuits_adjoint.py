"""The circuits of training: gradients written by hand, and how little is kept for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from circuits_support import (
    FLOATS,
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    fresh_generator,
    gradients,
    judge,
    random_theta,
    random_x,
    width_for,
)
from torch.utils.checkpoint import checkpoint

from qaa_serve.adapters import AdapterConfig
from qaa_serve.circuits import ANSATZ_NAMES, Ansatz, adjoint, backends, torch_adjoint, torch_batched
from qaa_serve.circuits.adjoint import expectation_values
from qaa_serve.training import QAALinear

SINGLE, DOUBLE = torch.float32, torch.float64


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four tokens at n = 4."""
    monkeypatch.setitem(torch_batched.BLOCK, "cpu", 64)


@pytest.fixture(params=["compiled", "torch"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What float32 on a CPU has by default, and what it would have elsewhere."""
    if request.param == "torch":
        monkeypatch.setattr(adjoint, "training_backend", lambda *_: torch_adjoint)


def on_every_token(
    x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None = None
) -> torch.Tensor:
    """The function under test in the form the shared checks call."""
    assert index is None
    return expectation_values(x, theta, ansatz)


def assert_same_as_autograd(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> None:
    found = gradients(on_every_token, x, theta, ansatz)
    expected = gradients(torch_batched.expectation_values, x, theta, ansatz)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, TOLERANCE[x.dtype])


# ------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", range(1, 14))
def test_agrees_with_pennylane(qubits: int, name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    ansatz = Ansatz(name, qubits, 2)
    x = random_x(generator, 2, width_for(qubits), dtype)
    assert_gradients_close(on_every_token, x, random_theta(generator, 1, ansatz, dtype), ansatz)


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [2, 5, 10])
def test_torch_in_float32_agrees_with_pennylane(
    qubits: int, name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adjoint, "training_backend", lambda *_: torch_adjoint)
    ansatz = Ansatz(name, qubits, 2)
    x = random_x(generator, 2, width_for(qubits), SINGLE)
    assert_gradients_close(on_every_token, x, random_theta(generator, 1, ansatz, SINGLE), ansatz)


@pytest.mark.parametrize("layers", [1, 3, 4])
@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [2, 3, 5])
def test_every_depth_and_several_heads_agree_with_pennylane(
    qubits: int, name: str, layers: int, generator: torch.Generator
) -> None:
    ansatz = Ansatz(name, qubits, layers)
    x = random_x(generator, 3, width_for(qubits), SINGLE)
    assert_gradients_close(on_every_token, x, random_theta(generator, 3, ansatz, SINGLE), ansatz)


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [1, 2, 3])
def test_gradcheck(qubits: int, name: str, generator: torch.Generator) -> None:
    ansatz = Ansatz(name, qubits, 2)
    x = random_x(generator, 2, width_for(qubits)).requires_grad_()
    theta = random_theta(generator, 2, ansatz).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, theta: expectation_values(x, theta, ansatz), (x, theta))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.usefixtures("small_blocks")
def test_any_number_of_tokens_about_a_block(name: str, tokens: int, generator: torch.Generator) -> None:
    ansatz = Ansatz(name, 4, 2)
    assert_same_as_autograd(random_x(generator, tokens, 13), random_theta(generator, 2, ansatz), ansatz)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 127, 128, 257])
@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize(("constant", "length"), [(False, False), (True, False), (False, True), (True, True)])
def test_any_number_of_tokens_about_a_tile(
    name: str, constant: bool, length: bool, tokens: int, generator: torch.Generator
) -> None:
    """A tile is sixteen tokens, and 128 are shared over two threads."""
    ansatz = Ansatz(name, 4, 2, constant=constant, length=length)
    assert_same_as_autograd(
        random_x(generator, tokens, 11, SINGLE), random_theta(generator, 3, ansatz, SINGLE), ansatz
    )


@pytest.mark.parametrize("width", [2, 7, 8, 9, 15, 16])
def test_any_width_about_the_state(width: int, generator: torch.Generator) -> None:
    ansatz = Ansatz("strongly_entangling", 4, 2, readouts=7)
    assert_same_as_autograd(
        random_x(generator, 5, width, SINGLE), random_theta(generator, 2, ansatz, SINGLE), ansatz
    )


def test_the_same_inputs_have_the_same_gradients_to_the_bit(generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 6, 2)
    x, theta = random_x(generator, 300, 50, SINGLE), random_theta(generator, 2, ansatz, SINGLE)
    first = gradients(on_every_token, x, theta, ansatz)
    for _ in range(5):
        for again, once in zip(gradients(on_every_token, x, theta, ansatz), first, strict=True):
            assert torch.equal(again, once)


@pytest.mark.usefixtures("both_ways")
def test_a_token_that_is_no_number_spoils_no_other_tokens_gradient(generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x, theta = random_x(generator, 20, 13, SINGLE), random_theta(generator, 1, ansatz, SINGLE)
    _, expected, _ = gradients(on_every_token, x, theta, ansatz)
    x[3] = float("nan")
    x[17, 2] = float("inf")
    z, dx, dtheta = gradients(on_every_token, x, theta, ansatz)
    fine = torch.tensor([token not in (3, 17) for token in range(20)])
    assert_close(dx[fine], expected[fine], TOLERANCE[SINGLE])
    assert z[~fine].isnan().all()
    assert dtheta.isnan().any(), "what diverges is to be seen"


@pytest.mark.parametrize("block", [1, 2**30])
def test_blocks_of_one_token_and_of_all(
    block: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torch_batched.BLOCK, "cpu", block)
    ansatz = Ansatz("ryrz_ring_ry", 5, 2)
    assert_same_as_autograd(random_x(generator, 7, 21), random_theta(generator, 1, ansatz), ansatz)


@pytest.mark.parametrize(("tokens", "heads"), [(0, 2), (3, 0), (0, 0)])
@pytest.mark.usefixtures("both_ways")
def test_nothing_gives_nothing(tokens: int, heads: int, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x = random_x(generator, tokens, 13, SINGLE).requires_grad_()
    theta = random_theta(generator, heads, ansatz, SINGLE).requires_grad_()
    z = expectation_values(x, theta, ansatz)
    assert z.shape == (tokens, heads, 4)
    dx, dtheta = torch.autograd.grad(z.sum(), (x, theta))
    assert dx.shape == x.shape
    assert (dx == 0).all()
    assert dtheta.shape == theta.shape
    assert (dtheta == 0).all()


def test_wrong_shapes_are_errors() -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 2)
    with pytest.raises(ValueError, match="x is 9 wide; 3 qubits hold at most 8"):
        expectation_values(torch.ones(2, 9), torch.ones(1, 5, 3), ansatz)
    with pytest.raises(ValueError, match=r"theta has shape \(1, 4, 3\)"):
        expectation_values(torch.ones(2, 8), torch.ones(1, 4, 3), ansatz)


# ---------------------------------------------------------------------------------- sizes of x, dtypes


@pytest.mark.parametrize("power", [-100, -67, 67, 100])
@pytest.mark.usefixtures("both_ways")
def test_gradients_stand_any_length_of_x(power: int, generator: torch.Generator) -> None:
    """2**67 is 1e20: squares of such numbers overflow or vanish in float32."""
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x = random_x(generator, 3, 13, SINGLE) * 2.0**power
    assert_gradients_close(on_every_token, x, random_theta(generator, 1, ansatz, SINGLE), ansatz)


@pytest.mark.parametrize("length", [False, True])
@pytest.mark.usefixtures("both_ways")
def test_numbers_next_to_zero_are_no_error(length: bool, generator: torch.Generator) -> None:
    """Their length rounds to 0, or one over it to infinity."""
    ansatz = Ansatz("ryrz_ring_ry", 7, 2, length=length)
    x = random_x(generator, 5, 100, SINGLE)
    x[1] *= 1e-44
    x[3] = 0
    x[3, 7] = 1e-45
    theta = random_theta(generator, 1, ansatz, SINGLE)
    assert all(torch.isfinite(each).all() for each in gradients(on_every_token, x, theta, ansatz)[::2])
    _, dx, _ = gradients(on_every_token, x, theta, ansatz)
    assert torch.isfinite(dx[[0, 2, 4]]).all()


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.usefixtures("small_blocks", "both_ways")
def test_a_zero_row_has_no_gradient_and_leaves_its_neighbours_alone(name: str, generator: torch.Generator) -> None:
    ansatz = Ansatz(name, 4, 2)
    x = random_x(generator, 6, 13, SINGLE)
    x[1] = x[4] = 0
    theta = random_theta(generator, 2, ansatz, SINGLE)
    z, dx, _ = gradients(on_every_token, x, theta, ansatz)
    assert (z[[1, 4]] == 0).all()
    assert (dx[[1, 4]] == 0).all()
    assert_same_as_autograd(x, theta, ansatz)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.usefixtures("both_ways")
def test_any_float_gets_its_gradient_in_its_own_dtype(dtype: torch.dtype, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 6, 2)
    x = random_x(generator, 4, 40, dtype).requires_grad_()
    theta = random_theta(generator, 2, ansatz, SINGLE).requires_grad_()
    z = expectation_values(x, theta, ansatz)
    assert z.dtype == (DOUBLE if dtype == DOUBLE else SINGLE)
    assert_close(z, judge(x, theta, ansatz), TOLERANCE[z.dtype])
    dx, dtheta = torch.autograd.grad(z.sum(), (x, theta))
    exact = [x.detach().double().requires_grad_(), theta.detach().double().requires_grad_()]
    dx_exact, dtheta_exact = torch.autograd.grad(judge(*exact, ansatz).sum(), exact)
    assert dx.dtype == dtype
    assert dtheta.dtype == SINGLE
    torch.testing.assert_close(dx.double(), dx_exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(dtheta.double(), dtheta_exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_inputs_and_incoming_gradients_need_not_be_contiguous(
    layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x = {
        "transposed": random_x(generator, 13, 4, dtype).T,
        "sliced": random_x(generator, 8, 26, dtype)[::2, ::2],
        "expanded": random_x(generator, 1, 13, dtype).expand(4, -1),
    }[layout]
    theta = random_theta(generator, 4, ansatz, dtype)[1::2]
    dz = random_x(generator, 4, 8, dtype).reshape(4, 4, 2).transpose(1, 2)
    assert not any(tensor.is_contiguous() for tensor in (x, theta, dz))

    def grads(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        inputs = x.detach().requires_grad_(), theta.detach().requires_grad_()
        return torch.autograd.grad(function(*inputs, ansatz), inputs, dz)

    for ours, theirs in zip(grads(expectation_values), grads(torch_batched.expectation_values), strict=True):
        assert_close(ours, theirs, 10 * TOLERANCE[dtype])  # the gradients are several times as large as z


# ----------------------------------------------------------------------------- which backend trains


def test_kernels_train_in_float32_where_there_are_some_and_torch_does_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, cuda, kernels = (
        torch.device("cpu"),
        torch.device("cuda"),
        import_module("qaa_serve.circuits.cpu.training"),
    )
    assert backends.training_backend(cpu, SINGLE, 9) is kernels
    assert backends.training_backend(cpu, torch.bfloat16, 9) is kernels
    assert backends.training_backend(cpu, DOUBLE, 9) is torch_adjoint
    monkeypatch.setattr(kernels, "MOST_QUBITS", 8, raising=False)
    assert backends.training_backend(cpu, SINGLE, 9) is torch_adjoint
    monkeypatch.setattr(backends, "missing", lambda name, device: None if name == "torch" else "it is not there")
    assert backends.training_backend(cpu, SINGLE, 2) is torch_adjoint
    assert backends.training_backend(cuda, SINGLE, 2) is torch_adjoint


# -------------------------------------------------------------------------- what is kept, and with whom


@pytest.mark.parametrize("dtype", [torch.bfloat16, SINGLE], ids=str)
@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.usefixtures("both_ways")
def test_only_x_and_theta_are_kept(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    ansatz = Ansatz(name, 6, 3)
    x = random_x(generator, 300, 40, dtype).requires_grad_()
    theta = random_theta(generator, 2, ansatz, SINGLE).requires_grad_()
    kept = kept_by(lambda: expectation_values(x, theta, ansatz))
    assert sorted(t.data_ptr() for t in kept) == sorted([x.data_ptr(), theta.data_ptr()])
    assert {t.dtype for t in kept} == {dtype, SINGLE}


@pytest.mark.parametrize("heads", [1, 2])
def test_a_layer_keeps_x_z_and_its_own_parameters(heads: int, generator: torch.Generator) -> None:
    settings = AdapterConfig(base_model_name_or_path="base", target_modules=("q",), heads=heads)
    layer = QAALinear(torch.nn.Linear(40, 70).requires_grad_(False), "default", settings)
    x = random_x(generator, 24, 40, SINGLE).reshape(2, 12, 40).requires_grad_()
    kept = kept_by(lambda: layer._update("default", x))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for known in (x, layer.qaa_theta["default"], layer.qaa_weight["default"]):
        del storages[known.untyped_storage().data_ptr()]
    assert list(storages.values()) == [24 * heads * 6 * 4]  # z in float32


def kept_by(function: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Tensors that autograd keeps for a function's backward pass."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return kept


@pytest.mark.parametrize("wanted", ["x", "theta"])
def test_only_the_gradient_that_is_wanted(wanted: str, generator: torch.Generator) -> None:
    ansatz = Ansatz("strongly_entangling", 4, 2)
    x, theta = random_x(generator, 5, 13), random_theta(generator, 2, ansatz)
    both = gradients(on_every_token, x, theta, ansatz)[1:]
    inputs = {"x": x.clone(), "theta": theta.clone()}
    inputs[wanted].requires_grad_()
    z = expectation_values(**inputs, ansatz=ansatz)
    weights = torch.cos(torch.arange(z.numel(), dtype=DOUBLE)).reshape(z.shape) / z[0].numel()
    (grad,) = torch.autograd.grad((z * weights).sum(), inputs[wanted])
    scaled = grad * x.norm(dim=-1, keepdim=True) if wanted == "x" else grad / len(x)
    assert_close(scaled, both[wanted == "theta"], TOLERANCE[DOUBLE])


@pytest.mark.parametrize("reentrant", [False, True])
def test_works_under_gradient_checkpointing(reentrant: bool, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)

    def checkpointed(
        x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None
    ) -> torch.Tensor:
        z: torch.Tensor = checkpoint(on_every_token, x, theta, ansatz, index, use_reentrant=reentrant)
        return z

    x, theta = random_x(generator, 5, 13), random_theta(generator, 2, ansatz)
    if reentrant:  # torch.autograd.grad is refused there
        pairs = [[t.clone().requires_grad_() for t in (x, theta)] for _ in range(2)]
        for function, inputs in zip((checkpointed, on_every_token), pairs, strict=True):
            function(*inputs, ansatz, None).sum().backward()
        found, expected = ([t.grad for t in inputs] for inputs in pairs)
    else:
        found, expected = (gradients(f, x, theta, ansatz) for f in (checkpointed, on_every_token))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_torch_compile_has_the_same_gradients(generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x, theta = random_x(generator, 5, 13, SINGLE), random_theta(generator, 1, ansatz, SINGLE)
    compiled = torch.compile(lambda x, theta: expectation_values(2 * x, theta, ansatz), backend="eager")
    found = gradients(lambda x, theta, ansatz, index: compiled(x, theta), x, theta, ansatz)
    for ours, theirs in zip(found, gradients(on_every_token, x, theta, ansatz), strict=True):
        assert_close(ours, theirs, TOLERANCE[SINGLE])


def test_autocast_does_not_reach_it(generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x, theta = random_x(generator, 5, 13, SINGLE), random_theta(generator, 1, ansatz, SINGLE)
    outside = gradients(on_every_token, x, theta, ansatz)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(on_every_token, x, theta, ansatz)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused(generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 1)
    x = random_x(generator, 2, 7).requires_grad_()
    theta = random_theta(generator, 1, ansatz).requires_grad_()
    z = expectation_values(x, theta, ansatz)
    for loss in (z.sum(), z.square().sum()):
        with pytest.raises(RuntimeError, match=r"create_graph=True.*torch_batched can"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_x_changed_in_place_before_the_backward_pass_is_noticed(generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 1)
    x = random_x(generator, 2, 7)
    theta = random_theta(generator, 1, ansatz).requires_grad_()
    z = expectation_values(x, theta, ansatz)
    x *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_torch_sums_up_nothing_for_frozen_angles(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adjoint, "training_backend", lambda *_: torch_adjoint)
    ansatz = Ansatz("ryrz_ring_ry", 4, 2)
    x = random_x(generator, 5, 13, SINGLE).requires_grad_()
    theta = random_theta(generator, 2, ansatz, SINGLE)
    (expected,) = torch.autograd.grad(expectation_values(x, theta.clone().requires_grad_(), ansatz).sum(), x)

    def add(*_: object) -> None:
        raise AssertionError("overlaps are for dL/dtheta alone")

    monkeypatch.setattr(torch_adjoint._Overlaps, "add", add)
    (found,) = torch.autograd.grad(expectation_values(x, theta, ansatz).sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [1, 2, 5, 9, 12])
def test_agrees_with_pennylane_on_a_gpu(qubits: int, name: str, generator: torch.Generator) -> None:
    ansatz = Ansatz(name, qubits, 2)
    x = random_x(generator, 3, width_for(qubits), SINGLE)

    def on_gpu(
        x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        return expectation_values(x.cuda(), theta.cuda(), ansatz).cpu()

    assert_gradients_close(on_gpu, x, random_theta(generator, 2, ansatz, SINGLE), ansatz)


def test_a_training_step_changes_the_parameters_as_plain_autograd_would(generator: torch.Generator) -> None:
    settings = AdapterConfig(base_model_name_or_path="base", target_modules=("q",), heads=2)
    layer = QAALinear(torch.nn.Linear(12, 7), "default", settings)
    torch.nn.init.normal_(layer.qaa_weight["default"], generator=generator)
    twin = copy.deepcopy(layer)
    x = random_x(generator, 5, 12, SINGLE)
    layer._update("default", x).square().mean().backward()
    form = twin.qaa_form["default"]
    z = torch_batched.expectation_values(x, twin.qaa_theta["default"], form.ansatz)
    update = form.scale * z.flatten(1) @ twin.qaa_weight["default"].T
    update.square().mean().backward()
    for name in ("qaa_theta", "qaa_weight"):
        ours, theirs = (getattr(each, name)["default"].grad for each in (layer, twin))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
