"""QAA circuits: amplitude embedding, a parameterised circuit, Pauli-Z expectation values.

``reference`` is the definition; every backend is the same function and is tested against it and PennyLane.
"""

from qaa_serve.circuits.ansatz import ALL_READOUTS, ANSATZ_NAMES, MAX_QUBITS, Ansatz, qubits_for
from qaa_serve.circuits.backends import BACKENDS, Choice, Circuits, choose_backend, circuits_of, get_backend
from qaa_serve.circuits.embedding import standardised

__all__ = [
    "ALL_READOUTS",
    "ANSATZ_NAMES",
    "BACKENDS",
    "MAX_QUBITS",
    "Ansatz",
    "Choice",
    "Circuits",
    "choose_backend",
    "circuits_of",
    "get_backend",
    "qubits_for",
    "standardised",
]
