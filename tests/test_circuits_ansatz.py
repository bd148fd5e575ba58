"""Which circuits there are, and their sizes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qaa_serve.circuits import ANSATZ_NAMES, MAX_QUBITS, Ansatz, qubits_for
from qaa_serve.circuits.ansatz import Cnots, Rotation


@pytest.mark.parametrize(
    ("width", "qubits"),
    [(2, 1), (3, 2), (4, 2), (5, 3), (512, 9), (513, 10), (640, 10), (768, 10), (4096, 12), (11008, 14)],
)
def test_qubits_for_a_width(width: int, qubits: int) -> None:
    assert qubits_for(width) == qubits


@pytest.mark.parametrize("width", [-4, -1, 0, 1, 65537, 10**9])
def test_a_width_that_cannot_be_embedded_is_an_error(width: int) -> None:
    with pytest.raises(ValueError, match=rf"width {width} cannot be embedded: widths from 2 to 65536 can"):
        qubits_for(width)


def test_the_default_ansatz_comes_first() -> None:
    assert ANSATZ_NAMES == ("ryrz_ring_ry", "ry_ring", "strongly_entangling")


@pytest.mark.parametrize("qubits", [1, 2, 3, 10])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_rows_of_theta(qubits: int, layers: int) -> None:
    rows = {"ryrz_ring_ry": 2 * layers + 1, "ry_ring": layers, "strongly_entangling": 3 * layers}
    for name in ANSATZ_NAMES:
        ansatz = Ansatz(name, qubits, layers)
        assert ansatz.rows == rows[name]
        assert ansatz.theta_shape == (rows[name], qubits)


def test_rows_are_counted_in_the_order_of_the_gates() -> None:
    for name in ANSATZ_NAMES:
        turns = [gate for gate in Ansatz(name, 3, 3).gates() if isinstance(gate, Rotation)]
        assert [gate.row for gate in turns] == list(range(len(turns)))


def test_gates_of_the_default_ansatz() -> None:
    ring = Cnots(((0, 1), (1, 2), (2, 0)))
    assert list(Ansatz("ryrz_ring_ry", 3, 2).gates()) == [
        Rotation("Y", 0),
        Rotation("Z", 1),
        ring,
        Rotation("Y", 2),
        Rotation("Z", 3),
        ring,
        Rotation("Y", 4),
    ]


def test_two_qubits_have_both_cnots_and_one_has_none() -> None:
    for name in ANSATZ_NAMES:
        assert Cnots(((0, 1), (1, 0))) in list(Ansatz(name, 2, 1).gates())
        assert not any(isinstance(gate, Cnots) for gate in Ansatz(name, 1, 2).gates())


def test_the_reach_of_strongly_entangling_grows_and_starts_again() -> None:
    rings = [gate for gate in Ansatz("strongly_entangling", 4, 4).gates() if isinstance(gate, Cnots)]
    assert [ring.pairs[0] for ring in rings] == [(0, 1), (0, 2), (0, 3), (0, 1)]


def test_an_unknown_ansatz_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown ansatz 'rx'.*ryrz_ring_ry, ry_ring, strongly_entangling"):
        Ansatz("rx", 3, 1)


@pytest.mark.parametrize("qubits", [-1, 0, MAX_QUBITS + 1])
def test_qubits_out_of_range_are_an_error(qubits: int) -> None:
    with pytest.raises(ValueError, match=rf"1 to {MAX_QUBITS} qubits, not {qubits}"):
        Ansatz("ry_ring", qubits, 1)


@pytest.mark.parametrize("layers", [-1, 0])
def test_no_layers_are_an_error(layers: int) -> None:
    with pytest.raises(ValueError, match=rf"at least one layer, not {layers}"):
        Ansatz("ry_ring", 3, layers)


def test_equal_forms_are_equal_keys() -> None:
    assert len({Ansatz("ry_ring", 3, 1), Ansatz("ry_ring", 3, 1), Ansatz("ry_ring", 3, 2)}) == 2


def test_no_backend_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, qaa_serve.circuits as c; "
        "loaded = [b for b in c.BACKENDS.values() if f'qaa_serve.circuits.{b.module}' in sys.modules]; "
        "sys.exit(f'imported too early: {loaded}' if loaded else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
