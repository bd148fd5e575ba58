"""What only the backend ``cuquantum`` has: the calls it makes, its buffers and streams, what may be missing."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
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
from custatevec_interpreter import Interpreter, InterpreterError, Stream, interpreted, memory
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qaa_serve.circuits import ANSATZ_NAMES, Ansatz, custatevec
from qaa_serve.circuits.custatevec import CuStateVecCircuits, missing

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
SINGLE = TOLERANCE[torch.float32]


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


@pytest.fixture
def library() -> Iterator[Interpreter]:
    with interpreted() as interpreter:
        yield interpreter


def circuits_with(theta: torch.Tensor, ansatz: Ansatz, count: int | None = None) -> CuStateVecCircuits:
    circuits = CuStateVecCircuits(ansatz, count or len(theta), CPU)
    circuits.put(0, theta)
    return circuits


def numbers(*index: list[int]) -> torch.Tensor:
    return torch.tensor(index, dtype=torch.int32)


# ------------------------------------------------------------------------------------- the calls themselves


def rotation(angle: float, phase: float) -> np.ndarray[Any, Any]:
    """RY(angle), then RZ(phase), written out."""
    c, s = math.cos(angle / 2), math.sin(angle / 2)
    return np.diag([np.exp(-0.5j * phase), np.exp(0.5j * phase)]) @ np.array([[c, -s], [s, c]])


def test_arguments_of_a_small_case(library: Interpreter, generator: torch.Generator) -> None:
    """Seven qubits: wires 0 to 3 are bits 6 to 3, wires 4 to 6 are bits 2 to 0."""
    ansatz = Ansatz("ryrz_ring_ry", 7, 1)
    theta = random_theta(generator, 2, ansatz, torch.float32)
    circuits = circuits_with(theta, ansatz, count=3)
    circuits.run(random_x(generator, 3, 100), numbers([1, -1], [0, 1], [2, 7]))

    assert [call.arguments["targets"] for call in library.applied] == 2 * [(3, 4, 5, 6), (0, 1, 2)]
    for call in library.applied:
        given = call.arguments
        assert given["sv_data_type"] == given["matrix_data_type"] == 4
        assert (given["n_index_bits"], given["n_svs"], given["sv_stride"]) == (7, 6, 128)
        assert given["map_type"] == library.MatrixMapType.MATRIX_INDEXED
        assert given["layout"] == library.MatrixLayout.ROW
        assert (given["adjoint"], given["n_controls"], given["n_matrices"]) == (0, 0, 4)
        assert given["n_targets"] == len(given["targets"])
        assert given["compute_type"] == library.ComputeType.COMPUTE_32F
        assert call.indices == [1, 3, 0, 1, 2, 3], "-1 and 7 go to the spare circuit, 2 has no angles yet"

    turns, closing = library.applied[:2], library.applied[2:]
    for circuit in range(2):
        angles = theta[circuit].tolist()
        for calls, phases in ((turns, angles[1]), (closing, 7 * [0.0])):
            gates = [rotation(*pair) for pair in zip(angles[0 if calls is turns else 2], phases, strict=True)]
            for call, wires in zip(calls, (range(4), range(4, 7)), strict=True):
                expected = np.ones((1, 1))
                for wire in wires:
                    expected = np.kron(expected, gates[wire])
                np.testing.assert_allclose(call.matrices[circuit], expected, atol=1e-7)
    assert all((call.matrices[2:] == 0).all() for call in library.applied)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize(("qubits", "groups"), [(1, 1), (5, 1), (6, 2), (8, 2), (10, 2), (12, 3), (16, 4)])
def test_number_of_calls(
    library: Interpreter, name: str, qubits: int, groups: int, layers: int, generator: torch.Generator
) -> None:
    """One for each group of qubits and layer of rotations, whatever the batch; one qubit has no rings between."""
    ansatz = Ansatz(name, qubits, layers)
    circuits = circuits_with(random_theta(generator, 4, ansatz), ansatz)
    circuits.run(random_x(generator, 3, 2**qubits), numbers([0], [2], [3]))
    rotations = 1 if qubits == 1 else layers + (name == "ryrz_ring_ry")
    assert len(library.applied) == groups * rotations
    sizes = [call.arguments["n_targets"] for call in library.applied[:groups]]
    assert sum(sizes) == qubits
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 5


@pytest.mark.parametrize("qubits", [1, 2, 3, 4, 5])
def test_states_are_aligned_as_blackwell_wants_them(
    library: Interpreter, qubits: int, generator: torch.Generator
) -> None:
    ansatz = Ansatz("strongly_entangling", qubits, 2)
    theta = random_theta(generator, 1, ansatz)
    x = random_x(generator, 3, 2**qubits)
    z = circuits_with(theta, ansatz).run(x, numbers([0], [0], [0]))
    assert {call.arguments["sv_stride"] for call in library.applied} == {max(16, 2**qubits)}
    assert_close(z, judge(x, theta, ansatz), SINGLE)


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [2, 6, 9])
def test_a_wrong_bit_order_shows(
    library: Interpreter, name: str, qubits: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Targets the other way round: what a backend that counted bits from the wrong end would ask for."""
    ansatz = Ansatz(name, qubits, 2)
    theta, x = random_theta(generator, 1, ansatz), random_x(generator, 8, width_for(qubits))
    expected = judge(x, theta, ansatz)
    right = library.apply_matrix_batched
    wrong: dict[str, Callable[[list[int]], list[int]]] = {
        "within a matrix": lambda targets: targets[::-1],
        "from the other end": lambda targets: [qubits - 1 - bit for bit in targets],
    }
    for mistake, change in wrong.items():

        def mistaken(*, targets: Any, change: Any = change, **others: Any) -> None:
            right(targets=change(list(targets)), **others)

        monkeypatch.setattr(library, "apply_matrix_batched", mistaken)
        z = circuits_with(theta, ansatz).run(x, torch.zeros(8, 1, dtype=torch.int32))
        assert (z - expected).abs().max() > 100 * SINGLE, mistake


@pytest.mark.parametrize(
    "change",
    [
        {"layout": 0},
        {"adjoint": 1},
        {"map_type": 0},
        {"sv_stride": 2**6 + 1},
        {"n_index_bits": 7},
        {"n_matrices": 1},
        {"matrix_data_type": 0},
        {"sv_data_type": 5},
        {"compute_type": 16},
        {"n_targets": 2},
        {"targets": (0, 0, 1)},
        {"targets": (4, 5, 6)},
        {"matrices": 0},
        {"extra_workspace_size_in_bytes": 16},
        {"handle": 1},
    ],
    ids=str,
)
def test_the_interpreter_notices_each_wrong_argument(
    library: Interpreter, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Either it refuses the call or z is wrong. None of these makes it leave the memory it is given."""
    ansatz = Ansatz("ryrz_ring_ry", 6, 1)
    theta, x = random_theta(generator, 4, ansatz), random_x(generator, 4, 50)
    index = numbers([3], [1], [2], [1])
    circuits = circuits_with(theta, ansatz)
    right = library.apply_matrix_batched

    def mistaken(**arguments: Any) -> None:
        right(**arguments | change)

    monkeypatch.setattr(library, "apply_matrix_batched", mistaken)
    try:
        z = circuits.run(x, index)
    except InterpreterError:
        return
    assert not torch.allclose(z.double(), judge(x, theta, ansatz, index), rtol=0, atol=100 * SINGLE)


# ---------------------------------------------------------------------------- the calls and the real library


@pytest.fixture(scope="module")
def bindings() -> Iterator[Any]:
    """cuquantum.bindings.custatevec. The package around it is not imported: it needs more of CUDA."""
    found = importlib.util.find_spec("cuquantum")
    if found is None or not found.submodule_search_locations:
        pytest.skip("cuquantum-python-cu13 is not installed")
    before = set(sys.modules)
    if "cuquantum" not in before:
        for name, end in (("cuquantum", ""), ("cuquantum.bindings", "/bindings")):
            stub = ModuleType(name)
            stub.__path__ = [folder + end for folder in found.submodule_search_locations]
            sys.modules[name] = stub
    try:
        yield importlib.import_module("cuquantum.bindings.custatevec")
    except ImportError as error:
        pytest.skip(f"cuquantum-python-cu13 is installed in part: {error}")
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "cuquantum":
                del sys.modules[name]


CALLS = ("create", "destroy", "set_stream", "apply_matrix_batched", "apply_matrix_batched_get_workspace_size")
#: What is said where a library is missing.
MISSING = r"libcublasLt\.so|libcustatevec\.so"
ENUMERATIONS = ("MatrixMapType", "MatrixLayout", "ComputeType")


class Checked:
    """The interpreter behind the real bindings: what the backend asks for must be there and take what it is given.

    Enumerations are the real ones. A real function binds the arguments and turns them into C's types before it
    looks for the library; where the library cannot be loaded that is as far as it gets, so it is called too.
    """

    def __init__(self, interpreter: Interpreter, bindings: Any, loadable: bool):
        self._interpreter, self._bindings, self._loadable = interpreter, bindings, loadable
        self.used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._bindings, name)
        self.used.add(name)
        if inspect.isclass(real):
            return real

        def call(*positional: Any, **named: Any) -> Any:
            inspect.signature(real).bind(*positional, **named)
            if not self._loadable:
                with pytest.raises(RuntimeError, match=MISSING):
                    real(*positional, **named)
            return getattr(self._interpreter, name)(*positional, **named)

        return call


def loads(bindings: Any) -> bool:
    """Whether cuStateVec's library, and the cuBLAS that it needs, can be loaded."""
    try:
        bindings.get_version()
    except RuntimeError as error:  # cuda.pathfinder's DynamicLibNotFoundError
        if re.search(MISSING, str(error)):
            return False
        raise
    return True


def test_the_real_bindings_take_what_the_backend_gives_them(
    bindings: Any, library: Interpreter, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """The whole life of a session: all calls, by name and by place, and the values of the enumerators."""
    checked = Checked(library, bindings, loads(bindings))
    monkeypatch.setattr(custatevec, "_library", lambda: checked)
    ansatz = Ansatz("ryrz_ring_ry", 7, 2, readouts=3)
    theta, x = random_theta(generator, 2, ansatz), random_x(generator, 3, 100)
    index = numbers([1], [0], [-1])
    z: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: z.append(circuits_with(theta, ansatz).run(x, index)))
    thread.start()  # whose end ends the session
    thread.join()
    assert_close(z[0], judge(x, theta, ansatz, index), SINGLE)
    assert not library.streams
    assert checked.used == {*CALLS, *ENUMERATIONS}


def test_the_real_bindings_notice_what_they_cannot_take(bindings: Any, library: Interpreter) -> None:
    checked = Checked(library, bindings, loads(bindings))
    with pytest.raises(AttributeError):
        checked.apply_matrices_batched()
    with pytest.raises(TypeError):
        checked.set_stream(1, stream=2)
    if not checked._loadable:
        with pytest.raises(TypeError):
            checked.set_stream(1, 7.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the library starts")
def test_what_the_real_library_says_without_a_gpu(
    bindings: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as torch can tell there is a GPU; the library finds that cuBLAS, or else the driver, is missing."""
    monkeypatch.setattr(custatevec, "_library", lambda: bindings)
    reason = str(missing(CUDA))
    if loads(bindings):
        assert "cuStateVec does not start on cuda:0 (cuStateVecError: NOT_INITIALIZED (1)" in reason
        assert "version 580" in reason
    else:
        assert "cuStateVec does not start on cuda:0 (DynamicLibNotFoundError: " in reason
        assert "pip install custatevec-cu13 nvidia-cublas" in reason


@pytest.mark.parametrize("name", CALLS)
def test_the_real_calls_have_the_interpreters_parameters(bindings: Any, name: str) -> None:
    ours = inspect.signature(getattr(Interpreter(), name))
    assert list(inspect.signature(getattr(bindings, name)).parameters) == list(ours.parameters)


@pytest.mark.parametrize("name", ENUMERATIONS)
def test_the_real_enumerators_have_the_interpreters_values(bindings: Any, name: str) -> None:
    ours, real = getattr(Interpreter, name), getattr(bindings, name)
    assert {member.name: int(member) for member in real} == {member.name: int(member) for member in ours}


def test_the_real_data_type_has_the_value_that_is_used(bindings: Any) -> None:
    types = sys.modules["cuquantum.bindings._utils"].cudaDataType  # type: ignore[attr-defined]
    assert int(types.CUDA_C_32F) == custatevec._CUDA_C_32F


# ------------------------------------------------------------------------------------ buffers and parts


def test_buffers_are_kept_until_a_larger_batch_comes(library: Interpreter, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 6, 2)
    theta = random_theta(generator, 2, ansatz)
    circuits = circuits_with(theta, ansatz)

    def run(tokens: int) -> tuple[int, int]:
        """Address of the states and of the workspace that a batch of so many tokens is given."""
        library.applied.clear()
        x, index = random_x(generator, tokens, 50), torch.randint(2, (tokens, 1), generator=generator)
        assert_close(circuits.run(x, index), judge(x, theta, ansatz, index), SINGLE)
        (states,) = {call.arguments["batched_sv"] for call in library.applied[:2]}
        (workspace,) = {call.arguments["extra_workspace"] for call in library.applied}
        return states, workspace

    small = run(5)
    assert run(5) == run(3) == small
    large = run(300)
    assert large[0] != small[0]
    assert run(5) == run(300) == large


def test_workspace_is_asked_for_once_a_shape(library: Interpreter, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 9, 2)  # groups of five and four qubits
    circuits = circuits_with(random_theta(generator, 2, ansatz), ansatz)
    for tokens, asked in ((4, 2), (4, 2), (2, 4), (4, 4), (2, 4)):
        circuits.run(random_x(generator, tokens, 400), torch.zeros(tokens, 1, dtype=torch.int32))
        assert library.asked == asked


def test_circuits_of_several_forms_share_the_buffers(library: Interpreter, generator: torch.Generator) -> None:
    forms = [Ansatz("ryrz_ring_ry", 7, 2), Ansatz("ry_ring", 4, 1), Ansatz("strongly_entangling", 2, 2)]
    thetas = [random_theta(generator, 2, form) for form in forms]
    circuits = [circuits_with(theta, form) for theta, form in zip(thetas, forms, strict=True)]
    index = numbers([0, 1], [1, -1], [0, 0])
    for _ in range(2):
        for form, theta, made in zip(forms, thetas, circuits, strict=True):
            x = random_x(generator, 3, width_for(form.qubits))
            assert_close(made.run(x, index), judge(x, theta, form, index), SINGLE)
    assert len({call.arguments["handle"] for call in library.applied}) == 1


@pytest.mark.parametrize("options", [{}, {"constant": True, "length": True, "readouts": 8}], ids=["plain", "all"])
@pytest.mark.parametrize(("most", "parts"), [(2**20, 1), (7 * 64, 3), (2 * 64, 7), (1, 7)])
def test_large_batches_run_in_parts(
    library: Interpreter,
    most: int,
    parts: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    """Seven tokens of two readouts: a part holds whole tokens, and one at least."""
    monkeypatch.setattr(custatevec, "_MOST_AMPLITUDES", most)
    ansatz = Ansatz("ry_ring", 6, 1, **options)
    theta, x = random_theta(generator, 3, ansatz), random_x(generator, 7, 50)
    index = torch.randint(-1, 3, (7, 2), generator=generator)
    z = circuits_with(theta, ansatz).run(x, index)
    assert_close(z, judge(x, theta, ansatz, index), 10 * SINGLE)  # times a length of up to 2
    assert len(library.applied) == 2 * parts  # two groups of qubits
    assert sum(call.arguments["n_svs"] for call in library.applied) == 2 * 14


def test_parts_keep_within_their_memory(library: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custatevec, "_MOST_AMPLITUDES", 2**10)
    circuits = CuStateVecCircuits(Ansatz("ry_ring", 5, 1), 1, CPU)
    circuits.run(torch.ones(1000, 32), torch.zeros(1000, 1, dtype=torch.int32))
    assert custatevec._session(CPU)._states.shape == (2, 2**10)


# ------------------------------------------------------------------------ circuits that are not there


def test_a_number_that_is_not_there_gives_zeros(library: Interpreter, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 1)
    theta, x = random_theta(generator, 2, ansatz), random_x(generator, 3, 13)
    circuits = circuits_with(theta, ansatz)
    z = circuits.run(x, numbers([0, 2], [-7, 1], [2**31 - 1, -(2**31)]))
    assert_close(z, judge(x, theta, ansatz, numbers([0, -1], [-1, 1], [-1, -1])), SINGLE)
    assert (z[[0, 1, 2, 2], [1, 0, 0, 1]] == 0).all()


def test_no_circuit_gives_zeros_even_where_x_is_not_finite(
    library: Interpreter, generator: torch.Generator
) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 4, 1, length=True)
    theta, x = random_theta(generator, 1, ansatz), random_x(generator, 4, 13)
    x[1], x[2, 3] = torch.nan, torch.inf
    index = numbers([0], [-1], [1], [0])
    z = circuits_with(theta, ansatz, count=2).run(x, index)
    assert (z[[1, 2]] == 0).all()
    x[1:3] = 0
    assert_close(z, judge(x, theta, ansatz, numbers([0], [-1], [-1], [0])), 10 * SINGLE)


def test_circuits_can_be_put_one_after_the_other_and_again(
    library: Interpreter, generator: torch.Generator
) -> None:
    ansatz = Ansatz("strongly_entangling", 3, 2)
    theta, x = random_theta(generator, 3, ansatz), random_x(generator, 2, 7)
    circuits = CuStateVecCircuits(ansatz, 3, CPU)
    every = numbers([0, 1, 2], [0, 1, 2])
    assert (circuits.run(x, every) == 0).all()
    circuits.put(1, theta[:2])
    expected = judge(x, theta, ansatz)
    assert (circuits.run(x, every)[:, 0] == 0).all()
    assert_close(circuits.run(x, every)[:, 1:], expected[:, :2], SINGLE)
    circuits.put(0, theta[2:])
    circuits.put(2, theta[:1])
    assert_close(circuits.run(x, every), expected[:, [2, 0, 0]], SINGLE)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (3, 1), (2, 2), (0, 4)])
def test_circuits_that_are_not_there_cannot_be_put(library: Interpreter, first: int, count: int) -> None:
    """One behind the last would be the spare circuit."""
    circuits = CuStateVecCircuits(Ansatz("ry_ring", 3, 1), 3, CPU)
    with pytest.raises(IndexError, match="there are 3 circuits"):
        circuits.put(first, torch.zeros(count, 1, 3))


def test_angles_of_another_shape_cannot_be_put(library: Interpreter) -> None:
    with pytest.raises(ValueError, match=r"theta has shape \(1, 2, 3\)"):
        CuStateVecCircuits(Ansatz("ry_ring", 3, 1), 1, CPU).put(0, torch.zeros(1, 2, 3))


def test_bytes_of_the_tables(library: Interpreter) -> None:
    """Three layers of two matrices, of 32 x 32 and 16 x 16 complex64, for two circuits and the spare one."""
    assert CuStateVecCircuits(Ansatz("ryrz_ring_ry", 9, 2), 2, CPU).nbytes == 3 * 3 * (32**2 + 16**2) * 8


# ---------------------------------------------------------------------------- streams, threads, modes


def test_work_goes_to_the_current_stream(
    library: Interpreter, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 1)
    theta, x = random_theta(generator, 1, ansatz), random_x(generator, 2, 7)
    circuits = circuits_with(theta, ansatz)
    expected = judge(x, theta, ansatz)
    main, other = Stream(11), Stream(12)
    asked: list[torch.device] = []
    for current in (main, main, other, other, main):

        def current_stream(device: torch.device, current: Stream = current) -> Stream:
            asked.append(device)
            return current

        monkeypatch.setattr(custatevec, "_current_stream", current_stream)
        assert_close(circuits.run(x, numbers([0], [0])), expected, SINGLE)
        assert set(library.streams.values()) == {current.cuda_stream}
    assert [stream for _, stream in library.set_streams] == [11, 12, 11], "set when it changes, and only then"
    assert asked == 5 * [CPU]
    assert (main.waited_for, other.waited_for) == ([other], [main])


def test_memory_is_made_anew_for_another_stream(
    library: Interpreter, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    circuits = CuStateVecCircuits(Ansatz("ry_ring", 5, 1), 1, CPU)
    x, index = random_x(generator, 2, 32), numbers([0], [0])
    circuits.run(x, index)
    before = custatevec._session(CPU)._states  # held, so that its address is not given out again
    monkeypatch.setattr(custatevec, "_current_stream", lambda device: Stream(12))
    circuits.run(x, index)
    assert custatevec._session(CPU)._states.data_ptr() != before.data_ptr()


def test_each_thread_has_a_handle_that_ends_with_it(library: Interpreter, generator: torch.Generator) -> None:
    ansatz = Ansatz("ry_ring", 3, 1)
    theta, x = random_theta(generator, 1, ansatz), random_x(generator, 2, 7)
    circuits = circuits_with(theta, ansatz)
    results: list[torch.Tensor] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: results.append(circuits.run(x, numbers([0], [0]))))
        thread.start()
        thread.join()
    for z in (*results, circuits.run(x, numbers([0], [0]))):
        assert_close(z, judge(x, theta, ansatz), SINGLE)
    assert len(library.owners) == 3
    assert len(library.streams) == 1, "the handles of the threads that ended are destroyed"


@pytest.mark.parametrize("made_in", [False, True])
def test_inference_mode_can_be_on_or_off(library: Interpreter, made_in: bool, generator: torch.Generator) -> None:
    """vLLM runs models in inference mode; tensors made there cannot be written to outside it."""
    ansatz = Ansatz("ryrz_ring_ry", 5, 2)
    theta, x = random_theta(generator, 1, ansatz), random_x(generator, 20, 32)
    with torch.inference_mode(made_in):
        circuits = circuits_with(theta, ansatz)
    for tokens, inside in ((3, made_in), (3, not made_in), (20, made_in), (20, not made_in)):
        with torch.inference_mode(inside):
            circuits.put(0, theta)
            z = circuits.run(x[:tokens], torch.zeros(tokens, 1, dtype=torch.int32))
        assert_close(z, judge(x[:tokens], theta, ansatz), SINGLE)


def test_nothing_is_differentiated(library: Interpreter, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 1, length=True)
    theta, x = random_theta(generator, 1, ansatz).requires_grad_(), random_x(generator, 2, 7).requires_grad_()
    assert not circuits_with(theta, ansatz).run(x, numbers([0], [0])).requires_grad


class NoCopiesToTheHost(TorchFunctionMode):
    """Methods that give numbers to Python. Some read a CPU tensor without any operation of torch's."""

    FORBIDDEN = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Operations whose CUDA kernels wait for the device: results of unknown size, numbers, other devices."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "masked_select", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{func} waits for the device"
        assert kwargs.get("device", CPU) == CPU
        if name in ("index", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), (
                f"{func} by a mask waits for the device"
            )
        return func(*args, **kwargs)


@pytest.mark.parametrize("mistake", ["item", "tolist", "mask", "unique"])
def test_waiting_would_be_noticed(mistake: str) -> None:
    numbers_of = torch.arange(3)
    ways: dict[str, Callable[[], object]] = {
        "item": lambda: int(numbers_of.max()),
        "tolist": lambda: numbers_of.tolist(),
        "mask": lambda: numbers_of[numbers_of > 1],
        "unique": lambda: torch.unique(numbers_of),
    }
    with pytest.raises(AssertionError, match="waits for the device"), NoCopiesToTheHost(), NoWaiting():
        ways[mistake]()


@pytest.mark.parametrize("name", ANSATZ_NAMES)
def test_a_run_does_not_wait_for_the_device(
    library: Interpreter, name: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr(custatevec, "_MOST_AMPLITUDES", 2**9)
    ansatz = Ansatz(name, 6, 2, constant=True, length=True, readouts=8)
    theta, x = random_theta(generator, 3, ansatz), random_x(generator, 9, 50, torch.bfloat16)
    index = torch.randint(-1, 4, (9, 2), generator=generator, dtype=torch.int32)
    circuits = circuits_with(theta, ansatz)
    with NoCopiesToTheHost(), NoWaiting():
        z = circuits.run(x, index)
    assert_close(z, judge(x, theta, ansatz, index.masked_fill(index == 3, -1)), 10 * SINGLE)


@pytest.mark.gpu
def test_on_a_gpu_a_run_does_not_wait_either(generator: torch.Generator) -> None:
    if reason := missing(CUDA):
        pytest.skip(reason)
    ansatz = Ansatz("ryrz_ring_ry", 10, 2)
    circuits = CuStateVecCircuits(ansatz, 3, CUDA)
    circuits.put(0, random_theta(generator, 3, ansatz))
    x, index = random_x(generator, 64, 1000).to(CUDA), torch.randint(-1, 3, (64, 3), generator=generator).to(CUDA)
    circuits.run(x, index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        circuits.run(x, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------------------- what may be missing


class DynamicLibNotFoundError(RuntimeError):
    """As cuda.pathfinder's, which the bindings raise at the first call."""


class cuStateVecError(Exception):  # noqa: N801
    """As the bindings'."""


def fault(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: object) -> Any:
        raise error

    return fail


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as torch can tell, there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_another_device_is_not_for_it(kind: str) -> None:
    assert missing(torch.device(kind)) == f"cuStateVec computes on an NVIDIA GPU, not on a {kind}"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no NVIDIA GPU" in str(missing(torch.device("cuda")))


def test_without_the_package_it_names_it(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [name for name in sys.modules if name.startswith("cuquantum.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "cuquantum", None)  # what makes an import fail
    reason = str(missing(CUDA))
    assert "ModuleNotFoundError" in reason
    assert "cuquantum-python-cu13" in reason
    assert "pip install 'qaa-serve[cuda]'" in reason


def test_an_import_that_fails_otherwise_is_told(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custatevec, "_library", fault(RuntimeError("no such symbol")))
    assert "cannot be imported (RuntimeError: no such symbol)" in str(missing(CUDA))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (cuStateVecError("NOT_INITIALIZED (1): initialization error"), "version 580"),
        (
            DynamicLibNotFoundError('Failure finding "libcublasLt.so.13"\n'),
            "pip install custatevec-cu13 nvidia-cublas",
        ),
        (cuStateVecError("ARCH_MISMATCH (4): device"), "choose another backend"),
        (cuStateVecError("ALLOC_FAILED (2): memory"), "--gpu-memory-utilization"),
        (cuStateVecError("INTERNAL_ERROR (6): unknown"), "see its documentation"),
        (RuntimeError("CUDA error"), "see its documentation"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_library_that_does_not_start_is_told_with_its_remedy(
    gpu: None, error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custatevec, "_library", lambda: SimpleNamespace(create=fault(error)))
    reason = str(missing(CUDA))
    assert reason.startswith("cuStateVec does not start on cuda:0 (")
    assert f"{type(error).__name__}: {str(error).strip()}" in reason
    assert remedy in reason
    assert "\n" not in reason


def test_where_all_is_there_nothing_is_missing(gpu: None, library: Interpreter) -> None:
    assert missing(CUDA) is None
    assert library.streams == {}, "the handle of the attempt is destroyed"


# ----------------------------------------------------------------------------------- the interpreter itself


def test_the_interpreter_applies_a_matrix_to_the_bits_it_is_given() -> None:
    """A state of three bits by hand: the matrix takes 01 to 10, read as (second target, first target)."""
    interpreter = Interpreter()
    states = torch.zeros(2, 16, dtype=torch.complex64)
    states[0, 0b001] = states[1, 0b101] = 1  # bit 0 is set; of the second state bit 2 too
    matrix = torch.zeros(1, 4, 4, dtype=torch.complex64)
    matrix[0, 0b10, 0b01] = 1j
    handle = interpreter.create()
    interpreter.apply_matrix_batched(
        handle,
        states.data_ptr(),
        4,
        3,
        2,
        16,
        0,
        0,
        matrix.data_ptr(),
        4,
        1,
        0,
        1,
        [0, 2],
        2,
        [1],
        [0],
        1,
        4,
        0,
        0,
    )
    assert states[0].nonzero().tolist() == [[0b100]]
    assert states[0, 0b100] == 1j
    assert not states[1].any(), "11 goes nowhere"


def test_the_interpreter_reads_memory_in_place() -> None:
    tensor = torch.arange(4, dtype=torch.int32)
    memory(tensor.data_ptr(), 4, np.dtype(np.int32))[2] = 7
    assert tensor.tolist() == [0, 1, 7, 3]
