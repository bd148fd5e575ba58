"""One trained circuit of an adapter: as PennyLane operations, as a drawing, as OpenQASM."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qaa_serve.adapters import Adapter, Inputs, matches
from qaa_serve.circuits import Ansatz
from qaa_serve.circuits.ansatz import Rotation
from qaa_serve.inspection.errors import InspectionError

#: Formats that a drawing may have, by the file's suffix.
IMAGE_SUFFIXES = (".png", ".svg", ".pdf")

#: A deep circuit is drawn less finely rather than in an image that no viewer opens.
_MAX_PIXELS = 30_000


@dataclass(frozen=True)
class Circuit:
    """A circuit with its angles.

    Attributes:
        revision: ``name@<first 12 hex>`` of the adapter it belongs to.
        module: the adapted layer's full name.
        head: its number in the layer, from 0.
        ansatz: its form.
        theta: (rows, n) float32 angles in radians.
        inputs: what is done to x before it is embedded, as the config says it.
    """

    revision: str
    module: str
    head: int
    ansatz: Ansatz
    theta: torch.Tensor
    inputs: Inputs = "raw"

    @property
    def title(self) -> str:
        """What it is, in one line."""
        return f"{self.revision}, {self.module}, head {self.head}"


def choose_modules(adapter: Adapter, names: list[str]) -> list[str]:
    """The adapted modules that the names mean, each by its full name or its end; all for no names.

    Raises:
        InspectionError: for a name that means none.
    """
    for name in names:
        if not any(matches(module, (name,)) for module in adapter.modules):
            known = list(adapter.modules)
            listed = ", ".join(known[:8]) + (f", ... ({len(known)} in all)" if len(known) > 8 else "")
            raise InspectionError(f"--module {name}: the adapter has no such module; it has {listed}")
    return [module for module in adapter.modules if not names or matches(module, tuple(names))]


def choose_circuit(adapter: Adapter, revision: str, names: list[str], head: int) -> Circuit:
    """The circuit of the first module that the names mean.

    Raises:
        InspectionError: for an unknown module, or a head that is not there.
    """
    module = choose_modules(adapter, names)[0]
    heads = adapter.config.heads
    if not 0 <= head < heads:
        raise InspectionError(f"--head {head}: the adapter's heads are 0 to {heads - 1}")
    weights = adapter.modules[module]
    ansatz = adapter.config.circuit(weights.qubits)
    return Circuit(revision, module, head, ansatz, weights.theta[head], adapter.config.inputs)


def apply_gates(
    theta: torch.Tensor, ansatz: Ansatz, after_gate: Callable[[list[int]], object] | None = None
) -> None:
    """Queue a circuit's gates, in the order in which they act, in PennyLane.

    Args:
        theta: (rows, n) angles.
        ansatz: the circuit's form.
        after_gate: called after each gate with the wires that it acted on.
    """
    import pennylane as qml

    axes = {"Y": qml.RY, "Z": qml.RZ}
    for gate in ansatz.gates():
        if isinstance(gate, Rotation):
            for wire in range(ansatz.qubits):
                axes[gate.axis](theta[gate.row, wire], wires=wire)
                if after_gate is not None:
                    after_gate([wire])
        else:
            for pair in gate.pairs:
                qml.CNOT(wires=list(pair))
                if after_gate is not None:
                    after_gate(list(pair))


def readouts(ansatz: Ansatz) -> list[object]:
    """PennyLane's measurements of a circuit's observables."""
    import pennylane as qml

    strings = [[qml.Z(wire) for wire in wires] for wires in ansatz.observables]
    return [qml.expval(qml.prod(*string) if len(string) > 1 else string[0]) for string in strings]


def check_image(path: Path) -> None:
    """Raise InspectionError unless the file's suffix is one that drawings can have."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise InspectionError(
            f"{path}: a drawing is a file that ends in {', '.join(IMAGE_SUFFIXES)}; this one ends in "
            f"{path.suffix or 'nothing'}"
        )


def draw(circuit: Circuit, suffix: str) -> bytes:
    """The circuit with its angles in radians, from the embedding to the readout, as an image file's bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pennylane as qml

    n = circuit.ansatz.qubits

    def whole() -> list[object]:
        qml.AmplitudeEmbedding(torch.ones(2**n), wires=range(n), normalize=True)
        apply_gates(circuit.theta, circuit.ansatz)
        return readouts(circuit.ansatz)

    node = qml.QNode(whole, qml.device("default.qubit", wires=n), diff_method=None)
    figure, axes = qml.draw_mpl(node, decimals=2, level="top", style="black_white", fontsize=12)()
    try:
        gates = f"{circuit.ansatz.name}, {circuit.ansatz.layers} layers, {n} qubits; angles in radians"
        axes.set_title(f"{circuit.title}\n{gates}", loc="left", fontsize=14)
        width, height = figure.get_size_inches()
        image = io.BytesIO()
        figure.savefig(
            image, format=suffix.lower().removeprefix("."), bbox_inches="tight",
            dpi=min(110.0, _MAX_PIXELS / max(width, height)),
        )  # fmt: skip
        return image.getvalue()
    finally:
        plt.close(figure)


def to_qasm(circuit: Circuit) -> str:
    """The circuit as OpenQASM 2.0, without the embedding; angles with all digits of their float32 values.

    ``q[0]`` is the most significant bit of a basis state's index.
    """
    n = circuit.ansatz.qubits
    lines = [
        "OPENQASM 2.0;",
        f"// {circuit.title}",
        f"// {circuit.ansatz.name}, {circuit.ansatz.layers} layers, {n} qubits",
        f"// Prepare the state {_prepared(circuit)}, padded with zeros, before the first gate: amplitude i",
        f"// belongs to the basis state whose bits are q[0] q[1] ... q[{n - 1}], q[0] the most significant one.",
        f"// {_read_out(circuit.ansatz)}",
        'include "qelib1.inc";',
        f"qreg q[{n}];",
        f"creg c[{n}];",
    ]
    for gate in circuit.ansatz.gates():
        if isinstance(gate, Rotation):
            name = f"r{gate.axis.lower()}"
            angles = circuit.theta[gate.row].double().tolist()
            lines += [f"{name}({_decimal(angle)}) q[{wire}];" for wire, angle in enumerate(angles)]
        else:
            lines += [f"cx q[{control}],q[{target}];" for control, target in gate.pairs]
    lines += [f"measure q[{wire}] -> c[{wire}];" for wire in range(n)]
    return "\n".join(lines) + "\n"


def _prepared(circuit: Circuit) -> str:
    state = "(x / ||x||, 1) / sqrt(2)" if circuit.ansatz.constant else "x / ||x||"
    return state if circuit.inputs == "raw" else f"{state} of the x that qaa_inputs standardises"


def _read_out(ansatz: Ansatz) -> str:
    means = "z_k is the mean of (-1)^c[k]"
    if ansatz.columns > ansatz.qubits:
        pairs = ", ".join(f"{i} {j}" for i, j in ansatz.observables[ansatz.qubits :])
        means += f", then of (-1)^(c[i] + c[j]) for i j = {pairs}"
    elif ansatz.columns < ansatz.qubits:
        means += f" for k < {ansatz.columns}"
    return means + (", times ||x|| / sqrt(width of x)." if ansatz.length else ".")


def _decimal(angle: float) -> str:
    """All digits; OpenQASM 2 has no number without a point before an exponent."""
    text = repr(angle)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return text
