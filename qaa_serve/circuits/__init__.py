"""QAA circuits: amplitude embedding, a parameterised circuit, Pauli-Z expectation values.

``reference`` is the definition; every backend is the same function and is tested against it and PennyLane.
"""

from qaa_serve.circuits.ansatz import ANSATZ_NAMES, MAX_QUBITS, Ansatz, qubits_for
from qaa_serve.circuits.backends import BACKENDS, get_backend

__all__ = ["ANSATZ_NAMES", "BACKENDS", "MAX_QUBITS", "Ansatz", "get_backend", "qubits_for"]
