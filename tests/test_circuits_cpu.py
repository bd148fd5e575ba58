"""The compiled backend beyond the shared suite: adding B z in place, threads, what a row may do to others."""

from __future__ import annotations

import fcntl
import importlib
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from circuits_support import TOLERANCE, assert_close, compiled, fresh_generator, random_theta, random_x

from qaa_serve.circuits import Ansatz, backends, choose_backend, get_backend
from qaa_serve.circuits.cpu.serving import CompiledCircuits

CPU = torch.device("cpu")
reference = get_backend("reference")


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compiled()


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


class Layer:
    """A packed layer of three slices and three slots: the first has all circuits, the second lacks a slice.

    Standardised ones have offsets and scales for x and for z, zeros for a slice that lacks circuits.
    """

    ends = np.array([5, 9, 26])

    def __init__(self, generator: torch.Generator, heads: int = 1, n: int = 4, standardised: bool = False):
        self.ansatz = Ansatz("ryrz_ring_ry", n, 2)
        self.theta = random_theta(generator, 9 * heads, self.ansatz, torch.float32)
        self.circuits = CompiledCircuits(self.ansatz, 9 * heads, CPU)
        self.circuits.put(0, self.theta)
        self.table = torch.arange(9 * heads, dtype=torch.int32).view(3, 3 * heads)
        self.table[1, heads : 2 * heads] = -1
        self.weights = torch.randn(3, heads * n, int(self.ends[-1]), generator=generator)
        self.heads = heads
        self.inputs, self.readouts = torch.zeros(0, 2, 13), torch.zeros(0, 2, 3, heads * n)
        if standardised:
            self.inputs = torch.randn(3, 2, 13, generator=generator)
            self.readouts = torch.randn(3, 2, 3, heads * n, generator=generator)
            self.readouts[1, :, 1] = 0

    def expected(self, output: torch.Tensor, x: torch.Tensor, rows: list[int], slots: list[int]) -> torch.Tensor:
        """In float64, written out row by row."""
        output = output.double().clone()
        for row, slot in zip(rows, slots, strict=True):
            here = x[row : row + 1].double()
            if len(self.inputs):
                here = (here - self.inputs[slot, 0]) * self.inputs[slot, 1]
            z = reference(here, self.theta, self.ansatz, self.table[slot : slot + 1]).flatten()
            if len(self.readouts):
                z = (z - self.readouts[slot, 0].flatten()) * self.readouts[slot, 1].flatten()
            begin, rank = 0, self.weights.shape[1]
            for part, end in enumerate(self.ends):
                b = self.weights[slot, :, begin:end].double()
                output[row, begin:end] += z[part * rank : (part + 1) * rank] @ b
                begin = end
        return output

    def add(self, output: torch.Tensor, x: torch.Tensor, rows: list[int], slots: list[int]) -> None:
        tensors = self.table, self.inputs, self.readouts, self.weights
        arrays = *(tensor.numpy() for tensor in tensors), self.ends
        self.circuits.add_to(output, x, np.array(rows), np.array(slots), *arrays)


@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 16, 21, 40])
@pytest.mark.parametrize("qubits", [4, 8])
def test_bz_is_added_to_the_rows_that_have_an_adapter_and_to_no_other(
    qubits: int, tokens: int, heads: int, standardised: bool, generator: torch.Generator
) -> None:
    layer = Layer(generator, heads, qubits, standardised)
    x, output = random_x(generator, 2 * tokens, 13, torch.float32), torch.full((2 * tokens, 26), torch.nan)
    rows = list(range(1, 2 * tokens, 2))
    slots = torch.randint(3, (tokens,), generator=generator).tolist()
    output[rows] = torch.randn(tokens, 26, generator=generator)
    expected = layer.expected(output, x, rows, slots)
    layer.add(output, x, rows, slots)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-5, equal_nan=True)


def test_bfloat16_is_rounded_once_and_to_the_nearest(generator: torch.Generator) -> None:
    layer = Layer(generator)
    x = random_x(generator, 18, 13, torch.bfloat16)
    output = (100 * torch.randn(18, 26, generator=generator)).bfloat16()
    rows, slots = list(range(18)), [0, 1, 2] * 6
    expected = layer.expected(output, x, rows, slots)
    layer.add(output, x, rows, slots)
    error = (output.double() - expected).abs()
    half_a_step = 2.0 ** (expected.abs().log2().floor() - 8)
    assert (error <= half_a_step * 1.001 + 1e-6).all()


def test_a_bfloat16_row_without_circuits_keeps_its_bits(generator: torch.Generator) -> None:
    """NaN, infinities, the smallest and the largest numbers pass through the sum with nothing."""
    layer = Layer(generator)
    layer.table[:] = -1
    output = torch.arange(-(2**15), 2**15 - 1, 97, dtype=torch.int16)[: 26 * 20].view(20, 26).view(torch.bfloat16)
    before = output.clone()
    layer.add(output, random_x(generator, 20, 13, torch.bfloat16), list(range(20)), [0] * 20)
    nan = before.isnan()
    assert torch.equal(output.isnan(), nan)
    assert torch.equal(output[~nan].view(torch.int16), before[~nan].view(torch.int16))


@pytest.mark.parametrize("kind", ["float16", "columns of a wider output"])
def test_outputs_that_the_kernel_does_not_write_itself(kind: str, generator: torch.Generator) -> None:
    layer = Layer(generator)
    dtype = torch.float16 if kind == "float16" else torch.float32
    x, wide = random_x(generator, 4, 13, dtype), torch.zeros(4, 30, dtype=dtype)
    output = wide[:, :26] if kind != "float16" else wide[:, :26].contiguous()
    expected = layer.expected(output, x, [0, 2], [2, 1])
    layer.add(output, x, [0, 2], [2, 1])
    torch.testing.assert_close(output.double(), expected, rtol=2e-3 if kind == "float16" else 0, atol=2e-5)
    assert (wide[:, 26:] == 0).all()


def test_two_threads_give_what_one_gives(generator: torch.Generator) -> None:
    layer = Layer(generator)
    x = random_x(generator, 301, 13, torch.float32)
    rows, slots = list(range(301)), torch.randint(3, (301,), generator=generator).tolist()
    threads, outputs = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            outputs.append(torch.zeros(301, 26))
            layer.add(outputs[-1], x, rows, slots)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outputs)
    assert (outputs[0] != 0).any(dim=1).all(), "a row was left out"


def test_nothing_is_compiled_after_the_start(generator: torch.Generator) -> None:
    """Arrays of another layout or type would each have the compiler run, for seconds, in somebody's request."""
    kernel = CompiledCircuits(Ansatz("ry_ring", 2, 1), 1, CPU)._kernel
    before = [list(function.signatures) for function in (kernel.run, kernel.run_and_add)]
    for dtype in (torch.float32, torch.bfloat16):
        for heads, tokens in ((1, 1), (2, 3), (1, 100)):
            layer = Layer(generator, heads, standardised=tokens == 3)
            x = random_x(generator, tokens, 13, dtype)
            with torch.inference_mode():
                layer.add(torch.zeros(tokens, 26, dtype=dtype), x, list(range(tokens)), [tokens % 3] * tokens)
                layer.circuits.run(x.T.contiguous().T, layer.table[[0] * tokens])
    assert [list(function.signatures) for function in (kernel.run, kernel.run_and_add)] == before


def test_one_process_compiles_at_a_time() -> None:
    """The next one waits, and finds what the first has compiled."""
    folder = CompiledCircuits(Ansatz("ry_ring", 2, 1), 1, CPU)._kernel.run.stats.cache_path
    compiling = threading.Thread(target=CompiledCircuits.compile, args=(torch.float32,))
    with open(Path(folder, ".qaa-compiling"), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        compiling.start()
        compiling.join(0.3)
        assert compiling.is_alive()
    compiling.join(300)
    assert not compiling.is_alive()


@pytest.mark.parametrize("tokens", [3, 16])  # one by one, and as a tile
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_stays_with_itself(bad: float, tokens: int, generator: torch.Generator) -> None:
    layer = Layer(generator, n=8)
    x = random_x(generator, tokens, 13, torch.float32)
    index = torch.zeros(tokens, 1, dtype=torch.int32)
    clean = layer.circuits.run(x, index)
    good, x[1, 2] = x.clone(), bad
    z = layer.circuits.run(x, index)
    assert z[1].isnan().all()
    others = [i for i in range(tokens) if i != 1]
    assert torch.equal(z[others], clean[others])
    assert torch.equal(layer.circuits.run(good, index), clean), "what it left behind was seen by the next"
    index[1] = -1
    assert (layer.circuits.run(x, index)[1] == 0).all()


FORMS = {
    "default": Ansatz("ryrz_ring_ry", 9, 2),
    "products": Ansatz("ry_ring", 8, 3, readouts=30),
    "real, few readouts": Ansatz("ry_ring", 10, 1, readouts=3),
    "constant and length": Ansatz("strongly_entangling", 11, 2, constant=True, length=True),
}


@pytest.mark.parametrize("ansatz", FORMS.values(), ids=FORMS.keys())
def test_a_few_pairs_give_what_a_tile_gives(ansatz: Ansatz, generator: torch.Generator) -> None:
    width = 2**ansatz.qubits - 3
    theta = random_theta(generator, 4, ansatz, torch.float32)
    circuits = CompiledCircuits(ansatz, 4, CPU)
    circuits.put(0, theta)
    x = random_x(generator, 32, width, torch.float32)
    index = torch.randint(-1, 4, (32, 2), generator=generator, dtype=torch.int32)
    expected = reference(x, theta, ansatz, index)
    assert_close(circuits.run(x, index), expected, TOLERANCE[torch.float32])
    first = 0
    for tokens in (1, 2, 1, 5, 1):  # of two pairs each; five tokens are a tile, which uses the same arrays
        part = slice(first, first + tokens)
        assert_close(circuits.run(x[part], index[part]), expected[part], TOLERANCE[torch.float32])
        first += tokens


def test_circuits_are_empty_until_put_and_can_be_put_anew(generator: torch.Generator) -> None:
    ansatz = Ansatz("strongly_entangling", 5, 2)
    theta = random_theta(generator, 2, ansatz, torch.float32)
    circuits = CompiledCircuits(ansatz, 3, CPU)
    x = random_x(generator, 4, 27, torch.float32)
    index = torch.tensor([[0, 1, 2]] * 4, dtype=torch.int32)
    assert (circuits.run(x, index) == 0).all()
    circuits.put(2, theta[:1])
    circuits.put(1, theta)
    expected = reference(x, theta, ansatz, torch.tensor([[-1, 0, 1]] * 4))
    assert_close(circuits.run(x, index), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("tokens", [2, 16, 33])
def test_what_was_embedded_is_used_for_the_same_tokens_only(tokens: int, generator: torch.Generator) -> None:
    """Batches of equal size behind each other; and with 24 circuits a token tiles that begin with the same one."""
    ansatz = Ansatz("ryrz_ring_ry", 8, 1)
    theta = random_theta(generator, 24, ansatz, torch.float32)
    circuits = CompiledCircuits(ansatz, 24, CPU)
    circuits.put(0, theta)
    index = torch.arange(24, dtype=torch.int32).expand(tokens, -1)
    for _ in range(3):
        x = random_x(generator, tokens, 200, torch.float32)
        assert_close(circuits.run(x, index), reference(x, theta, ansatz, None), TOLERANCE[torch.float32])


def test_threads_do_not_share_the_arrays_they_compute_in() -> None:
    circuits = CompiledCircuits(Ansatz("ryrz_ring_ry", 8, 1), 1, CPU)
    both_there, found = threading.Barrier(2), []

    def work() -> None:
        both_there.wait(30)  # numbers of threads that have ended are given anew
        found.append(circuits._workspace(200))
        both_there.wait(30)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    one, other = ({id(array) for array in arrays if isinstance(array, np.ndarray)} for arrays in found)
    assert one
    assert not one & other


def test_widths_may_differ_from_call_to_call(generator: torch.Generator) -> None:
    """What a wide row left behind must not be seen by a narrow one."""
    ansatz = Ansatz("ryrz_ring_ry", 8, 1)
    theta = random_theta(generator, 1, ansatz, torch.float32)
    circuits = CompiledCircuits(ansatz, 1, CPU)
    circuits.put(0, theta)
    for width in (256, 17, 2, 130):
        x = random_x(generator, 3, width, torch.float32)
        z = circuits.run(x, torch.zeros(3, 1, dtype=torch.int32))
        assert_close(z, reference(x, theta, ansatz, None), TOLERANCE[torch.float32])


# ------------------------------------------------------------------------------------ which backend is taken


def test_compiled_functions_have_names_of_their_own() -> None:
    """Else kernels that two processes compiled call each other's, and gradients are wrong without a word."""
    pytest.importorskip("numba", reason="numba is not installed")
    from numba.core.registry import CPUDispatcher

    modules = [
        importlib.import_module(f"qaa_serve.circuits.cpu.{name}") for name in ("gates", "forward", "backward")
    ]
    found = {
        id(item): item for module in modules for item in vars(module).values() if isinstance(item, CPUDispatcher)
    }
    names = [item.py_func.__qualname__ for item in found.values()]
    assert len(names) == len(set(names)) > 20


def test_auto_is_the_compiled_one_on_a_cpu_and_says_why() -> None:
    assert choose_backend("auto", CPU) == ("cpu", "first that can run on cpu", {})


@pytest.mark.parametrize(
    ("there", "name"), [(("cuquantum", "triton"), "triton"), (("cuquantum",), "cuquantum"), ((), "torch")]
)
def test_auto_on_a_gpu_takes_what_is_there_and_says_what_is_missing(
    there: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        backends, "missing", lambda name, _: None if name in (*there, "torch") else f"install {name}"
    )
    chosen, reason, _ = choose_backend("auto", torch.device("cuda"))
    assert chosen == name
    assert [other for other in ("cuquantum", "triton") if f"not {other}: install {other}" in reason] == [
        other for other in ("cuquantum", "triton") if other not in there
    ]


@pytest.mark.parametrize("faster", ["triton", "cuquantum"])
def test_auto_takes_the_one_that_is_faster_on_the_models_layers(
    faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(576, 3), (1536, 1)]

    def seconds(name: str, device: torch.device, on: list[tuple[int, int]], limit_s: float) -> float:
        assert (device.type, on, limit_s) == ("cuda", shapes, 0.5)
        return 0.001 if name == faster else 0.002

    monkeypatch.setattr(backends, "missing", lambda name, _: None)
    monkeypatch.setattr(backends, "time_backend", seconds)
    chosen, reason, taken = choose_backend("auto", torch.device("cuda"), shapes)
    assert chosen == faster
    assert taken == {name: seconds(name, torch.device("cuda"), shapes, 0.5) for name in ("triton", "cuquantum")}
    assert f"{faster} 1000" in reason
    assert "2000" in reason


def test_a_backend_is_timed_on_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = set()
    run = CompiledCircuits.run

    def noted(circuits: CompiledCircuits, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ran.add((*x.shape, index.shape[1]))
        return run(circuits, x, index)

    monkeypatch.setattr(CompiledCircuits, "run", noted)
    assert 0 < backends.time_backend("cpu", CPU, [(50, 3), (200, 1)], 0.0) < 60
    assert ran == {(tokens, *shape) for shape in ((50, 3), (200, 1)) for tokens in (16, 512)}


def test_auto_passes_over_what_does_not_take_the_models_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda name, _: None)
    chosen, reason, _ = choose_backend("auto", torch.device("cuda"), [(4096, 3), (28672, 1)])
    assert chosen == "cuquantum"
    assert "not triton: a layer 28672 wide needs 15 qubits, and it takes 14" in reason
    with pytest.raises(ValueError, match=r"'triton' cannot run here: a layer 28672 wide.*Or choose 'auto'"):
        choose_backend("triton", torch.device("cuda"), [(28672, 1)])


def test_a_named_backend_that_cannot_run_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'cuquantum' cannot run here: .*'auto'"):
        choose_backend("cuquantum", CPU)
    with pytest.raises(ValueError, match="for checking, not for serving"):
        choose_backend("reference", CPU)
    with pytest.raises(ValueError, match="unknown circuit backend 'cup'"):
        choose_backend("cup", CPU)
