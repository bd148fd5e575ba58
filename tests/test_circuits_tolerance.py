"""The tolerance means something: each mistake one can make in a circuit moves z far beyond it."""

from __future__ import annotations

import pennylane as qml
import pytest
import torch
from circuits_support import (
    TOLERANCE,
    judge,
    operations,
    pennylane_z,
    random_theta,
    random_x,
    width_for,
)

from qaa_serve.circuits import ANSATZ_NAMES, Ansatz

#: How far beyond: the smallest shift below is this many times the float32 tolerance.
MARGIN = 100
TOKENS = 8


def assert_visible(altered: torch.Tensor, right: torch.Tensor, mistake: str) -> None:
    shift = float((altered - right).abs().max())
    assert shift > MARGIN * TOLERANCE[torch.float32], f"{mistake}: z moves by {shift:.1e} only"


def circuit_with_no_small_angle(ansatz: Ansatz) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, theta of one circuit and its z; angles of size 0.4 to 2.7, so that each gate does something.

    Always the same: of a thousand draws, one has a gate of which little is seen by chance.
    """
    generator = torch.Generator().manual_seed(0)
    x = random_x(generator, TOKENS, width_for(ansatz.qubits))
    theta = random_theta(generator, 1, ansatz)
    theta = theta.sign() * (0.4 + 2.3 * theta.abs() / torch.pi)
    return x, theta, judge(x, theta, ansatz)[:, 0]


def seen_rows(ansatz: Ansatz) -> range:
    """Rows of theta that z depends on: nothing sees the last phases of a strongly entangling circuit."""
    return range(ansatz.rows - 1 if ansatz.name == "strongly_entangling" else ansatz.rows)


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [1, 2, 4])
@pytest.mark.parametrize("mistake", ["sign", "dropped"])
def test_a_wrong_angle_shows(qubits: int, name: str, mistake: str) -> None:
    ansatz = Ansatz(name, qubits, 2)
    x, theta, right = circuit_with_no_small_angle(ansatz)
    factor = {"sign": -1.0, "dropped": 0.0}[mistake]
    for row in seen_rows(ansatz):
        for wire in range(qubits):
            wrong = theta.clone()
            wrong[0, row, wire] *= factor
            assert_visible(judge(x, wrong, ansatz)[:, 0], right, f"angle ({row}, {wire})")


@pytest.mark.parametrize("name", ["ryrz_ring_ry", "ry_ring"])
@pytest.mark.parametrize("qubits", [2, 3, 4])
def test_a_dropped_gate_shows(qubits: int, name: str) -> None:
    ansatz = Ansatz(name, qubits, 2)
    x, theta, right = circuit_with_no_small_angle(ansatz)
    gates = operations(ansatz, theta[0])
    for place in range(len(gates)):
        altered = pennylane_z(x, gates[:place] + gates[place + 1 :], qubits)
        assert_visible(altered, right, f"gate {place}, {gates[place][0]}")


@pytest.mark.parametrize("name", ["ryrz_ring_ry", "ry_ring"])
@pytest.mark.parametrize("qubits", [3, 4])
def test_a_reversed_cnot_shows(qubits: int, name: str) -> None:
    ansatz = Ansatz(name, qubits, 2)
    x, theta, right = circuit_with_no_small_angle(ansatz)
    gates = operations(ansatz, theta[0])
    for place, (operator, arguments) in enumerate(gates):
        if operator is qml.CNOT:
            reverse = (qml.CNOT, (arguments[0][::-1],))
            altered = pennylane_z(x, [*gates[:place], reverse, *gates[place + 1 :]], qubits)
            assert_visible(altered, right, f"CNOT at {place}")


@pytest.mark.parametrize("name", ANSATZ_NAMES)
@pytest.mark.parametrize("qubits", [2, 5, 9, 13])
def test_mistakes_in_the_whole_circuit_show_at_any_size(qubits: int, name: str) -> None:
    ansatz = Ansatz(name, qubits, 2)
    x, theta, right = circuit_with_no_small_angle(ansatz)
    padded = torch.nn.functional.pad(x, (0, 2**qubits - x.shape[1]))
    wires = list(range(1, qubits + 1))
    other_end = padded.reshape(-1, *[2] * qubits).permute(0, *reversed(wires)).reshape(TOKENS, -1)
    one_wrong = theta.clone()
    one_wrong[0, 0, qubits // 2] *= -1 if name != "strongly_entangling" else 0.5
    mistakes = {
        "wires of theta in reverse": judge(x, theta.flip(-1), ansatz),
        "wires of theta moved by one": judge(x, theta.roll(1, -1), ansatz),
        "rows of theta in reverse": judge(x, theta.flip(-2), ansatz),
        "signs of all angles": judge(x, -theta, ansatz),
        "least significant bit first": judge(other_end, theta, ansatz),
        "padded in front": judge(padded.roll(1, -1), theta, ansatz),
        "one angle": judge(x, one_wrong, ansatz),
    }
    for mistake, z in mistakes.items():
        assert_visible(z[:, 0], right, mistake)
    assert_visible(right.flip(-1), right, "readout in reverse")


def test_a_missing_closing_rotation_shows() -> None:
    ansatz = Ansatz("ryrz_ring_ry", 9, 2)
    x, theta, right = circuit_with_no_small_angle(ansatz)
    altered = pennylane_z(x, operations(ansatz, theta[0])[:-9], 9)
    assert_visible(altered, right, "closing RY")


def test_nothing_sees_the_last_phases_of_a_strongly_entangling_circuit() -> None:
    """The named exception above: those angles exist since PennyLane's template has them."""
    ansatz = Ansatz("strongly_entangling", 3, 2)
    x, theta, right = circuit_with_no_small_angle(ansatz)
    theta[0, -1] = 0
    assert (judge(x, theta, ansatz)[:, 0] - right).abs().max() < TOLERANCE[torch.float64]


def test_nothing_sees_all_phases_turned_the_other_way() -> None:
    """The other exception: RY and CNOT are real and so is x, so that it conjugates the state. One does show."""
    ansatz = Ansatz("ryrz_ring_ry", 3, 2)
    x, theta, right = circuit_with_no_small_angle(ansatz)
    theta[:, 1] *= -1
    assert_visible(judge(x, theta, ansatz)[:, 0], right, "one row of RZ")
    theta[:, 3] *= -1
    assert (judge(x, theta, ansatz)[:, 0] - right).abs().max() < TOLERANCE[torch.float64]
