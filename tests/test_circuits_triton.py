"""The triton backend beyond the suite of all backends: tables, deep circuits, ends of ranges, launches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import triton_interpreter
from circuits_support import TOLERANCE, assert_close, fresh_generator, random_theta, random_x

from qaa_serve.circuits import ANSATZ_NAMES, Ansatz, get_backend
from qaa_serve.circuits.triton.host import (
    MOST_QUBITS,
    Shape,
    TritonCircuits,
    choose_shape,
    launch_cycles,
    layout_for,
    make_tables,
    missing,
    pack,
    plan_table,
    shapes,
)

pytest.importorskip("triton", reason="the triton backend needs triton")

CPU = torch.device("cpu")


@pytest.fixture
def generator() -> torch.Generator:
    return fresh_generator()


# -------------------------------------------------------------------------------------- what runs elsewhere


def put_in_turn(x: torch.Tensor, theta: torch.Tensor, ansatz: Ansatz) -> list[torch.Tensor]:
    """z of every token on each of five circuits: empty; then with circuits 1 and 2; then with 2 replaced."""
    circuits = TritonCircuits(ansatz, 5, CPU)
    index = torch.arange(5, dtype=torch.int32).expand(len(x), -1)
    found = [circuits.run(x, index)]
    for first, angles in ((1, theta[:2]), (2, theta[2:])):
        circuits.put(first, angles)
        found.append(circuits.run(x, index))
    return found


# ---------------------------------------------------------------------------------------------- with numbers


def test_circuits_are_empty_until_put_in_and_can_be_replaced(generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 1)
    x = random_x(generator, 2, 7, torch.float32)
    theta = random_theta(generator, 3, ansatz, torch.float32)
    empty, two, replaced = triton_interpreter.call(put_in_turn, x, theta, ansatz)
    expected = get_backend("reference")(x, theta, ansatz, None)
    assert (empty == 0).all()
    for found, there in ((two, {1: 0, 2: 1}), (replaced, {1: 0, 2: 2})):
        for circuit in range(5):
            right = expected[:, there[circuit]] if circuit in there else torch.zeros(2, 3)
            assert_close(found[:, circuit], right, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["ry_ring", "ryrz_ring_ry"])
def test_deep_circuits_neither_overflow_nor_lose_precision(name: str, generator: torch.Generator) -> None:
    """Angles of a quarter turn are what a tangent makes the state grow most with: 2**(7 * 40 / 2) in all."""
    ansatz = Ansatz(name, 7, 40)
    x = random_x(generator, 1, 100, torch.float32)
    theta = random_theta(generator, 2, ansatz, torch.float32)
    theta[0] = math.pi / 2 * theta[0].sign()
    expected = get_backend("reference")(x, theta, ansatz, None)
    found = triton_interpreter.expectation_values(x, theta, ansatz)
    assert_close(found, expected, 2 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["ryrz_ring_ry", "strongly_entangling"])
def test_angles_of_many_turns(name: str, generator: torch.Generator) -> None:
    ansatz = Ansatz(name, 4, 3, readouts=10)
    x = random_x(generator, 2, 13, torch.float32)
    theta = 10 * random_theta(generator, 3, ansatz)
    theta[1] = (theta[1] / math.pi).round() * math.pi  # nothing but Paulis, up to phases
    theta[2] = (theta[2] / math.pi).round() * math.pi / 2  # at the ends of what a tangent is taken of
    expected = get_backend("reference")(x, theta, ansatz, None)
    found = triton_interpreter.expectation_values(x, theta, ansatz)
    assert_close(found, expected, TOLERANCE[torch.float32])


def test_the_widest_state(generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", MOST_QUBITS, 2)
    x = random_x(generator, 1, 14336, torch.bfloat16)  # the input of a Llama 3 8B's down_proj
    theta = random_theta(generator, 1, ansatz, torch.float32)
    expected = get_backend("reference")(x, theta, ansatz, None)
    assert_close(triton_interpreter.expectation_values(x, theta, ansatz), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("size", [1e-44, 1e-38, 3e38])
def test_numbers_at_the_ends_of_float32(size: float, generator: torch.Generator) -> None:
    ansatz = Ansatz("ryrz_ring_ry", 3, 2)
    x = random_x(generator, 3, 7, torch.float32).sign() * size
    theta = random_theta(generator, 1, ansatz, torch.float32)
    expected = get_backend("reference")(x, theta, ansatz, None)
    assert_close(triton_interpreter.expectation_values(x, theta, ansatz), expected, TOLERANCE[torch.float32])


def test_a_nan_stays_visible() -> None:
    ansatz = Ansatz("ryrz_ring_ry", 2, 1)
    x = torch.tensor([[1.0, math.nan, 2.0], [1.0, 2.0, 3.0]])
    z = triton_interpreter.expectation_values(x, torch.ones(1, *ansatz.theta_shape), ansatz)
    assert z[0].isnan().all()
    assert not z[1].isnan().any()


def test_circuits_of_all_forms_fit_the_room_made_for_their_number_of_layers(generator: torch.Generator) -> None:
    layout = layout_for(6, 50, 3, rank=16, layers=4)
    for name in ANSATZ_NAMES:
        for heads, layers in ((1, 4), (2, 2), (4, 1)):
            ansatz = Ansatz(name, 6, layers, 4)
            theta = random_theta(generator, 3 * heads, ansatz).unflatten(0, (3, heads))
            assert pack(theta, ansatz, layout).shape == (3, layout.record)
    deep = Ansatz("strongly_entangling", 6, 5)
    with pytest.raises(ValueError, match=r"1 x 5 layers of strongly_entangling take \d+ numbers in \d+ steps"):
        pack(random_theta(generator, 1, deep)[None], deep, layout)
    many = Ansatz("ryrz_ring_ry", 6, 4)
    with pytest.raises(ValueError, match=r"9 x 4 layers of ryrz_ring_ry"):
        pack(random_theta(generator, 9, many)[None], many, layout)


def test_no_part_of_a_record_reaches_into_the_next_one(generator: torch.Generator) -> None:
    """Filled to the brim, whatever the kernel may write to or read is its own."""
    layout = layout_for(3, 8, 2, rank=6, layers=2)
    ansatz = Ansatz("strongly_entangling", 3, 2, readouts=6)
    (record,) = pack(random_theta(generator, 1, ansatz)[None], ansatz, layout, torch.ones(1, 2, 6))
    ends = [layout.masks_at, layout.readouts_at, layout.tables_at, layout.record, layout.inputs_at]
    assert ends == sorted(ends)
    assert layout.masks_at + layout.padded <= layout.readouts_at
    assert layout.readouts_at + 2 * layout.rank <= layout.tables_at
    assert layout.tables_at + plan_table(ansatz).floats <= len(record) == layout.record
    assert layout.inputs_at + 2 * layout.width <= layout.words


# --------------------------------------------------------------------------------------------- without numbers


class Launches:
    """Stands for the kernel and keeps what it is launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.grids.append(grid)


def test_a_run_is_one_launch_that_depends_on_shapes_alone() -> None:
    """Tensors without memory: whatever looked at a number of theirs, or waited for it, would raise."""
    meta = torch.device("meta")
    circuits = TritonCircuits(Ansatz("ryrz_ring_ry", 9, 2, constant=True, length=True), 8, meta)
    circuits._kernel = launches = Launches()
    z = circuits.run(torch.empty(7, 300, device=meta), torch.empty(7, 3, dtype=torch.int32, device=meta))
    assert launches.grids == [(7, 3)]
    assert z.shape == (7, 3, 9)
    assert z.dtype == torch.float32
    assert circuits.run(z[:0, 0], torch.empty(0, 3, dtype=torch.int32, device=meta)).shape == (0, 3, 9)
    assert len(launches.grids) == 1


def test_a_wave_takes_what_its_schedulers_start_and_no_less_than_a_program_alone() -> None:
    """Four schedulers, a program of eight warps: two on each, or six of three programs."""
    shape = Shape(warps=8, registers=None, instructions=1000, barriers=10, resident=3)
    alone = 2 * 1000 + 40 * 10
    assert launch_cycles(shape, 1, 100) == launch_cycles(shape, 100, 100) == alone
    assert launch_cycles(shape, 101, 100) == 4 * 1000
    assert launch_cycles(shape, 300, 100) == 6 * 1000
    assert launch_cycles(shape, 301, 100) == 6 * 1000 + alone
    assert launch_cycles(shape, 3000, 100) == 10 * 6 * 1000


@pytest.mark.parametrize("qubits", range(1, MOST_QUBITS + 1))
def test_few_programs_get_more_warps_and_many_the_shape_that_is_best_for_all(qubits: int) -> None:
    many, *few = shapes(qubits)
    assert choose_shape(qubits, 100_000, 132) == many
    assert choose_shape(qubits, 1, 132) == (few or [many])[0]
    for shape in shapes(qubits):
        assert shape.warps * shape.resident <= 64, "a multiprocessor has room for 64 warps"
        assert shape.registers is None or 32 * shape.warps * shape.registers * shape.resident <= 65536


@pytest.mark.parametrize("name", ["ryrz_ring_ry", "ry_ring", "strongly_entangling"])
def test_a_table_is_as_long_as_the_kernel_takes_it_for(name: str, generator: torch.Generator) -> None:
    for qubits, layers in ((1, 1), (5, 40), (12, 2)):
        ansatz = Ansatz(name, qubits, layers)
        tables = make_tables(random_theta(generator, 3, ansatz), ansatz)
        assert tables.shape == (3, plan_table(ansatz).floats)
        assert tables.abs().max() <= 1
    assert TritonCircuits(ansatz, 3, CPU).nbytes < 3 * 8192, "a circuit's record is small"


def test_what_it_cannot_run_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert missing(torch.device("cuda")) is None
    assert "needs a GPU" in str(missing(CPU))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert missing(CPU) is None
    monkeypatch.setattr("qaa_serve.circuits.triton.host.find_spec", lambda name: None)
    assert "pip install triton" in str(missing(torch.device("cuda")))
    with pytest.raises(ValueError, match=r"at most 14 qubits, not 15; choose another"):
        TritonCircuits(Ansatz("ry_ring", 15, 1), 1, CPU)
    ansatz = Ansatz("ry_ring", 3, 1)
    with pytest.raises(ValueError, match=r"theta has shape \(1, 2, 3\)"):
        TritonCircuits(ansatz, 1, CPU).put(0, torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match=r"x is 9 wide; 3 qubits hold at most 8"):
        TritonCircuits(ansatz, 1, CPU).run(torch.zeros(1, 9), torch.zeros(1, 1, dtype=torch.int32))
